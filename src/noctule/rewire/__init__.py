"""Moving topologies: connections that go, connections that come, the number staying the same."""

from noctule.rewire.drop import Drop, sign_split, smallest
from noctule.rewire.engine import Grow, Rewire
from noctule.rewire.gse import gse, guided
from noctule.rewire.rigl import rigl, steepest
from noctule.rewire.set import anywhere, set_

__all__ = ["Drop", "Grow", "Rewire", "anywhere", "gse", "guided", "rigl", "set_", "sign_split", "smallest", "steepest"]
