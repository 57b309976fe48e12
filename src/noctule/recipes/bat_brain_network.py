"""The network of `bat_brain`: sizes, initial weights, learning rates.

With two weights to a neuron the usual initial weights lose the signal in a few layers. Here each layer keeps the variance of its
inputs, forward and backward (He et al. 2015, arXiv 1502.01852, for the fan-in of the stored weights), biases begin at zero, and a
layer's learning rate is over its fan-in, which is two in the middle and millions at the end.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.optim import SGD

from noctule.core.convert import convert_
from noctule.models import mlp
from noctule.sparse.layers import FuseEpilogue, SparseLinear


@dataclass(frozen=True, kw_only=True)
class Brain:
    """The sizes of a network: hidden layers of equal width, epsilon (inputs + outputs) weights in each layer, then LeakyReLU.

    >>> Brain(neurons=1001, layers=2, features=100).widths
    (100, 501, 500, 10)
    """

    neurons: int = 50_000_000
    layers: int = 10
    epsilon: float = 1.0
    features: int = 65_536
    classes: int = 10
    slope: float = 0.5

    def __post_init__(self) -> None:
        if self.layers < 1 or self.neurons < self.layers:
            raise ValueError(f"each of {self.layers} hidden layers needs a neuron, got {self.neurons} neurons")
        if not self.epsilon > 0.0:
            raise ValueError(f"epsilon must be above 0, got {self.epsilon}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Features in, of each hidden layer, and out."""
        width, more = divmod(self.neurons, self.layers)
        return (self.features, *(width + (at < more) for at in range(self.layers)), self.classes)

    @property
    def weights(self) -> int:
        """Weights of all layers together."""
        return sum(self._weights(*widths) for widths in pairwise(self.widths))

    def model(self, *, seed: int) -> nn.Module:
        """A new network, in time and memory O(weights)."""
        generator = torch.Generator().manual_seed(seed)
        gain = 2.0 / (1.0 + self.slope**2)

        def linear(inputs: int, outputs: int) -> SparseLinear:
            layer = SparseLinear(inputs, outputs, weights=self._weights(inputs, outputs), generator=generator)
            assert layer.bias is not None
            with torch.no_grad():
                layer.values.mul_((3.0 * gain) ** 0.5)  # drawn within 1 / sqrt(fan-in), a third of that variance
                layer.bias.zero_()
            return layer

        model = mlp(*self.widths, activation=lambda layer: nn.LeakyReLU(self.slope), linear=linear)
        return convert_(model, FuseEpilogue()).model

    def _weights(self, inputs: int, outputs: int) -> int:
        return min(max(1, round(self.epsilon * (inputs + outputs))), inputs * outputs)


def sparse_linears(model: nn.Module) -> dict[str, SparseLinear]:
    """The layers of the network, first to last, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def momentum_sgd(model: nn.Module, learning_rate: float = 0.2, *, momentum: float = 0.9) -> SGD:
    """SGD with a rate of its own for each layer: ``learning_rate`` over the mean fan-in."""
    groups = [
        {"params": list(layer.parameters()), "lr": learning_rate * layer.out_features / layer.weights}
        for layer in sparse_linears(model).values()
    ]
    return SGD(groups, momentum=momentum, fused=True)


def connected(model: nn.Module) -> int:
    """Number of hidden neurons with at least one input and one output connection; the others have no effect."""
    pairs = pairwise(layer.topology for layer in sparse_linears(model).values())
    return sum(int(((a.row_ptr.diff() > 0) & (b.transposed.row_ptr.diff() > 0)).sum()) for a, b in pairs)
