"""Where a training runs: alone, as one of several workers of a supervisor, or under torchrun."""

from noctule.launch.supervisor import Supervisor
from noctule.launch.team import Team, as_member_of, team
from noctule.strategy import Strategy

__all__ = ["Strategy", "Supervisor", "Team", "as_member_of", "team"]
