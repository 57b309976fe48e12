"""How important each connection is: plain functions of a weight and its gradient."""

from collections.abc import Callable

from torch import Tensor

Score = Callable[[Tensor, Tensor | None], Tensor]
"""Weights and their gradient of the last step, of one shape -> importance of each, the larger the more it is worth."""


def magnitude(weight: Tensor, gradient: Tensor | None) -> Tensor:
    """|w|: the usual score, which needs no gradient.

    >>> import torch
    >>> magnitude(torch.tensor([1.0, -2.0]), None)
    tensor([1., 2.])
    """
    return weight.abs()


def taylor(weight: Tensor, gradient: Tensor | None) -> Tensor:
    """|w g|: how much the loss would change without the weight, to first order (Molchanov et al. 2017, arXiv 1611.06440).

    It sees the gradient of one step only, so large batches or accumulated gradients give a better score.

    Raises:
        ValueError: there is no gradient.
    """
    if gradient is None:
        raise ValueError(
            "taylor needs the gradient of the step, but a layer has none: it took no part in the loss, or its gradients were "
            "set to None before the step had ended; leave it out with skip=, or score by magnitude"
        )
    return (weight * gradient).abs()
