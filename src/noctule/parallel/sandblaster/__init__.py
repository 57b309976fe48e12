"""How do several workers evaluate one loss? L-BFGS whose loss and gradient are sums over the workers."""
