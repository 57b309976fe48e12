"""Choose how to exchange by what it costs on the link that is really there."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from torch import Tensor

from noctule.channel import Exchange, Work
from noctule.exchange.probe import LinkEstimate, agreed
from noctule.topology import Remap


class Auto(Exchange):
    """Whichever candidate is the cheapest: encoding and decoding, as timed on the tensors themselves, plus bytes over the measured
    bandwidth, plus rounds times the latency.

    All workers decide alike, at the first exchange, and again when exchanges have become slower or faster than they were. What the
    candidate that was left still owed is sent by the next one, so nothing is lost.

    Args:
        candidates: by name; the first should be the plain one, which wins where prices are equal.
        probe: measures the link, such as ``lambda: probe_link(Group())``.
        every: exchanges from one look at the times to the next.
        change: how many times as slow, or as fast, the link must have become.

    Raises:
        ValueError: there is nothing to choose from.
    """

    def __init__(
        self,
        candidates: Mapping[str, Exchange],
        *,
        probe: Callable[[], LinkEstimate],
        every: int = 50,
        change: float = 1.5,
    ) -> None:
        """Nothing is measured yet."""
        if not candidates or every < 1 or not change > 1.0:
            raise ValueError(
                f"choosing needs candidates, a look at least at every exchange and a change above 1, got {list(candidates)}, "
                f"every={every} and change={change}"
            )
        self.candidates, self.probe, self.every, self.change = dict(candidates), probe, every, change
        self.choice = next(iter(self.candidates))
        self.link: LinkEstimate | None = None
        self.works: dict[str, Work] = {}
        """What each candidate takes, by name; the seconds are those of the slowest worker."""
        self.calls = 0
        self._taken: list[float] = []
        self._usual: float | None = None
        self._owed: dict[str, Tensor] = {}

    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """As the cheapest candidate does it."""
        if self.link is None or (len(self._taken) >= self.every and self._changed()):
            self._decide(tensors, keys)
        mine = [
            x + self._owed.pop(key).view_as(x) if key in self._owed else x for x, key in zip(tensors, keys, strict=True)
        ]
        started = time.perf_counter()
        totals = self.candidates[self.choice](mine, keys)
        self._taken.append(time.perf_counter() - started)
        self.calls += 1
        return totals

    def prices(self) -> dict[str, float]:
        """Seconds that an exchange should take each candidate."""
        link = self.link
        if link is None:
            return {}
        return {name: work.seconds + link.seconds(work.sent_bytes, work.rounds) for name, work in self.works.items()}

    def why(self) -> str:
        """What was measured and what it means, a line for each candidate."""
        if self.link is None:
            return "nothing was exchanged yet"
        lines = [f"{self.choice}, because the link has {self.link}:"]
        for name, seconds in sorted(self.prices().items(), key=lambda item: item[1]):
            work = self.works[name]
            lines.append(
                f"  {name}: {seconds * 1e3:.2f} ms = {work.seconds * 1e3:.2f} ms of work, {work.sent_bytes / 1e6:.3f} MB, "
                f"{work.rounds} rounds"
            )
        return "\n".join(lines)

    def share(self, message: bytes) -> list[bytes]:
        """What every worker has to say, in their order."""
        return self.candidates[self.choice].share(message)

    def release(self) -> dict[str, Tensor]:
        """What is owed."""
        owed, self._owed = self._owed, {}
        for key, more in self.candidates[self.choice].release().items():
            owed[key] = owed[key] + more.view_as(owed[key]) if key in owed else more
        return owed

    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        """The numbers of this key changed their places."""
        for candidate in self.candidates.values():
            candidate.remapped(key, remap, shape)
        if key in self._owed:
            self._owed[key] = remap.apply(self._owed[key].flatten()).view(shape)

    def state_dict(self) -> dict[str, Any]:
        """The candidates', and what was chosen: resuming decides anew, since the link may be another one."""
        return {
            "choice": self.choice,
            "calls": self.calls,
            "owed": dict(self._owed),
            "candidates": {name: candidate.state_dict() for name, candidate in self.candidates.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: it is of other candidates.
        """
        if set(state["candidates"]) != set(self.candidates):
            raise ValueError(
                f"this state is of the candidates {sorted(state['candidates'])}, there are {sorted(self.candidates)}"
            )
        for name, part in state["candidates"].items():
            self.candidates[name].load_state_dict(part)
        self.choice, self.calls, self._owed, self.link = state["choice"], int(state["calls"]), dict(state["owed"]), None

    def __repr__(self) -> str:
        """What must be alike on all workers."""
        return f"Auto({self.candidates!r}, every={self.every}, change={self.change:g})"

    def _decide(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> None:
        self.link, before = self.probe(), self.choice
        with torch.no_grad():
            works = {name: candidate.rehearse(tensors, keys) for name, candidate in self.candidates.items()}
        seconds = agreed(self.share, [work.seconds for work in works.values()])
        self.works = {
            name: Work(**{**asdict(work), "seconds": slowest})
            for (name, work), slowest in zip(works.items(), seconds, strict=True)
        }
        prices = self.prices()
        self.choice = min(prices, key=lambda name: prices[name])
        if self.choice != before:
            self._owed = self.candidates[before].release()
        self._taken, self._usual = [], None

    def _changed(self) -> bool:
        """Whether exchanges take another time than they did; asked of all workers, so all say the same."""
        (now,) = agreed(self.share, [median(self._taken)])
        self._taken = []
        if self._usual is None:
            self._usual = now
        return not 1.0 / self.change < now / max(self._usual, 1e-9) < self.change
