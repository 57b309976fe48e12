"""Does a file compute what its model does? And where it does not, from which layer on?"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noctule.core.errors import ExportError
from noctule.deploy.prepare import answers, first
from noctule.deploy.target import Run, Written

BOUNDS = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.25}
"""float32: the largest difference over the largest output. Others: the root mean square of the differences over the standard
deviation of the outputs."""


@dataclass(frozen=True)
class Agreement:
    """How far what a file computes lies from what its model does."""

    precision: str
    relative: float
    """The largest difference over the largest magnitude of an output."""
    of_spread: float
    """The root mean square of the differences over the standard deviation of the outputs; infinite where these do not differ."""
    bound: float
    """For float32 of ``relative``, else of ``of_spread``."""
    batches: tuple[int, ...]
    """Sizes of the batches that were compared."""

    @property
    def holds(self) -> bool:
        """Whether the difference lies within the bound."""
        return (self.relative if self.precision == "float32" else self.of_spread) <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.precision}: largest difference {self.relative:.2g} of the largest output, {self.of_spread:.2g} of their spread "
            f"(bound {self.bound:g}), batches of {' and '.join(map(str, self.batches))}"
        )


def plain(inputs: Any) -> Any:
    """Tensors as numpy arrays, in the same structure."""
    if isinstance(inputs, Mapping):
        return {name: plain(x) for name, x in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(map(plain, inputs))
    return inputs.detach().cpu().numpy() if isinstance(inputs, Tensor) else inputs


def resized(args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as a batch of another size: its samples over and over."""
    batch = next(len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    which = torch.arange(size) % batch

    def pick(x: Any) -> Any:
        return x[which.to(x.device)] if isinstance(x, Tensor) and x.dim() and len(x) == batch else x

    return tuple(map(pick, args)), {name: pick(x) for name, x in kwargs.items()}


def agreement(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], run: Run, precision: str, sizes: tuple[int, ...]
) -> Agreement:
    """Compare a file with its model on batches of these sizes, made of an example.

    Raises:
        ExportError: the model gives NaN or infinite numbers, or the file another shape.
    """
    ours, theirs = [], []
    for size in sizes:
        own_args, own_kwargs = resized(args, kwargs, size)
        want = answers(model, own_args, own_kwargs).numpy()
        if not np.isfinite(want).all():
            raise ExportError(
                "the model gives NaN or infinite numbers on the example, which nothing can be compared with"
            )
        got = np.asarray(run(plain(own_kwargs or own_args)), np.float32)
        if got.shape != want.shape:
            raise ExportError(f"the file gives outputs of shape {got.shape} where the model gives {want.shape}")
        ours.append(want.ravel())
        theirs.append(got.ravel())
    want, got = np.concatenate(ours).astype(np.float64), np.concatenate(theirs).astype(np.float64)
    difference, spread = np.abs(want - got), float(want.std())
    root = float(np.sqrt(np.mean(difference**2)))
    with np.errstate(invalid="ignore"):
        relative = float(difference.max()) / max(float(np.abs(want).max()), 1e-30)
    of_spread = 0.0 if root == 0.0 else root / spread if spread > 0.0 else float("inf")
    return Agreement(precision, relative, of_spread, BOUNDS[precision], sizes)


def first_difference(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], written: Written, precision: str
) -> str | None:
    """The first layer that gives something else in the file than in the model, with both values; None where none is found."""
    if written.inside is None:
        return None
    seen: dict[str, list[np.ndarray]] = {}

    def watch(name: str) -> Any:
        return lambda module, given, y: seen.setdefault(name, []).append(first(y).detach().float().cpu().numpy())

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        answers(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    inside = written.inside(plain(kwargs or args))
    for name, calls in seen.items():  # in the order in which they ended
        got = inside.get(name)
        if got is None or len(calls) != 1 or got.shape != calls[0].shape:
            continue
        want = calls[0]
        difference = np.abs(want - got.astype(np.float32))
        scale = max(float(np.abs(want).max()), 1e-30) if precision == "float32" else max(float(want.std()), 1e-30)
        error = float(difference.max()) if precision == "float32" else float(np.sqrt(np.mean(difference**2)))
        if not error / scale <= BOUNDS[precision]:
            at = np.unravel_index(int(np.nanargmax(difference)), difference.shape)
            kind = type(model.get_submodule(name)).__name__
            return f"{name} ({kind}), which gives {float(want[at]):g} in the model and {float(got[at]):g} in the file"
    return None
