"""The two-moons study: in which order small diffusion models memorize inliers, duplicates and outliers."""
