"""Noctule: train, shrink and ship neural networks on the hardware people have."""
