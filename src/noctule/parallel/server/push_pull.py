"""Push gradients to a parameter server and pull its weights, synchronously or with bounded or unbounded staleness.

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
from typing_extensions import override

from noctule.codecs import Codec
from noctule.core.errors import NonFiniteError
from noctule.core.exact import Exact
from noctule.core.finite import all_finite
from noctule.core.method import Method
from noctule.core.random import generator
from noctule.core.remap import Remap
from noctule.core.topology import Topology
from noctule.exchange.compress import Compress
from noctule.parallel.server.assign import assign
from noctule.parallel.server.client import ShardClients
from noctule.parallel.server.mirror import LayerMirror
from noctule.transport.messages import field, to_bytes, to_tensor
from noctule.transport.ticket import Ticket

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class PushPull(Method):
    """Trains with a parameter server, which holds the weights; between two pulls a worker continues with its own optimizer.

    When a session begins, the model takes the server's weights, which are worker 0's initial ones if it has none. A push is the sum
    of the gradients since the last one; gradients that are not pushed when a session ends are in `state_dict`, and `now` pushes
    them. With one worker that pushes and pulls at every step this is plain training with the server's optimizer, bit for bit.
    Buffers, such as the running statistics of batch norms, are not shared.

    Only worker 0 may move connections: give its session a `Rewire` before this method. The server and the other workers follow,
    each worker at its next pull; what they push for connections that are gone is left out.

    A push is applied once, even if it is sent again after a timeout or a restart of the server: the worker keeps its pushes until
    they are in a snapshot. A push is lost only if its worker and the server both end before that; the server writes a snapshot when
    a worker leaves.

    Args:
        server: the worker's ticket, from `noctule.parallel.server.listen.serve`.
        push_every: steps from one push to the next.
        pull_every: steps from one pull to the next; it overwrites what the worker's own optimizer did since the last push.
        overlap: read the reply to a push at the next push, so that no worker waits for the link. Changes by other workers come one
            push later; those of the worker's own optimizer meanwhile are added to them, so make it like the server's.
        bound: the staleness bound: how many pushes this worker may be ahead of the slowest; it waits after a push or before a pull
            until that holds. 0 is synchronous: the server makes one step with the mean of all workers' pushes. None for no bound.
        warm_start: how many times worker 0 pushes before the others begin; they begin sooner if it leaves or falls silent.
        codec: how gradients are encoded, the same as the server's; the residual of a biased one is added to later pushes.
        timeout_seconds: for any one reply.
        weigh: returns at each step the weight of this worker's gradient, 1 on average; None for 1. With bound 0 and batches of
            unequal size, its samples times the number of workers over all workers' samples makes all of them one worker.
        seed: of the codec's random numbers, which also depend on the worker and the step.

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
        """The sum of the gradients since the last push, by parameter."""
        self._since: dict[str, Tensor] = {}
        """With overlap: the weights at the push whose reply has not been read."""
        self._places: dict[str, Topology] = {}  # the topology that what is accrued and owed of each layer belongs to

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Join the server and take its weights.

        Raises:
            ExchangeError: a shard does not answer, or has another model, codec or options.
            ValueError: a parameter has a dtype that the server cannot hold.
        """
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, p in self.parameters.items():
            if p.dtype not in _FLOATS:
                raise ValueError(f"the server keeps float32, and {name!r} is {p.dtype}: use model.float()")
        self.assigned = assign({name: p.numel() for name, p in self.parameters.items()}, len(self.server.addresses))
        with ExitStack() as undo:
            self.mirror = LayerMirror(model, self._carry)
            undo.callback(self.mirror.close)
            self._carry_from(self._places)
            self._places = {name: layer.topology for name, layer in self.mirror.layers.items()}
            seeds = [self._seed(names) if self.server.worker == 0 else None for names in self.assigned]
            self.clients = ShardClients(
                self.server, facts=self._facts(), seeds=seeds, timeout_seconds=self.timeout_seconds
            )
            undo.callback(self.clients.close)
            self._pull()
            undo.pop_all()

    @property
    def staleness(self) -> Counter[int]:
        """How many pushes of this worker, to all shards, had each staleness; empty before a session begins."""
        return self.clients.staleness if hasattr(self, "clients") else Counter()

    @override
    def before_step(self) -> None:
        """Add the gradient to what is accrued.

        Raises:
            NonFiniteError: it is NaN or infinite; nothing is sent.
            ValueError: connections were moved by a worker that is not worker 0, or `weigh` returned an invalid weight.
        """
        self._report_moves()
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

    @override
    def after_step(self) -> None:
        """Push and pull, each every so many steps."""
        self._report_moves()
        self.steps += 1
        pull = self.steps % self.pull_every == 0
        if pull and self._since:
            self._pull()
        if self.steps % self.push_every == 0:
            self._push(pull=pull)
        if pull and self.overlap:
            self._since = {name: p.detach().clone() for name, p in self.parameters.items()}
        elif pull:
            self._pull()

    def now(self) -> None:
        """Push what is accrued, and pull."""
        self._report_moves()
        self._drop_reply()
        if self.accrued:
            self._push(pull=True)
        self._pull()

    @override
    def settle(self) -> None:
        """Push what is accrued and pull, unless the last step did."""
        if self.accrued or self._since or self.steps % self.pull_every:
            self.now()

    def fetch(self, key: str) -> dict[str, Tensor]:
        """Push what is accrued, take the server's weights, and return its optimizer's state under a key, by parameter."""
        self._report_moves()
        self._drop_reply()
        if self.accrued:
            self._push(pull=False)
        return self._pull(kept=key)

    @override
    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """Refuse what the server cannot follow; moves of sparse layers are noted by the mirror.

        Raises:
            ValueError: a trained layer has changed its width.
        """
        trained = {*self.parameters.values()}
        if layer not in self.mirror.layers.values() and not trained.isdisjoint(layer.parameters()):
            raise ValueError(
                "a layer changed its width, and the weights at the parameter server cannot follow: remove neurons between "
                "sessions, with a server of a new folder for each, or train with EverySync or DiLoCo, which follow"
            )

    @override
    def end(self) -> None:
        """Leave the server: no worker waits for this one any longer."""
        try:
            if self.server.worker == 0 and not self.clients.failed:
                self._report_moves()
        finally:
            self.mirror.close()
            self.clients.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        """What is accrued and owed, and the topologies it belongs to; the weights are the server's."""
        if self.server.worker == 0 and not self.clients.failed:
            self._report_moves()  # or the moves would be lost with this worker
        places = {name: topology.state_dict() for name, topology in self._places.items()}
        accrued = {name: x.clone() for name, x in self.accrued.items()}
        kept = {"accrued": accrued, "compress": self.compress.state_dict()}
        return {"steps": self.steps, "places": places, **kept}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what is accrued and owed, and take the server's present weights and connections.

        Raises:
            ValueError: the state is of another model.
        """
        found: dict[str, Tensor] = state["accrued"]
        if any(n not in self.parameters or x.shape != self.parameters[n].shape for n, x in found.items()):
            raise ValueError("this state is of a model with other parameters or shapes: load that of this model")
        self._drop_reply()
        self.mirror.undo()
        self.accrued = {name: x.to(self.parameters[name].device, copy=True) for name, x in found.items()}
        self.steps = int(state["steps"])
        self.compress.load_state_dict(state["compress"])
        self._carry_from({name: Topology.from_state_dict(places) for name, places in state["places"].items()})
        self._pull()

    def _carry_from(self, places: Mapping[str, Topology]) -> None:
        """Move what is accrued and owed from these topologies to the present ones."""
        for name, layer in self.mirror.layers.items():
            if name in places and places[name] != layer.topology:
                self._carry(name, Remap.between(places[name].to(layer.topology.device), layer.topology))

    def _carry(self, name: str, remap: Remap) -> None:
        """Move what is accrued and owed with its connections; new connections have not changed since the last push."""
        self._places[name] = self.mirror.layers[name].topology
        if name in self.accrued:
            self.accrued[name] = remap.apply(self.accrued[name])
        if name in self._since:
            self._since[name] = remap.apply(self._since[name], new=self.parameters[name].detach())
        self.compress.remapped(name, remap, (remap.new_size,))

    def _report_moves(self) -> None:
        """Report the moves made here to the server."""
        moved = self.mirror.moved()
        if moved and self.server.worker != 0:
            raise ValueError(
                f"the connections of {', '.join(moved)} have moved at worker {self.server.worker}, and only worker 0 moves "
                "them while all push to one server: leave Rewire out of this worker's session, it follows worker 0's"
            )
        if moved:
            self.clients.move(self.mirror.report(moved, self.assigned))  # its reply replaces one with weights

    def _facts(self) -> dict[str, str]:
        """What every worker must have alike, as text by name."""
        options = {
            "shards": len(self.assigned),
            "bound": self.bound,
            "warm_start": self.warm_start,
            "codec": self.codec,
        }
        shapes = {n: f"{str(p.dtype).removeprefix('torch.')} {tuple(p.shape)}" for n, p in self.parameters.items()}
        return {name: str(fact) for name, fact in options.items()} | shapes | self.mirror.facts()

    def _seed(self, names: list[str]) -> tuple[dict[str, Any], list[bytes]]:
        """The header and frames of the initial weights of one shard."""
        weights = {name: self.parameters[name].detach().float() for name in names}
        matrices, places = self.mirror.seed(names)
        header = {
            "places": matrices,
            "shapes": {name: list(x.shape) for name, x in weights.items()},
            "bound": self.bound,
            "warm_start": self.warm_start,
        }
        return header, [*(to_bytes(Exact().encode(x)) for x in weights.values()), *places]

    def _push(self, *, pull: bool) -> None:
        """Push what is accrued; with a bound, wait until this worker may continue."""
        draws = generator("push", self.seed, self.server.worker, self.steps)
        gradients = [
            {name: self._encode(name, draws) for name in names if name in self.accrued} for names in self.assigned
        ]
        self.accrued = {}
        self.clients.push(gradients, pull=pull, versions=self._versions())
        if self.bound is not None:
            self.clients.wait()

    def _encode(self, name: str, draws: torch.Generator) -> bytes:
        sent = self.compress.send(self.accrued[name], name)
        payload = self.codec.encode(sent, draws)
        self.compress.arrived(sent, self.codec.decode(payload), name)
        return to_bytes(payload)

    def _drop_reply(self) -> None:
        """Drop the reply to the last push: a newer one follows."""
        if self._since:
            self.clients.forget()
            self._since = {}

    def _versions(self) -> list[dict[str, int]]:
        """The versions of the topologies here, for each shard."""
        return [self.mirror.versions(names) for names in self.assigned]

    @torch.no_grad()
    def _pull(self, *, kept: str = "") -> dict[str, Tensor]:
        """Take the server's connections and weights, from the reply to a push or a new one, and add what was done here since.

        Returns the server optimizer's state under a key, by parameter.
        """
        found: dict[str, Tensor] = {}
        for names, (header, frames) in zip(self.assigned, self.clients.pull(self._versions(), kept=kept), strict=True):
            brought = field(header, "kept", list, default=[])
            first, last = len(names), len(frames) - len(brought)
            self.mirror.follow(header, frames[first:last])
            for name, frame in zip(names, frames[:first], strict=True):
                p = self.parameters[name]
                weights = to_tensor(Exact(), frame, p.shape, name)
                p.copy_(weights + (p - self._since[name]) if name in self._since else weights)
            for name, frame in zip(brought, frames[last:], strict=True):
                found[name] = to_tensor(Exact(), frame, self.parameters[name].shape, name)
        self._since = {}
        return found
