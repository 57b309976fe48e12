"""Where the teacher's outputs come from, and the loss of a student in any loop that takes ``loss(outputs, targets)``.

The teacher may run beside the student (`distilling`), be several (`Ensemble`), or have run before (`outputs_of`, `Stored`).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from noctule.core.evaluating import evaluating

Loss = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def distilling(
    student: nn.Module,
    teacher: Callable[..., Any],
    loss: Callable[[Any, Any, Tensor], Tensor],
    *,
    evaluated: Loss = F.cross_entropy,
) -> Iterator[Loss]:
    """Run the teacher on what the student is trained on, and make a ``loss_fn(outputs, targets)`` of both, until the block ends.

    While the student is in training mode, its inputs go to the teacher too, which is in evaluation mode, without gradients. On
    exit the hook is removed and the teacher's modules are in the modes they had. The optimizer is that of the student.

    Args:
        student: what is trained.
        teacher: a module, or a function of the same inputs, such as `Stored`.
        loss: of the student's outputs, the teacher's and the targets; hidden layers it may read from `taps`.
        evaluated: the loss while the student is in evaluation mode.

    Raises:
        ValueError: the teacher shares parameters with the student.

    >>> from noctule.compress.distill import hinton
    >>> student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    >>> with distilling(student, teacher, lambda own, taught, targets: hinton(own, taught)) as loss_fn:
    ...     loss_fn(student(torch.ones(4, 3)), torch.tensor([0, 1, 0, 1])).backward()
    >>> teacher.weight.grad is None
    True
    """
    if isinstance(teacher, nn.Module) and {*map(id, teacher.parameters())} & {*map(id, student.parameters())}:
        raise ValueError("teacher and student share parameters: give a copy, as with copy.deepcopy(student)")
    told: list[Any] = []

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            with torch.no_grad():
                told[:] = [teacher(*args, **kwargs)]

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if not student.training:
            return evaluated(outputs, targets)
        if not told:
            raise RuntimeError("the student has not been called in training mode since its last loss: call it first")
        return loss(outputs, told.pop(), targets)

    hook = student.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        with evaluating(teacher) if isinstance(teacher, nn.Module) else nullcontext():
            yield loss_fn
    finally:
        hook.remove()


class Ensemble(nn.Module):
    """Several teachers as one: outputs whose softmax at the temperature is the mean of the teachers' at that temperature.

    Hinton, Vinyals, Dean 2015, arXiv 1503.02531. The loss is to have the same temperature.

    >>> first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    >>> Ensemble(first, second, temperature=4.0)(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    def __init__(self, *teachers: nn.Module, temperature: float) -> None:
        super().__init__()
        if not teachers or not temperature > 0.0:
            raise ValueError(
                f"an ensemble needs teachers and a temperature above 0, got {len(teachers)} and {temperature}"
            )
        self.teachers, self.temperature = nn.ModuleList(teachers), temperature

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(B, K) of inputs as the teachers take them."""
        softened = torch.stack([(t(*args, **kwargs) / self.temperature).log_softmax(-1) for t in self.teachers])
        return self.temperature * (softened.logsumexp(0) - math.log(len(self.teachers)))


def outputs_of(teacher: nn.Module, inputs: Tensor, *, batch_size: int = 1000) -> Tensor:
    """The outputs of a teacher for all samples, in evaluation mode and without gradients; its mode is restored.

    Args:
        teacher: any model with one tensor out.
        inputs: of all samples, in the order of their numbers.
        batch_size: samples at a time.
    """
    with evaluating(teacher), torch.no_grad():
        return torch.cat([teacher(part) for part in inputs.split(batch_size)])


class Stored:
    """Outputs that a teacher made once, by sample number: batches for the loop, and the teacher of `distilling`.

    Args:
        batches: `noctule.data.Batches`, or what tells as they do which samples an epoch's batches hold.
        outputs: of the teacher for each sample, in the order of their numbers.

    >>> from noctule.data import Batches, Dataset
    >>> data = Dataset(torch.rand(5, 3), torch.tensor([0, 1, 0, 1, 0]), name="toy", classes=2)
    >>> stored = Stored(Batches(data, 2, seed=0), outputs_of(nn.Linear(3, 2), data.inputs))
    >>> [stored(inputs).shape[0] for inputs, _ in stored.epoch(0)]
    [2, 2, 1]

    Raises:
        ValueError: there are fewer or more outputs than samples, or the batches are augmented.
    """

    def __init__(self, batches: Any, outputs: Tensor) -> None:
        if len(outputs) != len(batches.dataset):
            raise ValueError(
                f"{len(outputs)} stored outputs for {len(batches.dataset)} samples: give one for each, in order"
            )
        if batches.augment is not None:
            raise ValueError(
                "stored outputs are of the samples without augmentation: give the teacher itself to distilling()"
            )
        self._batches, self._outputs, self._now = batches, outputs.detach(), outputs[:0]

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self._batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, while the outputs for each are at hand."""
        order, size = self._batches.order(epoch).to(self._outputs.device), self._batches.batch_size
        for k, batch in enumerate(self._batches.epoch(epoch, start), start):
            self._now = self._outputs[order[k * size : (k + 1) * size]]
            yield batch

    def __call__(self, inputs: Tensor) -> Tensor:
        """The stored outputs for the inputs that `epoch` gave last."""
        if len(inputs) != len(self._now):
            raise RuntimeError(
                f"{len(inputs)} samples are not the {len(self._now)} of the last batch: loop over Stored.epoch"
            )
        return self._now
