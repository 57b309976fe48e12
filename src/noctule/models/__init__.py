"""Which models are there to start from? Small reference models, in plain torch modules."""

from noctule.models.cnn import cnn
from noctule.models.early_exits import EarlyExits, exit_head, exits_loss, measure_exits
from noctule.models.mlp import mlp
from noctule.models.mobilenet import mobilenet
from noctule.models.resnet import ResNet, resnet
from noctule.models.transformer import Transformer
from noctule.models.vit import ViT

__all__ = [
    "EarlyExits",
    "ResNet",
    "Transformer",
    "ViT",
    "cnn",
    "exit_head",
    "exits_loss",
    "measure_exits",
    "mlp",
    "mobilenet",
    "resnet",
]
