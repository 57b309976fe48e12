"""Which connections can go? Removing them on schedule, by the rule of each paper."""

from noctule.compress.prune.connections import Kept
from noctule.compress.prune.engine import Prune
from noctule.compress.prune.gradual import gradual_magnitude
from noctule.compress.prune.pattern import NM, Blocks, Candidates, Globally, Pattern, PerLayer, Rows
from noctule.compress.prune.score import Score, magnitude, taylor
from noctule.compress.prune.sparsify import sparsify_

__all__ = [
    "NM",
    "Blocks",
    "Candidates",
    "Globally",
    "Kept",
    "Pattern",
    "PerLayer",
    "Prune",
    "Rows",
    "Score",
    "gradual_magnitude",
    "magnitude",
    "sparsify_",
    "taylor",
]
