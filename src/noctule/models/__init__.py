"""Which models are there to start from? Small reference models, in plain torch modules."""

from noctule.models.cnn import cnn
from noctule.models.mlp import mlp
from noctule.models.transformer import Transformer

__all__ = ["Transformer", "cnn", "mlp"]
