"""Which neurons and channels can go? Removing them for good, with all that depends on them."""

from noctule.compress.prune.importance import ImportancePruning, importance
from noctule.compress.prune.shrink import shrink
from noctule.compress.prune.widths import resize_to

__all__ = ["ImportancePruning", "importance", "resize_to", "shrink"]
