"""Removing neurons and channels for good."""

from noctule.prune.importance import ImportancePruning, importance
from noctule.prune.shrink import shrink
from noctule.prune.widths import resize_to

__all__ = ["ImportancePruning", "importance", "resize_to", "shrink"]
