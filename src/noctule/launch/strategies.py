"""How workers train together, by the names that the command line knows."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch

from noctule.channel import Channel, Exchange
from noctule.codecs import Cast, Codec, NaturalCompression, TopK
from noctule.exchange import (
    AllGather,
    AllReduce,
    Auto,
    Compress,
    EverySync,
    Group,
    PowerSGD,
    TwoPhase,
    Weigh,
    probe_link,
)
from noctule.method import Method
from noctule.parallel import DiLoCo
from noctule.parallel.diloco import AVERAGE

Name = Literal["sync", "diloco", "local", "downpour", "ssp", "bsp", "wasap"]
Coding = Literal["none", "bf16", "natural", "topk", "powersgd", "auto"]

SERVED = ("downpour", "ssp", "bsp", "wasap")
"""Those whose workers meet at a parameter server; of wasap only for the first 70 % of the steps."""
TOP, LEAST = 0.0156, 256
"""Of the numbers that `topk` sends, each as one byte of natural compression, and how many of each tensor at least."""
RANK = 4
"""Of `powersgd`."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What workers exchange, how often, and in which form.

    Args:
        strategy: sync (gradients at every step), diloco (weights every ``meet`` steps, with an outer Nesterov optimizer), local
            (the plain mean of the weights every ``meet`` steps), or against a parameter server downpour (nobody waits), ssp (nobody
            is more than ``bound`` pushes ahead), bsp (all push before anybody goes on) and wasap (downpour, then each alone, then
            their networks merged).
        codec: none, bf16, natural (8 bits a number), topk (the largest 1.56 %, with error feedback), powersgd (rank 4), or auto
            (whatever is fastest on the link as measured).
        meet: steps from one meeting, or push and pull, to the next (default: 100 for diloco and local, 1 for the others).
        bound: of ssp, in pushes.
        outer_rate: the learning rate of diloco's outer optimizer.
        outer_momentum: of the same, Nesterov's; smaller suits a training of a few hundred meetings or less.
        server_rate: the learning rate at the parameter server, of Adagrad, or for wasap of SGD with momentum.
        shards: of the parameter server.

    Raises:
        ValueError: they do not go together.
    """

    strategy: Name = "sync"
    codec: Coding = "none"
    meet: int | None = None
    bound: int = 3
    outer_rate: float = 0.7
    outer_momentum: float = 0.9
    server_rate: float = 0.01
    shards: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.meet is not None and self.meet < 1:
            raise ValueError(f"workers meet after at least one step, got meet={self.meet}")
        if self.strategy == "sync" and self.meet not in (None, 1):
            raise ValueError(f"with sync workers meet at every step, got meet={self.meet}: use diloco or local")
        if self.served and self.codec in ("powersgd", "auto"):
            raise ValueError(f"{self.codec} needs workers that meet: with {self.strategy} use bf16, natural or topk")
        if not (self.outer_rate > 0.0 and 0.0 <= self.outer_momentum < 1.0):
            raise ValueError(
                f"outer_rate is above 0 and outer_momentum from 0 to less than 1, got {self.outer_rate} and {self.outer_momentum}"
            )
        if self.bound < 0 or self.shards < 1 or not self.server_rate > 0.0:
            raise ValueError(
                f"bound is at least 0, shards at least 1 and server_rate above 0, got {self.bound}, {self.shards} and "
                f"{self.server_rate}"
            )

    @property
    def served(self) -> bool:
        """Whether there is a parameter server."""
        return self.strategy in SERVED

    @property
    def equal_weights(self) -> bool:
        """Whether all workers have the same weights after every step."""
        return self.strategy == "sync"

    @property
    def exact_gradients(self) -> bool:
        """Whether workers exchange gradients, and get their mean up to rounding."""
        return self.strategy == "sync" and self.codec in ("none", "bf16")

    @property
    def meet_every(self) -> int:
        """Steps from one meeting to the next."""
        return self.meet or (100 if self.strategy in ("diloco", "local") else 1)

    @property
    def timeout_seconds(self) -> float:
        """After which a silent worker is taken to be lost; the more steps between two meetings, the longer all are silent."""
        return min(29.0 + self.meet_every, 300.0)

    @property
    def staleness_bound(self) -> int | None:
        """By how many pushes a worker may be ahead at the server."""
        return {"ssp": self.bound, "bsp": 0}.get(self.strategy)

    def server_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """What moves the weights at the server."""
        if self.strategy == "wasap":
            return torch.optim.SGD(parameters, lr=self.server_rate, momentum=0.9)
        return torch.optim.Adagrad(parameters, lr=self.server_rate)

    def method(self, exchange: Exchange) -> Method:
        """What workers in a process group attach."""
        if self.strategy == "sync":
            return EverySync(exchange)
        momentum = self.outer_momentum
        nesterov = partial(torch.optim.SGD, lr=self.outer_rate, momentum=momentum, nesterov=momentum > 0.0)
        return DiLoCo(exchange, every=self.meet_every, outer=nesterov if self.strategy == "diloco" else AVERAGE)

    def exchange(self, weigh: Weigh) -> Exchange:
        """Between the members of the process group as it is; ``weigh`` says what a worker's gradients count."""
        if self.codec == "auto":
            candidates = ("none", "bf16", "natural", "topk", "powersgd")
            return Auto({name: self._coded(name, weigh) for name in candidates}, probe=lambda: probe_link(Group()))
        return self._coded(self.codec, weigh)

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def _coded(self, name: Coding, weigh: Weigh) -> Exchange:
        counted = [weigh] if self.equal_weights else []  # the others exchange weights, of which each counts as much
        coding = codec(name)
        if name == "powersgd":
            return PowerSGD(RANK, over=Channel(*counted, path=AllReduce()))
        if coding is None:
            return Channel(*counted, path=AllReduce())
        return Channel(*counted, Compress(coding), path=AllGather() if name == "topk" else TwoPhase())


def codec(name: Coding) -> Codec | None:
    """The codec of single tensors that a name means, if it means one."""
    match name:
        case "bf16":
            return Cast(torch.bfloat16)
        case "natural":
            return NaturalCompression()
        case "topk":
            return TopK(TOP, at_least=LEAST, values=NaturalCompression())
        case _:
            return None
