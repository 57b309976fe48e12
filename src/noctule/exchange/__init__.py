"""What do workers send each other at a step? Channels, their stages and paths, and hooks for DDP and FSDP2."""

from typing import TYPE_CHECKING, Any

from noctule.codecs import (
    QSGD,
    Affine,
    Cast,
    Exact,
    LowRank,
    NaturalCompression,
    NaturalDithering,
    RandomK,
    SignSGD,
    TernGrad,
    TopK,
)
from noctule.core.aggregate import mean
from noctule.core.codec import Codec, Payload
from noctule.core.exchange import Channel, Exchange, Path, Stage
from noctule.exchange.all_gather import AllGather
from noctule.exchange.all_reduce import AllReduce
from noctule.exchange.auto import Auto
from noctule.exchange.clip import Clip
from noctule.exchange.compress import Compress
from noctule.exchange.ddp import ddp_hook
from noctule.exchange.every_sync import EverySync
from noctule.exchange.group import Group, own_group
from noctule.exchange.handshake import agree
from noctule.exchange.hierarchical import Hierarchical
from noctule.exchange.local import Local
from noctule.exchange.noise_scale import NoiseScale
from noctule.exchange.power_sgd import PowerSGD
from noctule.exchange.probe import LinkEstimate, probe_link
from noctule.exchange.two_phase import TwoPhase
from noctule.exchange.weigh import Weigh

if TYPE_CHECKING:
    from noctule.exchange.fsdp import fsdp_hooks

__all__ = [
    "QSGD",
    "Affine",
    "AllGather",
    "AllReduce",
    "Auto",
    "Cast",
    "Channel",
    "Clip",
    "Codec",
    "Compress",
    "EverySync",
    "Exact",
    "Exchange",
    "Group",
    "Hierarchical",
    "LinkEstimate",
    "Local",
    "LowRank",
    "NaturalCompression",
    "NaturalDithering",
    "NoiseScale",
    "Path",
    "Payload",
    "PowerSGD",
    "RandomK",
    "SignSGD",
    "Stage",
    "TernGrad",
    "TopK",
    "TwoPhase",
    "Weigh",
    "agree",
    "ddp_hook",
    "fsdp_hooks",
    "mean",
    "own_group",
    "probe_link",
]


def __getattr__(name: str) -> Any:
    """Load the hook for FSDP2 when it is first asked for: torch's part of it takes a second to import."""
    if name == "fsdp_hooks":
        from noctule.exchange.fsdp import fsdp_hooks

        return fsdp_hooks
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
