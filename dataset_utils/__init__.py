"""Step I: readers of image sources and the writer of dataset archives."""
