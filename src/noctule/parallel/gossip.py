"""Decentralized averaging: each worker moves its weights towards its neighbours' on a graph, and all agree in the limit.

Lian et al. 2017, "Can Decentralized Algorithms Outperform Centralized Algorithms?" (D-PSGD), arXiv 1705.09056; with a codec
CHOCO-SGD, Koloskova, Stich, Jaggi 2019, arXiv 1902.00340. Differs from the papers: weights are mixed after the optimizer's step, be
that any of torch's; public copies begin at the common first weights instead of zero.

Shapes: W workers, n weights, d neighbours of each.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.codecs import Codec
from noctule.core.errors import ExchangeError
from noctule.core.exchange import Channel
from noctule.core.method import Method
from noctule.core.random import generator
from noctule.core.remap import Remap
from noctule.exchange.all_reduce import AllReduce
from noctule.exchange.group import Group
from noctule.exchange.handshake import agree, agree_on_places
from noctule.exchange.message_format import MessageFormat
from noctule.parallel.graphs import Graph, ring, weights


class Gossip(Method):
    """Every ``every`` steps moves each worker's weights towards its neighbours', so that the mean of all workers stays the same.

    A worker sends d messages, whatever W is. With a codec it sends its change from a public copy of its weights, which it and its
    neighbours keep and update alike: what the codec leaves out is in the next message, and 1 + d copies of the weights are in
    memory. The workers' models differ until `settle`. Connections may move only if they move alike on all workers, so not by the
    workers' own weights or gradients.

    Args:
        graph: `ring`, `torus`, `random`, `complete` or another function of W and the number of the meeting.
        every: the number of steps from one meeting to the next.
        codec: compresses the messages; the graph must be the same at every meeting then.
        rate: the part of the way to the neighbours' mean, in (0, 1]; required with a codec, and the smaller the more it leaves out.
        group: the process group of the workers (default: all processes).

    Raises:
        ValueError: there is a codec and no rate, a rate outside (0, 1], or no step between meetings.
    """

    def __init__(
        self,
        graph: Graph = ring,
        *,
        every: int = 1,
        codec: Codec | None = None,
        rate: float | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"workers meet after at least one step, got every={every}")
        if codec is not None and rate is None:
            raise ValueError(
                f"with {codec} neighbours know roughly where a worker is, so it should not go all the way to them: give a rate, "
                "such as 0.8 for NaturalCompression, 0.2 for TopK(0.1) or 0.04 for TopK(0.01)"
            )
        self.rate = 1.0 if rate is None else rate
        if not 0.0 < self.rate <= 1.0:
            raise ValueError(
                f"a worker goes a part of the way to its neighbours, above 0 and at most 1, got rate={rate}"
            )
        self.graph, self.every, self.codec = graph, every, codec
        self.group = Group(group)
        self._exact = Channel(path=AllReduce(group))
        self.steps = self.meetings = 0
        """Steps since the last meeting, and meetings so far."""
        self.public: dict[int, dict[str, Tensor]] = {}
        """Worker -> name -> the public copy of its weights; for this worker and its neighbours."""

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.model = model
        self._moved = self._agreed = False
        if self.codec is not None:
            self._known = self._neighbours(0)
            for rank in (self.group.rank, *self._known[self.group.rank]):
                self.public[rank] = {name: p.detach().clone() for name, p in self._parameters().items()}

    @override
    def after_step(self) -> None:
        self.steps += 1
        if self.steps >= self.every:
            self.now()

    def now(self) -> None:
        """Meet, whether a meeting is due or not; all workers must call it.

        Raises:
            ExchangeError: they have other models or graphs, or began elsewhere, or connections moved differently.
            ValueError: there is a codec, and the neighbours are others than before.
        """
        self._agree()
        rank, parameters = self.group.rank, self._parameters()
        neighbours = self._neighbours(self.meetings)
        if self.codec is not None and neighbours != self._known:
            raise ValueError(
                "this graph has other neighbours at each meeting, whose public copies are not kept: use ring, torus or complete "
                "with a codec, or no codec"
            )
        shares = weights(neighbours)[rank].tolist()
        with torch.no_grad():
            if self.codec is None:
                mine = [p.detach() for p in parameters.values()]
                theirs = self._swap(mine, list(parameters), neighbours[rank])[1]
            else:
                own = self.public[rank]
                changes = [p - own[name] for name, p in parameters.items()]
                sent, received = self._swap(changes, list(parameters), neighbours[rank])
                theirs = {peer: [self.public[peer][name] for name in parameters] for peer in neighbours[rank]}
                mine = [own[name] for name in parameters]
                for copies, moves in ((mine, sent), *((theirs[peer], received[peer]) for peer in neighbours[rank])):
                    for copy, move in zip(copies, moves, strict=True):
                        copy += move.to(copy.device)
            pulls = [torch.zeros_like(x) for x in mine]
            for peer, several in theirs.items():
                for pull, x, y in zip(pulls, mine, several, strict=True):
                    pull += shares[peer] * (y.to(x.device) - x)  # what it takes from the peer the peer takes from it
            for p, pull in zip(parameters.values(), pulls, strict=True):
                p += self.rate * pull
        self.steps, self.meetings = 0, self.meetings + 1

    @override
    def settle(self) -> None:
        """Give every worker the mean of all, as at the end of a training; all workers must call it."""
        self._agree()
        parameters = self._parameters()
        with torch.no_grad():
            means = self._exact([p.detach() for p in parameters.values()], list(parameters))
            for p, x in zip(parameters.values(), means, strict=True):
                p.copy_(x)

    @override
    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """Move the public copies; a new connection is zero in all of them."""
        prefix = next(name for name, module in self.model.named_modules() if module is layer)
        for name, p in layer.named_parameters(recurse=False):
            part, key = remap.of(name), f"{prefix}.{name}" if prefix else name
            if part is not None:
                for copies in self.public.values():
                    copies[key] = part.apply(copies[key].flatten()).view(p.shape)
        self._moved = True

    @override
    def state_dict(self) -> dict[str, Any]:
        copies = {str(rank): dict(several) for rank, several in self.public.items()}
        return {"steps": self.steps, "meetings": self.meetings, "public": copies}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: the state is of another worker, graph or model.
        """
        found: dict[int, dict[str, Tensor]] = {int(rank): dict(copies) for rank, copies in state["public"].items()}
        if _shapes(found) != _shapes(self.public):
            raise ValueError(
                f"this state is of a worker that knows the workers {sorted(found)}, or of a model with other parameters; this is "
                f"worker {self.group.rank}, which knows {sorted(self.public)}: every worker loads its own state, after its model"
            )
        self.steps, self.meetings, self.public = int(state["steps"]), int(state["meetings"]), found
        self._agreed = False

    def __repr__(self) -> str:
        """The options that must be equal on all workers."""
        return f"Gossip(every={self.every}, codec={self.codec}, rate={self.rate:g})"

    def _agree(self) -> None:
        if not self._agreed:
            shapes = {name: tuple(p.shape) for name, p in self._parameters().items()}
            facts = {
                "gossip": self,
                "graph": self._neighbours(self.meetings),
                "meetings": self.meetings,
                "shapes": shapes,
            }
            begun = self.public[self.group.rank] if self.codec is not None and not self.meetings else {}
            agree(self._exact, self.model, facts, weights=begun)
            self._agreed, self._moved = True, False
        if self._moved:
            agree_on_places(self._exact, self.model)
            self._moved = False

    def _neighbours(self, meeting: int) -> list[tuple[int, ...]]:
        return self.graph(self.group.world, meeting)

    def _swap(
        self, tensors: Sequence[Tensor], names: Sequence[str], peers: Sequence[int]
    ) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
        """Send tensors to the peers; what these decode of them, and the tensors of each peer."""
        form = MessageFormat(tensors, self.codec, 1)
        draws = generator("gossip", self.meetings, self.group.rank)
        wire, sent = form.write(tensors, (float(self.meetings),), draws)
        received = {}
        for peer, each in zip(peers, self.group.swap(wire, peers, fixed=form.nbytes is not None), strict=True):
            received[peer], (meeting,) = form.read(each, peer, names)
            if meeting != self.meetings:
                raise ExchangeError(
                    f"worker {self.group.rank} is at meeting {self.meetings} and its neighbour {peer} at {meeting:g}: every worker "
                    "must come to every meeting (did one run out of batches?)"
                )
        return sent, received

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def _shapes(public: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, torch.Size]]:
    return {rank: {name: x.shape for name, x in copies.items()} for rank, copies in public.items()}
