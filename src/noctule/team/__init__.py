"""How does a recipe train with other workers? A team for each kind of place where they meet, and one strategy a file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from noctule.team.member import Team, as_member_of, team
    from noctule.team.strategy import Strategy

__all__ = ["Strategy", "Team", "as_member_of", "team"]

_HOME = {"Strategy": "strategy", "Team": "member", "as_member_of": "member", "team": "member"}


def __getattr__(name: str) -> Any:
    """Load a name when it is first asked for: a command line is checked before torch is loaded."""
    if name not in _HOME:
        raise AttributeError(f"module 'noctule.team' has no attribute {name!r}")
    return getattr(import_module(f"noctule.team.{_HOME[name]}"), name)
