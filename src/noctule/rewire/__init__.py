"""Moving topologies: connections that go, connections that come, the number staying the same."""

from noctule.rewire.ctre import MostAlike, ctre
from noctule.rewire.drop import Drop, sign_split, smallest
from noctule.rewire.engine import Grow, Listener, Rewire, Sight
from noctule.rewire.gse import gse, guided
from noctule.rewire.rigl import rigl, steepest
from noctule.rewire.set import anywhere, set_

__all__ = [
    "Drop",
    "Grow",
    "Listener",
    "MostAlike",
    "Rewire",
    "Sight",
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
