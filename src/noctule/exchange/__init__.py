"""Between workers: stages, and paths from each to all."""

from noctule.exchange.all_gather import AllGather
from noctule.exchange.all_reduce import AllReduce
from noctule.exchange.auto import Auto
from noctule.exchange.clip import Clip
from noctule.exchange.compress import Compress
from noctule.exchange.ddp import ddp_hook
from noctule.exchange.every_sync import EverySync
from noctule.exchange.framing import on_the_wire
from noctule.exchange.fsdp import fsdp_hooks
from noctule.exchange.group import Group, own_group
from noctule.exchange.handshake import agree
from noctule.exchange.hierarchical import Hierarchical
from noctule.exchange.local import Local
from noctule.exchange.noise_scale import NoiseScale
from noctule.exchange.power_sgd import PowerSGD
from noctule.exchange.probe import LinkEstimate, probe_link
from noctule.exchange.two_phase import TwoPhase
from noctule.exchange.weigh import Weigh

__all__ = [
    "AllGather",
    "AllReduce",
    "Auto",
    "Clip",
    "Compress",
    "EverySync",
    "Group",
    "Hierarchical",
    "LinkEstimate",
    "Local",
    "NoiseScale",
    "PowerSGD",
    "TwoPhase",
    "Weigh",
    "agree",
    "ddp_hook",
    "fsdp_hooks",
    "on_the_wire",
    "own_group",
    "probe_link",
]
