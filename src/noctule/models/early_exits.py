"""A network with exits on its way: what is easy leaves early, and the rest of the network is not run on it.

Teerapittayanon, McDanel, Kung 2016, "BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks", arXiv 1709.01686.
Differs from the paper: a sample leaves where the probability of its first class exceeds a threshold, not where the entropy is below
one; and all exits have one threshold.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from noctule.core.evaluating import evaluating
from noctule.core.place import nearest


class EarlyExits(nn.Module):
    """Stages one after the other, with small heads after some of them.

    In training it returns the outputs of all exits as a tuple, the deepest last, for `exits_loss` or
    `noctule.compress.distill.self_distillation`. In evaluation it returns one output for each sample, (B, K): that of the first
    exit that is sure enough; later stages run on the samples that are left.

    Args:
        stages: in order; the output of the last one is that of the network.
        heads: name of a stage -> what makes (B, K) of its output, such as `exit_head`.
        threshold: probability of the most probable class above which a sample leaves, in [0, 1]; with 1 none does.

    >>> stages = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> model = EarlyExits(stages, {"1": nn.Linear(8, 3)}, threshold=0.9)
    >>> [y.shape[1] for y in model(torch.rand(5, 4))], model.eval()(torch.rand(5, 4)).shape
    ([3, 3], torch.Size([5, 3]))
    """

    def __init__(
        self, stages: nn.Sequential | Mapping[str, nn.Module], heads: Mapping[str, nn.Module], *, threshold: float = 0.9
    ) -> None:
        super().__init__()
        named = OrderedDict(stages.named_children() if isinstance(stages, nn.Module) else stages.items())
        inner = list(named)[:-1]
        for name in heads:
            if name not in inner:
                raise ValueError(
                    f"no exit can stand after {name!r}{nearest(name, inner)}: before the last are {', '.join(inner) or 'none'}"
                )
        if not heads or not 0.0 <= threshold <= 1.0:
            raise ValueError(f"give at least one head and a threshold in [0, 1], got {len(heads)} and {threshold}")
        self.stages, self.heads, self.threshold = nn.Sequential(named), nn.ModuleDict(heads), threshold

    @override
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs of all exits in training, of the exit that each sample takes in evaluation."""
        if not self.training:
            return self.leave(x)[0]
        outputs: list[Tensor] = []
        for name, stage in self.stages.named_children():
            x = stage(x)
            if name in self.heads:
                outputs.append(self.heads[name](x))
        return *outputs, x

    def leave(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output (B, K) of each sample, and the number (B,) of the exit that it took, from 0."""
        rows = torch.arange(len(x), device=x.device)
        outputs: list[Tensor] = []
        gone: list[Tensor] = []
        for name, stage in self.stages.named_children():
            x = stage(x)
            if name in self.heads:
                y = self.heads[name](x)
                sure = y.softmax(1).amax(1) > self.threshold
                outputs.append(y[sure])
                gone.append(rows[sure])
                if bool(sure.all()):
                    break
                x, rows = x[~sure], rows[~sure]
        else:
            outputs.append(x)
            gone.append(rows)
        order = torch.cat(gone).argsort()
        exits = torch.cat([torch.full_like(part, k) for k, part in enumerate(gone)])
        return torch.cat(outputs)[order], exits[order]


def exit_head(channels: int, classes: int) -> nn.Sequential:
    """The mean of images (B, channels, H, W) and one linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def exits_loss(outputs: Sequence[Tensor] | Tensor, targets: Tensor, *, weights: Sequence[float] = ()) -> Tensor:
    """The weighted sum of the exits' cross entropies, or in evaluation that of the one output: for `fit` as it is.

    Args:
        outputs: of `EarlyExits`.
        targets: (B,) classes.
        weights: of each exit, the deepest last (default: 1 each).
    """
    if isinstance(outputs, Tensor):
        return F.cross_entropy(outputs, targets)
    weights = weights or [1.0] * len(outputs)
    if len(weights) != len(outputs):
        raise ValueError(f"{len(weights)} weights for {len(outputs)} exits: give one for each, the deepest last")
    return torch.stack([w * F.cross_entropy(y, targets) for w, y in zip(weights, outputs, strict=True)]).sum()


@dataclass(frozen=True)
class Exits:
    """Where samples left, and what that saved."""

    left: dict[str, int]
    """Name of a stage -> samples that left after it; "" is the end."""
    multiply_adds: int
    """Executed in matrix products and convolutions, heads included."""
    full_multiply_adds: int
    """The same of the stages alone, run on all samples."""

    @property
    def saved(self) -> float:
        """Share of the operations that was not executed; below 0 where the heads cost more than the exits save."""
        return 1.0 - self.multiply_adds / self.full_multiply_adds


def measure_exits(model: EarlyExits, inputs: Tensor, *, batch_size: int = 1000) -> Exits:
    """Run a model in evaluation mode on inputs and count samples by exit and operations; its mode is restored."""
    with evaluating(model), torch.no_grad():
        taken: list[Tensor] = []
        early = _multiply_adds(lambda part: taken.append(model.leave(part)[1]), inputs, batch_size)
        full = _multiply_adds(model.stages, inputs, batch_size)
    counts = torch.cat(taken).bincount(minlength=len(model.heads) + 1).tolist()
    names = [name for name, _ in model.stages.named_children() if name in model.heads]
    return Exits(dict(zip([*names, ""], counts, strict=True)), early, full)


def _multiply_adds(run: Callable[[Tensor], object], inputs: Tensor, batch_size: int) -> int:
    with FlopCounterMode(display=False) as counter:  # sparse kernels report to it too
        for part in inputs.split(batch_size):
            run(part)
    return counter.get_total_flops() // 2
