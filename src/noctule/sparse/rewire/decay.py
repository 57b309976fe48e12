"""Weight decay that is not multiplied by the learning rate."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.core.method import Method
from noctule.core.optim import param_groups


class Decay(Method):
    """Multiplies every weight by ``1 - rate`` before each step: decay decoupled from gradient, momentum and learning rate.

    It acts on what `param_groups` decays (matrices, kernels, sparse values), so give the optimizer itself none. This is the decay
    of the code of Curci, Mocanu, Pechenizkiy 2021 (arXiv 2102.01732).

    Args:
        rate: the share of a weight that is lost at each step, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"the rate must lie in [0, 1), got {rate}")
        self.rate = rate
        self._model: nn.Module | None = None

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model = model

    @torch.no_grad()
    @override
    def before_step(self) -> None:
        assert self._model is not None
        for parameter in param_groups(self._model)[0]["params"]:
            parameter.mul_(1.0 - self.rate)

    @override
    def end(self) -> None:
        self._model = None
