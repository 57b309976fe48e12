"""Train apart on one set of weights: push gradients to a parameter server, pull its weights, and how far apart is up to you.

Dean et al. 2012, "Large scale distributed deep networks" (Downpour SGD), NIPS; Ho et al. 2013, "More effective distributed ML via a
stale synchronous parallel parameter server", NIPS.
Differs from the papers: gradients may be compressed, with error feedback; a bound of 0 averages the pushes of one clock.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from noctule.codecs import Codec
from noctule.codecs.exact import Exact
from noctule.errors import NonFiniteError
from noctule.exchange.compress import Compress
from noctule.exchange.handshake import described_places
from noctule.method import Method
from noctule.parallel.link import Links
from noctule.parallel.messages import to_bytes, to_tensor
from noctule.parallel.ticket import Ticket
from noctule.topology import Remap

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class PushPull(Method):
    """Between two pulls the worker goes on with its own optimizer; what all have together is the server's.

    When a session opens, the model takes the server's weights, which are worker 0's first ones where it has none. A push is the sum
    of the gradients since the last one; what the end of a session finds accrued is in `state_dict`, and `now` pushes it. With one
    worker that pushes and pulls at every step this is plain training with the server's optimizer, bit for bit. Buffers, such as the
    running statistics of batch norms, stay each worker's own.

    A push is applied once, also where it is sent again after a time-out or a restart of the server: the worker keeps its pushes
    until they are in a snapshot. One is lost only if its worker and the server both end before that; a worker that leaves makes the
    server write one.

    Args:
        server: the worker's ticket, from `noctule.parallel.wire.serve`.
        push_every: steps from one push to the next.
        pull_every: steps from one pull to the next; it overwrites what the worker's own optimizer did since the last push.
        bound: by how many pushes this worker may be ahead of the slowest: it waits after a push or before a pull until that is so.
            0 is synchronous: the server makes one step with the mean of everybody's pushes. None waits for nobody.
        warm_start: how many times worker 0 pushes before the others begin.
        codec: of the gradients, the same as the server's; what a biased one leaves out is pushed later.
        timeout_seconds: for any one answer.
        seed: of what the codec draws; each worker draws its own.

    >>> from functools import partial
    >>> from noctule import attach
    >>> from noctule.parallel.wire import serve
    >>> model = nn.Linear(3, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with serve(partial(torch.optim.Adagrad, lr=0.1)) as server:
    ...     with attach(model, optimizer, PushPull(server.ticket(0))):
    ...         model(torch.ones(1, 3)).sum().backward()
    ...         optimizer.step()
    ...     server.versions
    [1]
    """

    def __init__(
        self,
        server: Ticket,
        *,
        push_every: int = 1,
        pull_every: int = 1,
        bound: int | None = None,
        warm_start: int = 0,
        codec: Codec | None = None,
        timeout_seconds: float = 60.0,
        seed: int = 0,
    ) -> None:
        """Nothing is sent yet."""
        if push_every < 1 or pull_every < 1:
            raise ValueError(f"workers push and pull after at least one step, got {push_every} and {pull_every}")
        if warm_start < 0 or (bound is not None and bound < 0):
            raise ValueError(f"bound and warm_start are numbers of pushes, got {bound} and {warm_start}")
        self.server, self.push_every, self.pull_every = server, push_every, pull_every
        self.bound, self.warm_start, self.timeout_seconds, self.seed = bound, warm_start, timeout_seconds, seed
        self.codec = Exact() if codec is None else codec
        self.compress = Compress(self.codec)
        self.steps = 0
        self.accrued: dict[str, Tensor] = {}
        """The gradients since the last push."""

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Join, and take the server's weights.

        Raises:
            ExchangeError: a shard does not answer, or its model, codec or options are others.
            ValueError: a parameter is of a dtype that the server cannot hold.
        """
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, p in self.parameters.items():
            if p.dtype not in _FLOATS:
                raise ValueError(f"the server keeps float32, and {name!r} is {p.dtype}: use model.float()")
        self.dealt = deal({name: p.numel() for name, p in self.parameters.items()}, len(self.server.addresses))
        facts = {
            "shards": str(len(self.dealt)),
            "bound": str(self.bound),
            "warm_start": str(self.warm_start),
            "codec": str(self.codec),
            **{n: f"{str(p.dtype).removeprefix('torch.')} {tuple(p.shape)}" for n, p in self.parameters.items()},
            **described_places(model),
        }
        self.links = Links(
            self.server,
            facts=facts,
            seeds=[self._seed(names) if self.server.worker == 0 else None for names in self.dealt],
            timeout_seconds=self.timeout_seconds,
        )
        try:
            self._take()
        except BaseException:
            self.links.close()
            raise

    @property
    def staleness(self) -> Counter[int]:
        """How many pushes of this worker, to all shards, were how many pushes of others old."""
        return self.links.staleness

    def before_step(self) -> None:
        """Accrue the gradient.

        Raises:
            NonFiniteError: it is NaN or infinite; nothing is sent.
        """
        for name, p in self.parameters.items():
            if p.grad is not None:
                before, gradient = self.accrued.get(name), p.grad.detach().float()
                total = gradient.clone() if before is None else before + gradient
                if not bool(torch.isfinite(total).all()):
                    raise NonFiniteError(
                        f"the gradient of {name} is NaN or infinite, and is not pushed: lower the learning rate or clip"
                    )
                self.accrued[name] = total

    def after_step(self) -> None:
        """Push and pull, when it is time."""
        self.steps += 1
        pull = self.steps % self.pull_every == 0
        if self.steps % self.push_every == 0:
            self._give(pull=pull)
        if pull:
            self._take()

    def now(self) -> None:
        """Push and pull, whether it is time or not."""
        if self.accrued:
            self._give(pull=True)
        self._take()

    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """The server's weights cannot follow.

        Raises:
            ValueError: always, where the layer is trained.
        """
        if any(p in set(self.parameters.values()) for p in layer.parameters()):
            raise ValueError(
                "a layer changed its places or width, and the weights at the parameter server cannot follow: leave moving methods "
                "out of this session and move connections between sessions, with a server of a new folder for each; or "
                "train with EverySync or DiLoCo, which follow"
            )

    def end(self) -> None:
        """Leave: nobody waits for this worker any longer."""
        self.links.close()

    def state_dict(self) -> dict[str, Any]:
        """What is accrued and owed; the weights are the server's."""
        return {"steps": self.steps, "accrued": dict(self.accrued), "compress": self.compress.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, and the server's weights as they are now.

        Raises:
            ValueError: it is of another model.
        """
        found: dict[str, Tensor] = state["accrued"]
        if any(n not in self.parameters or x.shape != self.parameters[n].shape for n, x in found.items()):
            raise ValueError("this state is of a model with other parameters or shapes: load that of this model")
        self.accrued = {name: x.to(self.parameters[name].device) for name, x in found.items()}
        self.steps = int(state["steps"])
        self.compress.load_state_dict(state["compress"])
        self._take()

    def _seed(self, names: list[str]) -> tuple[dict[str, Any], list[bytes]]:
        """The first weights for one shard."""
        weights = {name: self.parameters[name].detach().float() for name in names}
        header = {
            "shapes": {name: list(x.shape) for name, x in weights.items()},
            "bound": self.bound,
            "warm_start": self.warm_start,
        }
        return header, [to_bytes(Exact().encode(x)) for x in weights.values()]

    def _give(self, *, pull: bool) -> None:
        """Push what is accrued; with a bound, go on only when that is allowed."""
        draws = (self.seed * 0x9E3779B97F4A7C15 + self.steps * 0xBF58476D1CE4E5B9 + self.server.worker) % 2**63
        generator = torch.Generator().manual_seed(draws)
        gradients = [
            {name: self._encode(name, generator) for name in names if name in self.accrued} for names in self.dealt
        ]
        self.accrued = {}
        self.links.push(gradients, pull=pull)
        if self.bound is not None:
            self.links.wait()

    def _encode(self, name: str, generator: torch.Generator) -> bytes:
        sent = self.compress.send(self.accrued[name], name)
        payload = self.codec.encode(sent, generator)
        self.compress.arrived(sent, self.codec.decode(payload), name)
        return to_bytes(payload)

    @torch.no_grad()
    def _take(self) -> None:
        """The server's weights; those that a push has just brought, or what it has now."""
        for names, frames in zip(self.dealt, self.links.pull(), strict=True):
            for name, frame in zip(names, frames, strict=True):
                p = self.parameters[name]
                p.copy_(to_tensor(Exact(), frame, p.shape, name))


def deal(sizes: Mapping[str, int], shards: int) -> list[list[str]]:
    """Which parameters each shard keeps: the largest first, each to the shard with the fewest numbers; the same everywhere.

    Raises:
        ValueError: a shard would have none.

    >>> deal({"a": 10, "b": 6, "c": 5}, 2)
    [['a'], ['b', 'c']]
    """
    if not 1 <= shards <= len(sizes):
        raise ValueError(f"{len(sizes)} parameters cannot be dealt to {shards} shards: each must have one")
    dealt: list[list[str]] = [[] for _ in range(shards)]
    loads = [0] * shards
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = min(range(shards), key=lambda shard: (loads[shard], len(dealt[shard])))
        dealt[least].append(name)
        loads[least] += sizes[name]
    return dealt
