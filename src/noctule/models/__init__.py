"""Small reference models, in plain torch modules."""

from noctule.models.mlp import mlp

__all__ = ["mlp"]
