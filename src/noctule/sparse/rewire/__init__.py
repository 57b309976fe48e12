"""Which connections move, and where to? One engine that drops and grows; one file a paper."""

from noctule.sparse.rewire.ctre import MostAlike, ctre
from noctule.sparse.rewire.drop import Drop, sign_split, smallest
from noctule.sparse.rewire.engine import Capture, Grow, Rewire, SharedCapture, StatefulGrow
from noctule.sparse.rewire.gse import gse, guided
from noctule.sparse.rewire.rigl import rigl, steepest
from noctule.sparse.rewire.set import anywhere, set_

__all__ = [
    "Capture",
    "Drop",
    "Grow",
    "MostAlike",
    "Rewire",
    "SharedCapture",
    "StatefulGrow",
    "anywhere",
    "ctre",
    "gse",
    "guided",
    "rigl",
    "set_",
    "sign_split",
    "smallest",
    "steepest",
]
