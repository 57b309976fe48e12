"""The journal of a worker in a team: its records also say what it sent and how long it exchanged."""

import time
from typing import Any

from noctule.exchange.group import TRAFFIC
from noctule.team.member import Team
from noctule.train.fit import Journal, SavedStates


class TeamJournal:
    """A journal that adds the worker's traffic to each record.

    Args:
        journal: of the run's folder, or of the worker's folder inside it.
        team: of which the worker is a member.
        checkpoints: instead of the journal's.
    """

    def __init__(self, journal: Journal, team: Team, checkpoints: SavedStates) -> None:
        self.journal, self.team, self.checkpoints = journal, team, checkpoints
        self._since = _so_far()

    @property
    def series(self) -> str:
        """The name of the network that is trained, where the journal has one."""
        return getattr(self.journal, "series", "")

    def log(self, record: dict[str, Any]) -> None:
        """Keep the record of an epoch, with the bytes sent in it and the share of its time in which messages were under way."""
        now = _so_far()
        elapsed, sent_bytes, waited = (new - old for new, old in zip(now, self._since, strict=True))
        self._since = now
        share = waited / elapsed if elapsed else 0.0
        together = {
            "worker": self.team.rank,
            "workers": self.team.world,
            "sent_bytes": sent_bytes,
            "exchange_share": share,
        }
        self.journal.log({**record, "together": together | self.team.facts()})

    def rewind(self, epoch: int) -> None:
        """Forget the records past an epoch, and count traffic from now on."""
        self._since = _so_far()
        self.journal.rewind(epoch)


def _so_far() -> tuple[float, int, float]:
    return time.perf_counter(), TRAFFIC.sent_bytes, TRAFFIC.seconds
