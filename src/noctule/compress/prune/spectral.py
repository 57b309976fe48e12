"""Neurons go so that the rest lies in a flatter region: by the spectral radius of the Hessian, while training.

Ebrahimi, Klabjan 2023 (IJCNN), "Neuron-based Pruning of Deep Neural Networks with Better Generalization using Kronecker Factored
Curvature Approximation", arXiv 2111.08577, of which no code is public. The Hessian of a layer is taken for A (x) G, A the second
moment of its inputs and G that of its output gradients, whose radius is that of A times that of G. Differs from the paper: what
a neuron's going does to the radii is read off one eigenvector (power iteration, then Rayleigh's quotient without the neuron);
the neurons go whose first-order change of the loss is smallest for it, a fraction of each layer at a time; `shrink` removes
them for good. The mean share is added to each neuron's, so that a neuron which gives nothing goes too.

Shapes: B batch, I in, O out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.compress.shrink import shrink
from noctule.compress.shrink.readers import Paths, Reader, find_readers
from noctule.core.method import Method
from noctule.core.remap import Remap


class SpectralPruning(Method):
    """Every so many steps, removes the neurons of dense hidden layers that add most curvature for the least change of the loss.

    Layers are `nn.Linear` and read by one; others keep their neurons, and `left` says why.

    Args:
        every: steps from one removal to the next.
        until: no removal after this step (None: to the end).
        fraction: of the neurons of each layer that go each time, in (0, 1).
        window: steps before each removal of which the curvature is the mean.
        least: so many neurons stay in every layer.
        skip: names of layers that are left alone.
        paths: which layer reads which, where that is decided in a forward; see `shrink`.
    """

    def __init__(
        self,
        *,
        every: int,
        until: int | None = None,
        fraction: float = 0.2,
        window: int = 20,
        least: int = 1,
        skip: Sequence[str] = (),
        paths: Paths | None = None,
    ) -> None:
        if min(every, window, least) < 1 or window > every:
            raise ValueError(f"needs 1 <= window <= every and least >= 1, got {window}, {every} and {least}")
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"fraction must lie above 0 and below 1, got {fraction}")
        self.every, self.until, self.fraction, self.window, self.least = every, until, fraction, window, least
        self.skip, self.paths = tuple(skip), dict(paths or {})
        self.steps = 0
        self.removed: dict[str, int] = {}
        """Neurons removed, by layer."""
        self.left: dict[str, str] = {}
        """Why other layers keep theirs."""
        self._sums: dict[str, Tensor] = {}  # "name.inputs" (I, I), "name.gradients" (O, O), "name.loss" (O,)
        self._readers: dict[str, Reader] = {}
        self._handles: list[Any] = []
        self._model: nn.Module | None = None

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Find the hidden layers, whose passes are looked at from now on in the steps that need it."""
        readers, self.left = find_readers(model, self.paths)
        if unknown := {*self.skip} - {*readers, *self.left}:
            raise ValueError(f"skip names no layer with neurons: {sorted(unknown)}")
        self._readers = {}
        for name, reader in readers.items():
            layers = (model.get_submodule(name), reader.layer)
            if name in self.skip or not all(type(layer) is nn.Linear for layer in layers) or reader.columns != 1:
                self.left[name] = "skip= names it" if name in self.skip else "it or its reader is not a plain nn.Linear"
            elif reader.layer.bias is None:
                self.left[name] = f"{reader.name}, which reads it, has no bias to take what a removed neuron gives"
            else:
                self._readers[name] = reader
        if not self._readers:
            raise ValueError(f"there is no hidden linear layer to prune: {self.left}")
        self._model, self.removed = model, {name: self.removed.get(name, 0) for name in self._readers}
        for name in dict.fromkeys(n for own, reader in self._readers.items() for n in (own, reader.name)):
            self._handles.append(model.get_submodule(name).register_forward_hook(self._watch(name)))

    @property
    def _armed(self) -> bool:
        """Whether the coming step is one before a removal."""
        due = -(-(self.steps + 1) // self.every) * self.every
        return due - self.steps <= self.window and (self.until is None or due <= self.until)

    def _watch(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self._armed and layer.training and output.requires_grad:
                x_BI = inputs[0].detach().flatten(0, -2)
                self._add(f"{name}.inputs", x_BI.T @ x_BI / x_BI.shape[0])
                output.register_hook(lambda gradient: seen(gradient.flatten(0, -2)))

        def seen(dy_BO: Tensor) -> None:
            self._add(f"{name}.gradients", dy_BO.T @ dy_BO * dy_BO.shape[0])

        return hook

    def _add(self, key: str, x: Tensor) -> None:
        self._sums[key] = self._sums[key] + x if key in self._sums else x

    @torch.no_grad()
    @override
    def before_step(self) -> None:
        for name, reader in self._readers.items() if self._armed else ():
            weight: Any = reader.layer.weight
            if (
                weight.grad is not None
            ):  # sum of activation times its gradient = sum of outgoing weight times its gradient
                self._add(f"{name}.loss", (weight * weight.grad).sum(0).abs())

    @override
    def after_step(self) -> None:
        due = self._armed and (self.steps + 1) % self.every == 0
        self.steps += 1
        if due:
            keep = {name: self._kept(name, r.name) for name, r in self._readers.items() if f"{name}.loss" in self._sums}
            self._sums = {}
            assert self._model is not None
            for name, count in shrink(self._model, keep, paths=self.paths).items():
                self.removed[name] += count

    def _kept(self, name: str, reader: str) -> Tensor:
        """The numbers of the neurons that stay."""
        flatter = drop_of_radius(self._sums[f"{name}.gradients"]) + drop_of_radius(self._sums[f"{reader}.inputs"])
        worth = self._sums[f"{name}.loss"].double() / (flatter + flatter.mean().clamp(min=1e-12))
        going = max(0, min(int(worth.numel() * self.fraction), worth.numel() - self.least))
        return worth.argsort(stable=True)[going:]

    @override
    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        self._sums = {}  # of other widths: the window begins anew

    @override
    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._readers, self._model = [], {}, None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Steps, neurons removed and the curvature of an unfinished window."""
        return {"steps": self.steps, "removed": dict(self.removed), "sums": dict(self._sums)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.removed = int(state["steps"]), {**dict.fromkeys(self.removed, 0), **state["removed"]}
        self._sums = {key: x.clone() for key, x in state["sums"].items()}


def drop_of_radius(moment: Tensor, iterations: int = 30) -> Tensor:
    """By which share the largest eigenvalue of a second moment (N, N) falls where a row and its column go, (N,), to first order.

    >>> drop_of_radius(torch.diag(torch.tensor([1.0, 4.0]))).round(decimals=3)
    tensor([0., 1.], dtype=torch.float64)
    """
    matrix = moment.double()
    u = matrix.new_ones(matrix.shape[0])
    for _ in range(iterations):
        u = matrix @ u
        u = u / u.norm().clamp(min=1e-300)
    radius, share = u @ matrix @ u, u * u
    without = (radius * (1 - 2 * share) + matrix.diag() * share) / (1 - share).clamp(min=1e-12)
    return (1 - without.clamp(min=0.0) / radius.clamp(min=1e-300)).clamp(min=0.0)
