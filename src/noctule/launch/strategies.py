"""How workers train together, by the names that the command line knows."""

from dataclasses import asdict, dataclass
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
from noctule.parallel.diloco import AVERAGE, NESTEROV

Name = Literal["sync", "diloco", "local"]
Coding = Literal["none", "bf16", "natural", "topk", "powersgd", "auto"]

TOP = 0.0156
"""Of the numbers that `topk` sends, each as one byte of natural compression."""
RANK = 4
"""Of `powersgd`."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What workers exchange, how often, and in which form.

    Args:
        strategy: sync (gradients at every step), diloco (weights every ``meet`` steps, with an outer Nesterov optimizer) or local
            (the plain mean of the weights every ``meet`` steps).
        codec: none, bf16, natural (8 bits a number), topk (1.56 % of the numbers, with error feedback), powersgd (rank 4), or auto
            (whatever is fastest on the link as measured).
        meet: steps from one meeting to the next, where workers do not meet at every step.
    """

    strategy: Name = "sync"
    codec: Coding = "none"
    meet: int = 100

    @property
    def equal_weights(self) -> bool:
        """Whether all workers have the same weights after every step."""
        return self.strategy == "sync"

    @property
    def meet_every(self) -> int:
        """Steps from one moment of equal weights to the next."""
        return 1 if self.equal_weights else self.meet

    def method(self, exchange: Exchange) -> Method:
        """What is attached."""
        if self.strategy == "sync":
            return EverySync(exchange)
        return DiLoCo(exchange, every=self.meet, outer=NESTEROV if self.strategy == "diloco" else AVERAGE)

    def exchange(self, weigh: Weigh) -> Exchange:
        """Between the members of the process group as it is; ``weigh`` says what a worker's gradients count."""
        if self.codec == "auto":
            candidates = ("none", "bf16", "natural", "topk", "powersgd")
            return Auto({name: self._coded(name, weigh) for name in candidates}, probe=lambda: probe_link(Group()))
        return self._coded(self.codec, weigh)

    def facts(self) -> dict[str, Any]:
        """For the records."""
        return asdict(self)

    def _coded(self, name: Coding, weigh: Weigh) -> Exchange:
        counted = [weigh] if self.equal_weights else []  # the others exchange weights, of which each counts as much
        match name:
            case "powersgd":
                return PowerSGD(RANK, over=Channel(*counted, path=AllReduce()))
            case "none":
                return Channel(*counted, path=AllReduce())
            case "topk":
                return Channel(*counted, Compress(codec(name)), path=AllGather())
            case _:
                return Channel(*counted, Compress(codec(name)), path=TwoPhase())


def codec(name: Coding) -> Codec:
    """What a name means, where it is a codec.

    Raises:
        ValueError: it is none.
    """
    match name:
        case "bf16":
            return Cast(torch.bfloat16)
        case "natural":
            return NaturalCompression()
        case "topk":
            return TopK(TOP, values=NaturalCompression())
        case _:
            raise ValueError(f"{name} is not a codec that works on single tensors: use bf16, natural or topk")
