"""Merge the networks of several workers: the mean of each connection over the workers that have it, of which the largest stay.

The merge of WASAP-SGD (Curci, Mocanu and Pechenizkiy 2021, arXiv 2102.01732). Differs from the authors' code: the sum of a
connection's weights is divided by the number of workers that have it, not by that of all, which shrinks what one of them found;
optimizer state is merged too; as many connections stay as each worker had, where the code cuts at a quantile of each sign.

Shapes: N weights of a layer, K connections that any worker has.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.core.errors import ExchangeError
from noctule.core.exchange import Exchange
from noctule.core.method import Method
from noctule.core.optim import sparse_layers
from noctule.core.remap import Remap, merge
from noctule.core.topology import Topology


@torch.no_grad()
def merge_workers(model: nn.Module, optimizers: Optimizer | Iterable[Optimizer], exchange: Exchange) -> None:
    """Merge the workers' models: the same places, weights, buffers and optimizer state on all, bit for bit; all must call it.

    A connection's weight, and what optimizers keep for it, is the mean over the workers that have it; in each layer as many
    connections stay as it had, the largest. Dense parameters, biases, buffers and their state become plain means; counters, such
    as steps, the largest. Frozen parameters are left alone.

    Nothing is changed before all workers have confirmed that they received everything: a merge that fails until then can be
    repeated.

    Raises:
        ExchangeError: the workers' models or optimizers differ in more than numbers and places, or a worker was lost.
        ValueError: what keeps state for a sparse layer cannot follow its places.
    """
    several = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)
    layers = {f"{name}.values" if name else "values": layer for name, layer in sparse_layers(model).items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: f"{x.dtype} {tuple(x.shape)}" for name, x in model.named_buffers()}
    _agree(exchange, {name: _described(name, p, several, layers) for name, p in trained.items()} | buffers)
    sparse = [_merged_layer(layer, several, exchange, name) for name, layer in layers.items() if name in trained]
    dense = [x for name, p in trained.items() if name not in layers for x in (p, *_state(several, p).values())]
    floats = [*dense, *(x for x in model.buffers() if x.is_floating_point())]
    counts = [x for p in trained.values() for x in _counters(several, p)]
    whole = [*counts, *(x for x in model.buffers() if not x.is_floating_point())]
    merged = [*_means(floats, exchange), *_largest_counts(whole, exchange)]
    exchange.share(b"")  # all have received all: numbers changed before would be merged once more after a loss
    for x, new in zip([*floats, *whole], merged, strict=True):
        x.copy_(new)
    for layer, topology, means in sparse:
        if topology is not layer.topology:
            layer.remap_(topology, Remap.between(layer.topology, topology))
        for x, mean in zip([layer.values, *_state(several, layer.values).values()], means, strict=True):
            x.copy_(mean)


class Merge(Method):
    """Merges the workers' networks by `merge_workers` every so many steps; meanwhile each trains and moves connections alone.

    Give it to `attach` before a `Rewire`: connections that move after the same step have then moved when networks are merged.

    Args:
        exchange: between the workers, such as a `Channel`.
        every: the number of steps from one merge to the next; None merges whenever the session settles, as `fit` does before it
            validates.

    >>> from noctule.exchange import Channel, Local
    >>> method = Merge(Channel(path=Local.together(1)[0]), every=1000)
    """

    def __init__(self, exchange: Exchange, *, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"networks are merged after at least one step, got every={every}")
        self.exchange, self.every = exchange, every
        self.steps = 0
        """The number of steps since the last merge."""

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.model, self.optimizers = model, optimizers

    @override
    def after_step(self) -> None:
        self.steps += 1
        if self.every is not None and self.steps >= self.every:
            self.now()

    @override
    def settle(self) -> None:
        """Merge, if ``every`` is None or a merge that was due has failed."""
        if self.steps >= (self.every or 1):
            self.now()

    def now(self) -> None:
        """Merge, whether it is due or not; all workers must call it."""
        merge_workers(self.model, self.optimizers, self.exchange)
        self.steps = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "exchange": self.exchange.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.exchange.load_state_dict(state["exchange"])


def largest(topology: Topology, values: Tensor, count: int) -> tuple[Topology, Tensor]:
    """The places (N,) of the largest of K values, and their indices among the K; of equal values the first.

    >>> places = Topology.from_keys((1, 4), torch.arange(4))
    >>> largest(places, torch.tensor([1.0, -3.0, 2.0, 1.0]), 3)[1].tolist()
    [0, 1, 2]
    """
    kept = values.abs().argsort(descending=True, stable=True)[:count].sort().values
    return Topology.from_keys(topology.shape, topology.keys()[kept]), kept


def _merged_layer(
    layer: Any, optimizers: Sequence[Optimizer], exchange: Exchange, name: str
) -> tuple[Any, Topology, list[Tensor]]:
    """A sparse layer, still unchanged, with its merged places and the values and state there."""
    old, p = layer.topology, layer.values
    mine = {"": p, **_state(optimizers, p)}
    arrived = _share(exchange, [old.keys(), *mine.values()], name)
    places = [Topology.from_keys(old.shape, _checked(keys, old, name)) for keys, *_ in arrived]
    united, means = old, []
    for several in zip(*(tensors for _, *tensors in arrived), strict=True):
        united, mean = merge(places, [x.double() for x in several])
        means.append(mean)
    topology, kept = largest(united, means[0], old.size)
    topology = old if topology == old else topology.to(old.device)
    if topology is not old:
        layer.check_remap(topology, Remap.between(old, topology))
    return layer, topology, [mean[kept].to(x.dtype) for x, mean in zip(mine.values(), means, strict=True)]


def _means(tensors: Sequence[Tensor], exchange: Exchange) -> list[Tensor]:
    """The mean of each tensor over all workers."""
    arrived = zip(tensors, *_share(exchange, tensors, "dense parameters"), strict=True)
    return [torch.stack([each.double() for each in several]).mean(0).to(x.dtype) for x, *several in arrived]


def _largest_counts(counters: Sequence[Tensor], exchange: Exchange) -> list[Tensor]:
    """The largest of each counter over all workers."""
    return [torch.stack(several).amax(0) for several in zip(*_share(exchange, counters, "counters"), strict=True)]


def _state(optimizers: Sequence[Optimizer], p: Tensor) -> dict[str, Tensor]:
    """The optimizer state that has a number for each weight of a parameter."""
    return {key: x for key, x in _kept(optimizers, p) if x.shape == p.shape and not key.endswith(".step")}


def _counters(optimizers: Sequence[Optimizer], p: Tensor) -> list[Tensor]:
    """The other tensors in a parameter's optimizer state, such as step counters."""
    state = _state(optimizers, p)
    return [x for key, x in _kept(optimizers, p) if key not in state]


