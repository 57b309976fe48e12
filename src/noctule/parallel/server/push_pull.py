"""Train apart on one set of weights: push gradients to a parameter server, pull its weights, and how far apart is up to you.

Dean et al. 2012, "Large scale distributed deep networks" (Downpour SGD), NIPS; Ho et al. 2013, "More effective distributed ML via a
stale synchronous parallel parameter server", NIPS.
Differs from the papers: gradients may be compressed, with error feedback; bound 0 averages the pushes of one clock; a layer's
connections may move.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from noctule.codecs import Codec
from noctule.core.errors import NonFiniteError
from noctule.core.exact import Exact
from noctule.core.finite import all_finite
from noctule.core.method import Method
from noctule.core.remap import Remap
from noctule.core.topology import Topology
from noctule.exchange.compress import Compress
from noctule.parallel.server.client import Links
from noctule.parallel.server.deal import deal
from noctule.parallel.server.follower import Followed
from noctule.transport.messages import field, to_bytes, to_tensor
from noctule.transport.ticket import Ticket

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class PushPull(Method):
    """Between two pulls the worker goes on with its own optimizer; what all have together is the server's.

    When a session opens, the model takes the server's weights, which are worker 0's first ones where it has none. A push is the sum
    of the gradients since the last one; what the end of a session finds accrued is in `state_dict`, and `now` pushes it. With one
    worker that pushes and pulls at every step this is plain training with the server's optimizer, bit for bit. Buffers, such as the
    running statistics of batch norms, stay each worker's own.

    Worker 0, and no other, may move connections: give its session a `Rewire` before this method. The server and the other workers
    follow, each at its next pull; what they push for connections that are gone is left out.

    A push is applied once, also where it is sent again after a time-out or a restart of the server: the worker keeps its pushes
    until they are in a snapshot. One is lost only if its worker and the server both end before that; a worker that leaves makes the
    server write one.

    Args:
        server: the worker's ticket, from `noctule.parallel.server.listen.serve`.
        push_every: steps from one push to the next.
        pull_every: steps from one pull to the next; it overwrites what the worker's own optimizer did since the last push.
        overlap: take the answer to a push with the next one, so that nobody waits for the link. What others did comes one push
            later; what the worker's own optimizer did meanwhile is kept on top of it, so make it like the server's.
        bound: by how many pushes this worker may be ahead of the slowest: it waits after a push or before a pull until that is so.
            0 is synchronous: the server makes one step with the mean of everybody's pushes. None waits for nobody.
        warm_start: how many times worker 0 pushes before the others begin; they begin sooner if it leaves or falls silent.
        codec: of the gradients, the same as the server's; what a biased one leaves out is pushed later.
        timeout_seconds: for any one answer.
        weigh: says at each step how much this worker's gradient counts beside the others', 1 on average; None for 1. With bound 0
            and batches of unequal size, its samples times the workers over everybody's samples makes all of them one worker.
        seed: of what the codec draws; each worker draws its own.

    >>> from functools import partial
    >>> from noctule import attach
    >>> from noctule.parallel.server.listen import serve
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
        overlap: bool = False,
        bound: int | None = None,
        warm_start: int = 0,
        codec: Codec | None = None,
        timeout_seconds: float = 60.0,
        weigh: Callable[[], float] | None = None,
        seed: int = 0,
    ) -> None:
        """Nothing is sent yet."""
        if push_every < 1 or pull_every < 1:
            raise ValueError(f"workers push and pull after at least one step, got {push_every} and {pull_every}")
        if warm_start < 0 or (bound is not None and bound < 0):
            raise ValueError(f"bound and warm_start are numbers of pushes, got {bound} and {warm_start}")
        if overlap and (bound is not None or push_every != pull_every):
            raise ValueError(
                f"with overlap every push brings weights and no worker waits, got push_every={push_every}, pull_every={pull_every} "
                f"and bound={bound}: make the first two alike and leave the bound out, or leave overlap out"
            )
        self.server, self.push_every, self.pull_every, self.overlap = server, push_every, pull_every, overlap
        self.bound, self.warm_start, self.timeout_seconds, self.seed = bound, warm_start, timeout_seconds, seed
        self.weigh, self.codec = weigh, Exact() if codec is None else codec
        self.compress = Compress(self.codec)
        self.steps = 0
        self.accrued: dict[str, Tensor] = {}
        """The gradients since the last push."""
        self._since: dict[str, Tensor] = {}
        """The weights here at the push whose answer is still to be taken."""
        self._places: dict[str, Topology] = {}  # of them and of what is owed, today's of each layer

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
        with ExitStack() as undo:
            self.followed = Followed(model, self._carry)
            undo.callback(self.followed.close)
            self._lay(self._places)
            self._places = {name: layer.topology for name, layer in self.followed.layers.items()}
            seeds = [self._seed(names) if self.server.worker == 0 else None for names in self.dealt]
            self.links = Links(self.server, facts=self._facts(), seeds=seeds, timeout_seconds=self.timeout_seconds)
            undo.callback(self.links.close)
            self._take()
            undo.pop_all()

    @property
    def staleness(self) -> Counter[int]:
        """How many pushes of this worker, to all shards, were how many pushes of others old; none before a session opens."""
        return self.links.staleness if hasattr(self, "links") else Counter()

    def before_step(self) -> None:
        """Accrue the gradient.

        Raises:
            NonFiniteError: it is NaN or infinite; nothing is sent.
            ValueError: connections have moved here, and this is not worker 0; or what it counts is no weight.
        """
        self._tell()
        given = {name: p.grad.detach() for name, p in self.parameters.items() if p.grad is not None}
        for name, x in given.items():
            if not all_finite(x):
                raise NonFiniteError(
                    f"the gradient of {name} is NaN or infinite, and is not pushed: lower the learning rate or clip"
                )
        factor = 1.0 if self.weigh is None else self.weigh()
        if not 0.0 <= factor < float("inf"):
            raise ValueError(f"what a gradient counts is at least 0 and finite, got {factor} from {self.weigh!r}")
        known = [name for name in given if name in self.accrued]
        if known:  # in place and in one call: small networks spend more on memory and Python than on adding
            sums, more = [self.accrued[name] for name in known], [given.pop(name) for name in known]
            torch._foreach_add_(sums, more, alpha=factor)  # pyright: ignore[reportPrivateImportUsage] as torch.optim does
        for name, x in given.items():
            first = x.to(torch.float32, copy=True)
            self.accrued[name] = first if factor == 1.0 else first.mul_(factor)

    def after_step(self) -> None:
        """Push and pull, when it is time."""
        self._tell()
        self.steps += 1
        pull = self.steps % self.pull_every == 0
        if pull and self._since:
            self._take()
        if self.steps % self.push_every == 0:
            self._give(pull=pull)
        if pull and self.overlap:
            self._since = {name: p.detach().clone() for name, p in self.parameters.items()}
        elif pull:
            self._take()

    def now(self) -> None:
        """Push and pull, whether it is time or not."""
        self._tell()
        self._leave_answer()
        if self.accrued:
            self._give(pull=True)
        self._take()

    def settle(self) -> None:
        """Push what is accrued and pull, where it is not just done."""
        if self.accrued or self._since or self.steps % self.pull_every:
            self.now()

    def fetch(self, key: str) -> dict[str, Tensor]:
        """Push what is accrued, take the server's weights, and return what its optimizer keeps under a key, by parameter."""
        self._tell()
        self._leave_answer()
        if self.accrued:
            self._give(pull=False)
        return self._take(kept=key)

    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """What is kept for a sparse layer has followed.

        Raises:
            ValueError: another layer that is trained has changed its width, which the server cannot follow.
        """
        trained = {*self.parameters.values()}
        if layer not in self.followed.layers.values() and not trained.isdisjoint(layer.parameters()):
            raise ValueError(
                "a layer changed its width, and the weights at the parameter server cannot follow: remove neurons between "
                "sessions, with a server of a new folder for each, or train with EverySync or DiLoCo, which follow"
            )

    def end(self) -> None:
        """Leave: nobody waits for this worker any longer."""
        try:
            if self.server.worker == 0 and not self.links.failed:
                self._tell()
        finally:
            self.followed.close()
            self.links.close()

    def state_dict(self) -> dict[str, Any]:
        """What is accrued and owed, and of which connections it is; the weights are the server's."""
        if self.server.worker == 0 and not self.links.failed:
            self._tell()  # or what has moved would be lost with this worker
        places = {name: topology.state_dict() for name, topology in self._places.items()}
        accrued = {name: x.clone() for name, x in self.accrued.items()}
        kept = {"accrued": accrued, "compress": self.compress.state_dict()}
        return {"steps": self.steps, "places": places, **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, and the server's weights and connections as they are now.

        Raises:
            ValueError: it is of another model.
        """
        found: dict[str, Tensor] = state["accrued"]
        if any(n not in self.parameters or x.shape != self.parameters[n].shape for n, x in found.items()):
            raise ValueError("this state is of a model with other parameters or shapes: load that of this model")
        self._leave_answer()
        self.followed.go_back()
        self.accrued = {name: x.to(self.parameters[name].device, copy=True) for name, x in found.items()}
        self.steps = int(state["steps"])
        self.compress.load_state_dict(state["compress"])
        self._lay({name: Topology.from_state_dict(places) for name, places in state["places"].items()})
        self._take()

    def _lay(self, places: Mapping[str, Topology]) -> None:
        """What is accrued and owed for these places goes to the slots of today's."""
        for name, layer in self.followed.layers.items():
            if name in places and places[name] != layer.topology:
                self._carry(name, Remap.between(places[name].to(layer.topology.device), layer.topology))

    def _carry(self, name: str, remap: Remap) -> None:
        """What is accrued and owed follows its connections; those that are new have not changed since."""
        self._places[name] = self.followed.layers[name].topology
        if name in self.accrued:
            self.accrued[name] = remap.apply(self.accrued[name])
        if name in self._since:
            self._since[name] = remap.apply(self._since[name], new=self.parameters[name].detach())
        self.compress.remapped(name, remap, (remap.new_size,))

    def _tell(self) -> None:
        """Tell the server what has moved here."""
        elsewhere = self.followed.elsewhere()
        if elsewhere and self.server.worker != 0:
            raise ValueError(
                f"the connections of {', '.join(elsewhere)} have moved at worker {self.server.worker}, and only worker 0 moves "
                "them while all push to one server: leave Rewire out of this worker's session, it follows worker 0's"
            )
        if elsewhere:
            moves = self.followed.tell(elsewhere, self.dealt)
            self.links.move(moves)  # whose answer takes the place of one with weights

    def _facts(self) -> dict[str, str]:
        """What all workers must have alike."""
        options = {"shards": len(self.dealt), "bound": self.bound, "warm_start": self.warm_start, "codec": self.codec}
        shapes = {n: f"{str(p.dtype).removeprefix('torch.')} {tuple(p.shape)}" for n, p in self.parameters.items()}
        return {name: str(fact) for name, fact in options.items()} | shapes | self.followed.facts()

    def _seed(self, names: list[str]) -> tuple[dict[str, Any], list[bytes]]:
        """The first weights for one shard."""
        weights = {name: self.parameters[name].detach().float() for name in names}
        matrices, places = self.followed.seed(names)
        header = {
            "places": matrices,
            "shapes": {name: list(x.shape) for name, x in weights.items()},
            "bound": self.bound,
            "warm_start": self.warm_start,
        }
        return header, [*(to_bytes(Exact().encode(x)) for x in weights.values()), *places]

    def _give(self, *, pull: bool) -> None:
        """Push what is accrued; with a bound, go on only when that is allowed."""
        draws = (self.seed * 0x9E3779B97F4A7C15 + self.steps * 0xBF58476D1CE4E5B9 + self.server.worker) % 2**63
        generator = torch.Generator().manual_seed(draws)
        gradients = [
            {name: self._encode(name, generator) for name in names if name in self.accrued} for names in self.dealt
        ]
        self.accrued = {}
        self.links.push(gradients, pull=pull, versions=self._versions())
        if self.bound is not None:
            self.links.wait()

    def _encode(self, name: str, generator: torch.Generator) -> bytes:
        sent = self.compress.send(self.accrued[name], name)
        payload = self.codec.encode(sent, generator)
        self.compress.arrived(sent, self.codec.decode(payload), name)
        return to_bytes(payload)

    def _leave_answer(self) -> None:
        """What comes now is newer."""
        if self._since:
            self.links.forget()
            self._since = {}

    def _versions(self) -> list[dict[str, int]]:
        """Of the connections here, for each shard."""
        return [self.followed.versions(names) for names in self.dealt]

    @torch.no_grad()
    def _take(self, *, kept: str = "") -> dict[str, Tensor]:
        """The server's connections and weights, those that a push has brought or what it has now, and what was done here since.

        Returns what its optimizer keeps under a key, by parameter.
        """
        found: dict[str, Tensor] = {}
        for names, (header, frames) in zip(self.dealt, self.links.pull(self._versions(), kept=kept), strict=True):
            brought = field(header, "kept", list, default=[])
            first, last = len(names), len(frames) - len(brought)
            self.followed.take(header, frames[first:last])
            for name, frame in zip(names, frames[:first], strict=True):
                p = self.parameters[name]
                weights = to_tensor(Exact(), frame, p.shape, name)
                p.copy_(weights + (p - self._since[name]) if name in self._since else weights)
            for name, frame in zip(brought, frames[last:], strict=True):
                found[name] = to_tensor(Exact(), frame, self.parameters[name].shape, name)
        self._since = {}
        return found
