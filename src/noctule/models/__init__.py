"""Which models are there to start from? Small reference models, in plain torch modules."""

from noctule.models.cnn import cnn
from noctule.models.mlp import mlp
from noctule.models.mobilenet import mobilenet
from noctule.models.resnet import ResNet, resnet
from noctule.models.transformer import Transformer
from noctule.models.vit import ViT

__all__ = ["ResNet", "Transformer", "ViT", "cnn", "mlp", "mobilenet", "resnet"]
