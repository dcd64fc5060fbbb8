"""A folder of runs as one page, with the commands that repeat them."""
