"""Nobody speaks with everybody: each worker moves its weights towards those of a few neighbours, and all of them meet in the limit.

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

from noctule.codecs import Codec
from noctule.core.errors import ExchangeError
from noctule.core.exchange import Channel
from noctule.core.method import Method
from noctule.core.remap import Remap
from noctule.exchange.all_reduce import AllReduce
from noctule.exchange.group import Group
from noctule.exchange.handshake import agree, agree_on_places
from noctule.exchange.messages import Format
from noctule.parallel.graphs import Graph, ring, weights


class Gossip(Method):
    """Every ``every`` steps each worker's weights go towards its neighbours', so that the mean of all stays where it is.

    What a worker sends, d messages, does not grow with W. With a codec it sends how far it went from its public copy, which it and
    its neighbours keep and move alike: what the codec leaves out is in the next message, and 1 + d copies of the weights in memory.
    Workers' models differ until `settle`. Connections may move only if they move alike on all workers, so not by the workers' own
    weights or gradients.

    Args:
        graph: `ring`, `torus`, `random`, `complete` or another function of W and the number of the meeting.
        every: steps from one meeting to the next.
        codec: of what travels; the graph must be the same at every meeting then.
        rate: how far to go, 1 for all the way; to be given with a codec, the smaller the more that leaves out.
        group: the process group to speak on (default: of all processes).
        seed: of what the codec draws; each worker draws its own.

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
        seed: int = 0,
    ) -> None:
        """Nothing is sent yet."""
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
        self.graph, self.every, self.codec, self.seed = graph, every, codec, seed
        self.group = Group(group)
        self._words = Channel(path=AllReduce(group))
        self.steps = self.meetings = 0
        """Steps since the last meeting, and meetings so far."""
        self.public: dict[int, dict[str, Tensor]] = {}
        """Worker -> name -> where everybody who knows it takes its weights to be; of this worker and its neighbours."""

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Note where the worker begins."""
        self.model = model
        self._moved = self._agreed = False
        if self.codec is not None:
            self._known = self._neighbours(0)
            for rank in (self.group.rank, *self._known[self.group.rank]):
                self.public[rank] = {name: p.detach().clone() for name, p in self._parameters().items()}

    def after_step(self) -> None:
        """Meet, when it is time."""
        self.steps += 1
        if self.steps >= self.every:
            self.now()

    def now(self) -> None:
        """Meet, whether it is time or not; all workers must.

        Raises:
            ExchangeError: they have other models or graphs, or began elsewhere, or connections moved differently.
            ValueError: there is a codec, and the neighbours are others than before.
        """
        self._agree()
        rank, parameters = self.group.rank, self._parameters()
        neighbours = self._neighbours(self.meetings)
        if self.codec is not None and neighbours != self._known:
            raise ValueError(
                "this graph has other neighbours at each meeting, whose public copies nobody keeps: use ring, torus or complete "
                "with a codec, or no codec"
            )
        shares = weights(neighbours)[rank].tolist()
        with torch.no_grad():
            if self.codec is None:
                mine = [p.detach() for p in parameters.values()]
                theirs = self._swapped(mine, list(parameters), neighbours[rank])[1]
            else:
                own = self.public[rank]
                went = [p - own[name] for name, p in parameters.items()]
                seen, heard = self._swapped(went, list(parameters), neighbours[rank])
                theirs = {peer: [self.public[peer][name] for name in parameters] for peer in neighbours[rank]}
                mine = [own[name] for name in parameters]
                for copies, moves in ((mine, seen), *((theirs[peer], heard[peer]) for peer in neighbours[rank])):
                    for copy, move in zip(copies, moves, strict=True):
                        copy += move.to(copy.device)
            pulls = [torch.zeros_like(x) for x in mine]
            for peer, several in theirs.items():
                for pull, x, y in zip(pulls, mine, several, strict=True):
                    pull += shares[peer] * (y.to(x.device) - x)  # what it takes from the peer the peer takes from it
            for p, pull in zip(parameters.values(), pulls, strict=True):
                p += self.rate * pull
        self.steps, self.meetings = 0, self.meetings + 1

    def settle(self) -> None:
        """Give every worker the mean of all, as at the end of a training; all workers must."""
        self._agree()
        parameters = self._parameters()
        with torch.no_grad():
            means = self._words([p.detach() for p in parameters.values()], list(parameters))
            for p, x in zip(parameters.values(), means, strict=True):
                p.copy_(x)

    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """Public copies follow their connections; a new one is zero in all of them."""
        prefix = next(name for name, module in self.model.named_modules() if module is layer)
        for name, p in layer.named_parameters(recurse=False):
            part, key = remap.of(name), f"{prefix}.{name}" if prefix else name
            if part is not None:
                for copies in self.public.values():
                    copies[key] = part.apply(copies[key].flatten()).view(p.shape)
        self._moved = True

    def state_dict(self) -> dict[str, Any]:
        """How far it is, and the public copies; each worker's own."""
        copies = {str(rank): dict(several) for rank, several in self.public.items()}
        return {"steps": self.steps, "meetings": self.meetings, "public": copies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: it is of another worker, graph or model.
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
        """What must be alike on all workers."""
        return f"Gossip(every={self.every}, codec={self.codec}, rate={self.rate:g}, seed={self.seed})"

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
            agree(self._words, self.model, facts, weights=begun)
            self._agreed, self._moved = True, False
        if self._moved:
            agree_on_places(self._words, self.model)
            self._moved = False

    def _neighbours(self, meeting: int) -> list[tuple[int, ...]]:
        return self.graph(self.group.world, meeting)

    def _swapped(
        self, tensors: Sequence[Tensor], names: Sequence[str], peers: Sequence[int]
    ) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
        """What the peers will make of these tensors, and what theirs are."""
        form = Format(tensors, self.codec, 1)
        drawn = (self.seed * 0x9E3779B97F4A7C15 + self.meetings * 0xBF58476D1CE4E5B9 + self.group.rank) % 2**63
        wire, seen = form.write(tensors, (float(self.meetings),), torch.Generator().manual_seed(drawn))
        heard = {}
        for peer, each in zip(peers, self.group.swap(wire, peers, fixed=form.nbytes is not None), strict=True):
            heard[peer], (meeting,) = form.read(each, peer, names)
            if meeting != self.meetings:
                raise ExchangeError(
                    f"worker {self.group.rank} is at meeting {self.meetings} and its neighbour {peer} at {meeting:g}: every worker "
                    "must come to every meeting (did one run out of batches?)"
                )
        return seen, heard

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def _shapes(public: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, torch.Size]]:
    return {rank: {name: x.shape for name, x in copies.items()} for rank, copies in public.items()}
