"""How does a network train on its non-zeros alone? Sparse layers, how they share weights, connections that move."""
