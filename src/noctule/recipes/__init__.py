"""Whole trainings: each a function whose typed, defaulted arguments are its command line."""

from noctule.recipes.sparse_mlp import sparse_mlp

__all__ = ["sparse_mlp"]
