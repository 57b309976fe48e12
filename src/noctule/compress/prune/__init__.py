"""Which connections can go? Removing them on schedule, by the rule of each paper."""

from noctule.compress.prune.early_crop import EarlyCroP
from noctule.compress.prune.engine import Prune
from noctule.compress.prune.gap import GaP
from noctule.compress.prune.gradual import gradual_magnitude
from noctule.compress.prune.pattern import NM, Blocks, Candidates, Globally, Pattern, PerLayer, Rows
from noctule.compress.prune.pruning import Kept
from noctule.compress.prune.scl import SCL
from noctule.compress.prune.score import Score, magnitude, taylor
from noctule.compress.prune.sparsify import sparsify_
from noctule.compress.prune.spectral import SpectralPruning
from noctule.compress.prune.sup_tickets import SupTickets, sup_tickets

__all__ = [
    "NM",
    "SCL",
    "Blocks",
    "Candidates",
    "EarlyCroP",
    "GaP",
    "Globally",
    "Kept",
    "Pattern",
    "PerLayer",
    "Prune",
    "Rows",
    "Score",
    "SpectralPruning",
    "SupTickets",
    "gradual_magnitude",
    "magnitude",
    "sparsify_",
    "sup_tickets",
    "taylor",
]
