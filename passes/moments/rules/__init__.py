"""How mean and variance pass through each op."""
