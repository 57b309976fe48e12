"""The place of one worker at a shard of a parameter server."""

from dataclasses import dataclass, field


@dataclass
class Seat:
    """What a shard knows of a worker."""

    session: str
    clock: int
    """Its pushes, counted from the clock of the slowest when it joined."""
    seen: int = 0
    """The number of its last push in this session."""
    saved: int = 0
    """The same in the last snapshot."""
    applied: int = 0
    """Its pushes that are in the weights, of all sessions."""
    others: int = 0
    """Pushes of others in the weights that it has."""
    staleness: int = 0
    """Of its last push: how many pushes of others its weights did not have."""
    live: bool = True
    earlier: list[str] = field(default_factory=list)
    """Sessions that this one has replaced."""
    heard: float = 0.0
