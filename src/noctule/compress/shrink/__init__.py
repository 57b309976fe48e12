"""Which neurons and channels can go? Removing them for good, with all that depends on them."""

from noctule.compress.shrink.importance import ImportancePruning, importance
from noctule.compress.shrink.shrinking import shrink
from noctule.compress.shrink.widths import resize_to

__all__ = ["ImportancePruning", "importance", "resize_to", "shrink"]
