"""A training loop made of the public pieces, and how it is interrupted."""
