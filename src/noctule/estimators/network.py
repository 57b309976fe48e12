"""The network of an estimator: its specification and its construction."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from noctule.core.convert import convert_
from noctule.models import mlp
from noctule.models.mlp import Activation, relu
from noctule.sparse.budget import erdos_renyi
from noctule.sparse.layers import AllReLU, FuseEpilogue, SparseLinear

ACTIVATIONS: dict[str, Activation] = {
    "all_relu": lambda layer: AllReLU(0.6, layer=layer),
    "identity": lambda layer: nn.Identity(),
    "logistic": lambda layer: nn.Sigmoid(),
    "relu": relu,
    "tanh": lambda layer: nn.Tanh(),
}
"""The activations of scikit-learn's MLP, and All-ReLU with the slope of its paper."""


@dataclass(frozen=True)
class Network:
    """The specification of a sparse multilayer perceptron; equal ones build the same network up to the seed.

    Args:
        widths: features in, of each hidden layer, and out.
        activation: one of `ACTIVATIONS`.
        density: share of the weights of a dense network that is stored.
        dropout: after each hidden layer.
    """

    widths: tuple[int, ...]
    activation: str
    density: float
    dropout: float

    def build(self, seed: int) -> nn.Sequential:
        """Build the network in time and memory O(weights), without torch's global generator."""
        shapes = [(features_out, features_in) for features_in, features_out in pairwise(self.widths)]
        places = sum(features_out * features_in for features_out, features_in in shapes)
        shares = iter(erdos_renyi(shapes, max(len(shapes), round(self.density * places))))
        generator = torch.Generator().manual_seed(seed)

        def linear(features_in: int, features_out: int) -> SparseLinear:
            weights = next(shares)
            return SparseLinear(
                features_in, features_out, weights=weights, generator=generator, device="cpu", dtype=torch.float32
            )

        model = mlp(*self.widths, activation=ACTIVATIONS[self.activation], dropout=self.dropout, linear=linear)
        if self.activation in ("relu", "all_relu") and len(shapes) > 1:
            convert_(model, FuseEpilogue())
        return model


def density_of(model: nn.Module) -> float:
    """Stored weights over the places of the dense twin."""
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    return sum(m.weights for m in layers) / sum(m.topology.places for m in layers)
