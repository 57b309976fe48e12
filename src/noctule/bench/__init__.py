"""The benchmarks as programs: `layers`, `fashion` and `memory`, each beside dense layers and the other sparse libraries."""
