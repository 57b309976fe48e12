"""What `fashion` and `memory` time and weigh in their processes: one and the same training with each kind of layer."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from noctule.core.convert import convert_
from noctule.core.method import attach
from noctule.data import Batches, Dataset
from noctule.measure import Footprint, footprint, measure
from noctule.measure.turns import Process, Unavailable
from noctule.models import mlp
from noctule.sparse.budget import erdos_renyi
from noctule.sparse.layers import FuseEpilogue, SparseLinear
from noctule.sparse.rewire import gse
from noctule_bench import contestants
from noctule_bench.contestants import Contestant
from noctule_bench.peers import index_bytes
from noctule_bench.recipe import Recipe, dataset_of, random_data

REWIRE_EVERY = 100
COMPILE_OPTIONS: dict[str, Any] = {"fallback_random": True}
"""Dropout as in eager mode: the random numbers that it would generate itself are slower on a CPU."""


@dataclass(frozen=True)
class Row:
    """A way to train."""

    name: str
    layer: Contestant
    fuse: bool = False
    """Bias, activation and dropout inside the sparse product."""
    rewire: bool = False
    """Guided rewiring (GSE) every 100 steps; the places stay where they are otherwise."""
    compiled: bool = False
    """Forward, loss and backward through `torch.compile`."""
    master: bool = True
    """Its weights are updated in float32."""

    @property
    def process(self) -> Process:
        """Where it works."""
        return self.layer.process


ROWS = {
    row.name: row
    for row in (
        Row("noctule", contestants.NOCTULE, fuse=True, rewire=True),
        Row("noctule, static", contestants.NOCTULE, fuse=True),
        Row("noctule, not fused", contestants.NOCTULE, rewire=True),
        Row("noctule bf16 autocast", contestants.NOCTULE_AUTOCAST, fuse=True, rewire=True),
        Row("dense fp32", contestants.LINEAR),
        Row("dense fp32 oneDNN", contestants.ONEDNN),
        Row("dense fp32 compiled", contestants.LINEAR, compiled=True),
        Row("dense bf16 autocast", contestants.AUTOCAST),
        Row("dense bf16 autocast compiled", contestants.AUTOCAST, compiled=True),
        Row("dense bf16 weights", contestants.BF16, master=False),
        Row("torch CSR", contestants.CSR),
        Row("torch CSR, own backward", contestants.CSR_OWN),
        Row("sparselab", contestants.SPARSELAB),
        Row("sparselab, passive waiting", contestants.SPARSELAB_PASSIVE),
        Row("sparseprop", contestants.SPARSEPROP),
    )
}


def build_chunk(row: Row, recipe: Recipe, steps: int) -> tuple[Callable[[], None], None]:
    """So many training steps, one after the other; the next call goes on where it stopped."""
    step = Training(row, recipe, dataset_of(recipe)).step

    def chunk() -> None:
        for _ in range(steps):
            step()

    return chunk, None


def weigh(row: Row, recipe: Recipe, steps: int) -> dict[str, Any]:
    """What a training holds after some steps, and the peak of the process's memory meanwhile; for a fresh process."""
    tiny = replace(recipe, widths=(16,) * len(recipe.widths), weights=16 * len(recipe.widths), samples=recipe.batch)
    warm = Training(row, tiny, random_data(tiny))
    for _ in range(2):  # so that the code of the libraries is in memory before
        warm.step()
    data = random_data(replace(recipe, samples=4 * recipe.batch))
    with measure() as cost:
        training = Training(row, recipe, data)
        for _ in range(steps):
            training.step()
    held = training.footprint()
    before, peak = cost.memory_before_bytes or 0, cost.peak_memory_bytes or 0
    return {
        **held.as_dict(),
        "memory_before_bytes": before,
        "peak_memory_bytes": peak,
        "peak_above_bytes": peak - before,
    }


class Training:
    """A model, its optimizer and its batches; all rows begin with the same function and the same batches."""

    def __init__(self, row: Row, recipe: Recipe, data: Dataset) -> None:
        """Make the model and compare what it computes with the sparse model it is made from.

        Raises:
            Unavailable: it computes something else.
        """
        self.row = row
        torch.manual_seed(0)
        model = _sparse_mlp(recipe)
        sample = data.inputs[: recipe.batch]
        with torch.no_grad():
            right = model.eval()(sample)
            for name, module in list(model.named_children()):
                if isinstance(module, SparseLinear):
                    setattr(model, name, row.layer.make(module))
            if row.fuse:
                convert_(model, FuseEpilogue())
            self.model = model
            with self._precision():
                found = model(sample.to(row.layer.dtype)).float()
        error = float((found - right).abs().max() / right.abs().max())
        if not error < row.layer.tolerance:
            raise Unavailable(f"wrong result: the output is off by {error:.1e} of its largest number")
        model.train()
        self._loss = torch.compile(self._plain_loss, options=COMPILE_OPTIONS) if row.compiled else self._plain_loss
        fused = not any(p.layout is torch.sparse_csr for p in model.parameters())  # torch has none for CSR
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, fused=fused
        )
        self._batches = forever(Batches(data, recipe.batch, seed=0, drop_last=True))
        if row.rewire:
            self._attached = ExitStack()
            self._attached.enter_context(attach(model, self.optimizer, gse(every=REWIRE_EVERY)))

    def step(self) -> Tensor:
        """Gather a batch, forward, loss, backward, update; the loss."""
        inputs, targets = next(self._batches)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(inputs, targets)
        loss.backward()
        self.optimizer.step()
        return loss

    def footprint(self) -> Footprint:
        """Bytes of weights, indices, gradients and optimizer state, the peers' too."""
        held = footprint(self.model, self.optimizer, all_gradients=True)
        more = sum(index_bytes(module) for module in self.model.modules())
        return Footprint(**{**vars(held), "index_bytes": held.index_bytes + more})

    def _plain_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with self._precision():
            if self.row.layer.dtype is not torch.float32:
                inputs = inputs.to(self.row.layer.dtype)
            return nn.functional.cross_entropy(self.model(inputs), targets)

    def _precision(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.row.layer.autocast else nullcontext()


def _sparse_mlp(recipe: Recipe) -> nn.Sequential:
    """The model that all the others are made from; nothing dense is made on the way."""
    shares = iter(erdos_renyi(recipe.shapes, recipe.weights))
    return mlp(
        *recipe.widths,
        dropout=recipe.dropout,
        linear=lambda features_in, features_out: SparseLinear(features_in, features_out, weights=next(shares)),
    )


def forever(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch after the other."""
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1
