"""Strategies of training together, each a Method for a plain loop."""

from noctule.parallel.diloco import AVERAGE, NESTEROV, DiLoCo
from noctule.parallel.push_pull import PushPull
from noctule.parallel.ticket import Ticket

__all__ = ["AVERAGE", "NESTEROV", "DiLoCo", "PushPull", "Ticket"]
