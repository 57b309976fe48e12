"""Strategies of training together, each a Method for a plain loop."""

from noctule.parallel.diloco import AVERAGE, NESTEROV, DiLoCo
from noctule.parallel.gossip import Gossip
from noctule.parallel.merging import Merge, merge_workers
from noctule.parallel.phases import Phases
from noctule.parallel.push_pull import PushPull
from noctule.parallel.ticket import Ticket
from noctule.parallel.wasap import wasap

__all__ = ["AVERAGE", "NESTEROV", "DiLoCo", "Gossip", "Merge", "Phases", "PushPull", "Ticket", "merge_workers", "wasap"]
