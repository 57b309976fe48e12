"""How fast, how small and how accurate is it here? Benchmarks beside dense layers and the other sparse libraries."""
