"""What can a small model learn from a large one? Losses, taps on hidden layers, and teachers of several kinds."""

from noctule.compress.distill.losses import (
    attention_transfer,
    dkd,
    fitnets,
    hinton,
    mutual,
    regressor,
    rkd,
    self_distillation,
)
from noctule.compress.distill.taps import taps
from noctule.compress.distill.teachers import Ensemble, Stored, distilling, outputs_of

__all__ = [
    "Ensemble",
    "Stored",
    "attention_transfer",
    "distilling",
    "dkd",
    "fitnets",
    "hinton",
    "mutual",
    "outputs_of",
    "regressor",
    "rkd",
    "self_distillation",
    "taps",
]
