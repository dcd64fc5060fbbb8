"""Finding EMM without a grid of sizes."""
