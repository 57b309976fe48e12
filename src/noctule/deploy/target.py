"""What a runtime offers: a file of its own kind, written with torch and opened without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noctule.core.errors import ExportError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

SEVEN_BITS = "activations of 7 bits"
"""What files say of which all quantised layers get such inputs: no processor's sums of products saturate."""

Ranges = Mapping[str, Sequence[float]]
"""Name of a layer -> the lowest and the highest number."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be written, and where."""

    model: nn.Module
    """A copy in evaluation mode, which may be changed; with int8 precision its layers are quantised."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: Path
    precision: str = "float32"
    ranges: Ranges = field(default_factory=dict)
    """Of the inputs of layers, with int8 precision."""
    outputs: Ranges = field(default_factory=dict)
    """Of the outputs of quantised layers."""


Batches = tuple[int, int | None]
"""The smallest and the largest batch that a file takes, None for any."""


@dataclass
class Written:
    """What a target says of the file that it wrote."""

    fell_back: list[str] = field(default_factory=list)
    """What runs in another way than asked for, and why."""
    batches: Batches = (1, None)
    inside: Callable[[Any], dict[str, np.ndarray]] | None = None
    """Inputs -> what each layer of the file gives, by the names of the model's modules."""


Run = Callable[[Any], "np.ndarray"]
"""Inputs, an array, a tuple, or a mapping from their names -> the first output."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A runtime that a model can be written for."""

    name: str
    suffix: str
    """Of the file, by which it is told apart."""
    precisions: tuple[str, ...]
    module: str
    """What `open` imports."""
    needs: str
    """The command that installs what `write` and `open` import."""
    write: Callable[[Job], Written]
    """Write the file at ``job.path``, and what belongs to it beside it."""
    open: Callable[[Path, int], Run]
    """A file and a number of threads -> a function that runs it."""


def needed(module: str, needs: str) -> Any:
    """A module of a library that need not be there.

    Raises:
        ExportError: it is not installed; the text has the command that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ExportError(f"{error.name or module} is not installed: {needs}") from error


def feed(inputs: Any, names: Sequence[str]) -> dict[str, Any]:
    """Inputs by the names that a file has for them."""
    if not isinstance(inputs, Mapping):
        inputs = dict(zip(names, inputs if isinstance(inputs, tuple) else (inputs,), strict=False))
    if missing := [name for name in names if name not in inputs]:
        raise ValueError(f"the file takes {', '.join(names)}: there is no {', '.join(missing)}")
    return {name: inputs[name] for name in names}
