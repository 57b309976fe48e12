"""What a shard of a parameter server knows of one worker."""

from dataclasses import dataclass, field


@dataclass
class WorkerState:
    """The session of a worker, and how far it is."""

    session: str
    clock: int
    """The number of its pushes, counted from the clock of the slowest worker when it joined."""
    seen: int = 0
    """The number of its last push or move in this session."""
    saved: int = 0
    """The number of its last push or move in the newest snapshot."""
    applied: int = 0
    """How many of its pushes are in the shard's weights, of all sessions."""
    others: int = 0
    """How many pushes of other workers are in the weights that it has."""
    staleness: int = 0
    """How many pushes of other workers its weights did not have when its last push was applied."""
    live: bool = True
    """Whether other workers wait for it."""
    earlier: list[str] = field(default_factory=list)
    """The sessions that this one has replaced."""
    last_message: float = 0.0
    """The time of its last message."""
