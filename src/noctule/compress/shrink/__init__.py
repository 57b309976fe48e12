"""Which neurons, channels and heads can go? Removing them for good, with all that depends on them."""

from noctule.compress.shrink.groups import Group, Score, incoming, magnitude, taylor
from noctule.compress.shrink.importance import ImportancePruning, importance
from noctule.compress.shrink.record import Record, rebuild
from noctule.compress.shrink.shrinking import Shrunk, shrink
from noctule.compress.shrink.widths import resize_to

__all__ = [
    "Group",
    "ImportancePruning",
    "Record",
    "Score",
    "Shrunk",
    "importance",
    "incoming",
    "magnitude",
    "rebuild",
    "resize_to",
    "shrink",
    "taylor",
]
