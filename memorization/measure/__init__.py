"""Measuring one denoiser: nearest neighbours, criteria, R_mem, groups, the gap to the optimum, quality."""
