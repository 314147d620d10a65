"""The variance stream beside the mean, from randomly rounded weights to the loss."""
