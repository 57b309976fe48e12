"""What can be trained with one command? Whole trainings, each a function whose signature is its command line."""

from noctule.recipes.bat_brain import bat_brain
from noctule.recipes.sparse_cnn import sparse_cnn
from noctule.recipes.sparse_mlp import sparse_mlp
from noctule.recipes.sparse_transformer import sparse_transformer

__all__ = ["bat_brain", "sparse_cnn", "sparse_mlp", "sparse_transformer"]