def _kept(optimizers: Sequence[Optimizer], p: Tensor) -> list[tuple[str, Tensor]]:
    return [
        (f"{place}.{key}", x)
        for place, optimizer in enumerate(optimizers)
        for key, x in sorted(optimizer.state.get(p, {}).items())
        if isinstance(x, Tensor)
    ]


def _described(name: str, p: Tensor, optimizers: Sequence[Optimizer], layers: Mapping[str, Any]) -> str:
    """A line on a parameter and its optimizer state that must be equal on all workers."""
    matrix = f" of {layers[name].topology.shape}" if name in layers else ""
    state = [f"{key} {x.dtype} {tuple(x.shape)}" for key, x in _kept(optimizers, p)]
    return f"{p.dtype} {tuple(p.shape)}{matrix} with {', '.join(state) or 'no state'}".replace("torch.", "")


def _agree(exchange: Exchange, mine: Mapping[str, str]) -> None:
    for worker, message in enumerate(exchange.share(json.dumps(mine).encode())):
        try:
            other = dict(json.loads(message))
        except (ValueError, TypeError) as error:
            raise ExchangeError(f"worker {worker} sent a message that is not a handshake: {error}") from error
        for name in [*mine, *other]:
            if mine.get(name) != other.get(name):
                raise ExchangeError(
                    f"worker {worker} differs in {name!r}: {other.get(name, 'not there')}, and here it is "
                    f"{mine.get(name, 'not there')}. Networks that are merged must be made in the same way, with as many "
                    "connections in each layer, and their optimizers too"
                )


def _share(exchange: Exchange, tensors: Sequence[Tensor], name: str) -> list[list[Tensor]]:
    """The tensors of every worker, in the shapes that they have here, on the CPU."""
    messages = exchange.share(to_bytes(tensors))
    return [from_bytes(message, tensors, worker, repr(name)) for worker, message in enumerate(messages)]


def to_bytes(tensors: Iterable[Tensor]) -> bytes:
    """The numbers of tensors, one after the other."""
    flat = (x.detach().cpu().contiguous().flatten() for x in tensors)
    return b"".join(x.view(torch.uint8).numpy().tobytes() for x in flat)


def from_bytes(message: bytes, likes: Sequence[Tensor], worker: int, of: str) -> list[Tensor]:
    """Tensors of these shapes and dtypes, on the CPU.

    Raises:
        ExchangeError: there are more or fewer bytes.
    """
    if len(message) != sum(x.nbytes for x in likes):
        raise ExchangeError(
            f"worker {worker} sent {len(message)} bytes for {of}, where {sum(x.nbytes for x in likes)} are needed: "
            "do all merge at once?"
        )
    wire, at, read = torch.frombuffer(bytearray(message + b"\0"), dtype=torch.uint8), 0, list[Tensor]()
    for x in likes:  # frombuffer takes no empty one
        read.append(wire[at : at + x.nbytes].clone().view(x.dtype).view(x.shape))
        at += x.nbytes
    return read


def _checked(keys: Tensor, topology: Topology, name: str) -> Tensor:
    if keys.numel() and (int(keys[0]) < 0 or int(keys[-1]) >= topology.places or bool((keys.diff() <= 0).any())):
        raise ExchangeError(f"a worker sent connections of {name!r} that are not sorted places of it")
    return keys
