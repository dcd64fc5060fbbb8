"""Networks, losses, samplers, the optimum, and the training loop."""
