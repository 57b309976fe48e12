"""A parameter server: asynchronous training with bounded staleness."""
