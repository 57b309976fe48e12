"""The benchmarks as programs, each beside dense layers and the other sparse libraries."""
