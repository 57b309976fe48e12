"""The multilayer perceptron as a plain `nn.Sequential`."""

from collections.abc import Callable

from torch import nn

Activation = Callable[[int], nn.Module]
"""Function from the number of a hidden layer, from 1, to its activation module."""


def relu(layer: int) -> nn.Module:
    """ReLU after every hidden layer."""
    return nn.ReLU()


def mlp(
    *widths: int,
    activation: Activation = relu,
    dropout: float = 0.0,
    linear: Callable[[int, int], nn.Module] = nn.Linear,
) -> nn.Sequential:
    """Linear layers of these widths, with activation and dropout after all but the last.

    Args:
        widths: features in, of each hidden layer, and out: at least two.
        activation: makes the activation of a hidden layer from its number.
        dropout: after each hidden activation, in [0, 1).
        linear: makes a layer from its features in and out.

    >>> mlp(784, 100, 10)
    Sequential(
      (0): Linear(in_features=784, out_features=100, bias=True)
      (1): ReLU()
      (2): Linear(in_features=100, out_features=10, bias=True)
    )
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"an MLP needs at least an input and an output width, all above 0, got {widths}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    modules: list[nn.Module] = []
    for number, (features_in, features_out) in enumerate(zip(widths, widths[1:]), start=1):
        modules.append(linear(features_in, features_out))
        if number < len(widths) - 1:
            modules.append(activation(number))
            if dropout:
                modules.append(nn.Dropout(dropout))
    return nn.Sequential(*modules)
