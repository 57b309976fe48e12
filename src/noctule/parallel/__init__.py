"""Strategies for several workers, each a method for a plain loop: which weights or gradients are exchanged, and when?"""

from noctule.core.phases import Phases
from noctule.exchange.every_sync import EverySync
from noctule.parallel.diloco import AVERAGE, NESTEROV, DiLoCo
from noctule.parallel.gossip import Gossip
from noctule.parallel.graphs import complete, random, ring, torus
from noctule.parallel.merging import Merge, merge_workers
from noctule.parallel.parallel_gap import ParallelGaP
from noctule.parallel.sandblaster.coordinate import coordinate
from noctule.parallel.sandblaster.optimizer import Sandblaster
from noctule.parallel.server.push_pull import PushPull
from noctule.parallel.wasap import wasap
from noctule.transport.ticket import Ticket

__all__ = [
    "AVERAGE",
    "NESTEROV",
    "DiLoCo",
    "EverySync",
    "Gossip",
    "Merge",
    "ParallelGaP",
    "Phases",
    "PushPull",
    "Sandblaster",
    "Ticket",
    "complete",
    "coordinate",
    "merge_workers",
    "random",
    "ring",
    "torus",
    "wasap",
]
