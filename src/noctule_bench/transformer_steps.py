"""What `transformer` times and takes apart in its processes: one training step of a character transformer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from noctule import kernels
from noctule.core.convert import convert_
from noctule.core.optim import param_groups
from noctule.data import Batches, read_text
from noctule.measure.turns import Process, Unavailable
from noctule.models import Transformer
from noctule.sparse.layers import FuseEpilogue, ToDense, ToSparse
from noctule_bench.training import forever

HEAD = 64
"""Features of a head."""

KINDS = {
    "sparse products": ("noctule.spmm", "noctule.gradients"),
    "dense products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "transposes and copies": ("noctule.feature_major", "aten::copy_"),
    "attention": ("aten::_scaled_dot_product",),
    "layer norm": ("aten::native_layer_norm",),
    "optimizer": ("aten::_fused_adamw_",),
}
"""Kind of work -> how its events' names begin; what is none of these is elementwise and the rest."""
REST = "elementwise and rest"


@dataclass(frozen=True)
class Case:
    """A transformer and its batch."""

    width: int
    depth: int
    batch: int
    context: int
    density: float
    text: str | None
    """A file, or what comes with Python."""


@dataclass(frozen=True)
class Row:
    """A way to train it."""

    name: str
    dense: bool = False
    autocast: bool = False
    """Its products run in bfloat16, its parameters stay in float32."""

    @property
    def process(self) -> Process:
        """Noctule's and torch's rows work apart."""
        return Process("torch" if self.dense else "noctule")


ROWS = {
    row.name: row
    for row in (
        Row("noctule"),
        Row("noctule bf16 autocast", autocast=True),
        Row("dense fp32", dense=True),
        Row("dense bf16 autocast", dense=True, autocast=True),
    )
}


def build(row: Row, case: Case) -> tuple[Callable[[], Tensor], None]:
    """A training step, each on the next batch.

    Raises:
        Unavailable: the model computes something else than the sparse one that all rows are made from.
    """
    text = read_text(case.text, context=case.context)
    torch.manual_seed(0)
    model: nn.Module = Transformer(
        len(text.vocabulary), width=case.width, depth=case.depth, heads=max(1, case.width // HEAD)
    )
    convert_(convert_(model, ToSparse(density=case.density)).model, FuseEpilogue())
    batches = forever(Batches(text.train, case.batch, seed=0, drop_last=True))
    numbers, _ = next(batches)
    with torch.no_grad():
        right = model(numbers)
        if row.dense:
            convert_(model, ToDense())
        with _precision(row):
            found = model(numbers).float()
    error = float((found - right).abs().max() / right.abs().max())
    if not error < (0.05 if row.autocast else 1e-4):
        raise Unavailable(f"wrong result: the logits are off by {error:.1e} of the largest")
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.01), lr=1e-4, fused=True)

    def step() -> Tensor:
        inputs, targets = next(batches)
        optimizer.zero_grad(set_to_none=True)
        with _precision(row):
            loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss

    return step, None


def take_apart(row: Row, case: Case, steps: int) -> dict[str, float]:
    """Milliseconds of a step by the kind of work, the largest first."""
    step, _ = build(row, case)
    step()
    with _named_kernels(), profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    taken = dict.fromkeys([*KINDS, REST], 0.0)
    for event in found.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), REST)
        taken[kind] += event.self_cpu_time_total / 1e3 / steps
    return {kind: taken[kind] for kind in sorted(taken, key=lambda kind: -taken[kind])}


@contextmanager
def _named_kernels() -> Iterator[None]:
    """The profiler sees torch's own operators only: have it see the kernels too."""
    names = ("spmm", "spmm_t", "gradients", "feature_major")
    before: dict[str, Callable[..., Any]] = {name: getattr(kernels, name) for name in names}

    def named(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"noctule.{name}"):
                return before[name](*args, **kwargs)

        return call

    try:
        for name in names:
            setattr(kernels, name, named(name))
        yield
    finally:
        for name, function in before.items():
            setattr(kernels, name, function)


def _precision(row: Row) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if row.autocast else nullcontext()
