"""L-BFGS whose loss and gradient are computed by several workers."""
