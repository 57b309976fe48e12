"""An exchange that chooses among others by what they cost on the present link."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from noctule.core.exchange import Cost, Exchange, Wrapped
from noctule.core.finite import all_finite
from noctule.core.remap import Remap
from noctule.exchange.probe import LinkEstimate, agreed
from noctule.exchange.residuals import Residuals

_TURN = 3
"""Exchanges in a turn of a candidate; the first is not counted, since it also sends what others owed."""
_TRY_WITHIN, _TRY_PLAIN_WITHIN = 4.0, 20.0
"""Candidates predicted to take up to 4 times as long as the cheapest are timed too, and the plain one up to 20 times: predictions
miss what overlaps with backward or slows it down, and most of all the plain one's."""
_DROP_AT, _DROP_LATER_AT = 1.5, 1.2
"""A candidate is not timed again once it is 1.5 times as slow as the fastest in its first turn, or 1.2 times in all of several."""
_KEEP_PLAIN_WITHIN = 1.1
"""The plain candidate, which leaves nothing out, is chosen if it is at most 1.1 times as slow as the fastest, in its exchanges or
in whole steps: an exchange is a part of a step only."""
_CHANGED = 1.5
"""The link has changed once exchanges take 1.5 times as long as before, or as little."""


class Auto(Wrapped):
    """An exchange that uses the cheapest of several candidates, and chooses again when the link changes.

    At the first exchange each candidate gets a predicted time: encoding and decoding, as timed on the tensors themselves, plus
    bytes over the measured bandwidth, plus rounds times the latency. Candidates near the cheapest, and the plain one, then take
    turns in the next exchanges. The fastest is chosen, or the plain one where its exchanges, or whole steps with it, are hardly
    slower: no prediction knows what overlaps with a backward pass, or slows it down. All workers choose alike. The residuals of a
    candidate that is no longer used are sent by the next one, so nothing is lost.

    Args:
        candidates: exchanges by name; the first should be the plain one, which is timed where it is anywhere near, and preferred
            where others are hardly faster.
        probe: measures the link, such as ``lambda: probe_link(Group())``.
        every: the number of exchanges after which their times are compared with those before.
        turns: the number of turns of each candidate that is timed; 0 to choose by the predictions.
        clock: returns seconds.

    Raises:
        ValueError: there are no candidates, or an option is out of its range.
    """

    def __init__(
        self,
        candidates: Mapping[str, Exchange],
        *,
        probe: Callable[[], LinkEstimate],
        every: int = 50,
        turns: int = 5,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not candidates or every < 1 or turns < 0:
            raise ValueError(
                f"choosing needs candidates, a look at the times at least at every exchange and no turns or more, got "
                f"{list(candidates)}, every={every} and turns={turns}"
            )
        self.candidates, self.probe, self.every, self.turns = dict(candidates), probe, every, turns
        self.plain = self.choice = next(iter(self.candidates))
        self.link: LinkEstimate | None = None
        self.costs: dict[str, Cost] = {}
        """The cost of each candidate, by name, at the worker where it is highest."""
        self.seconds: dict[str, list[float]] = {}
        """The time of an exchange at the slowest worker, for each candidate that was timed: a number for each turn."""
        self.steps: dict[str, list[float]] = {}
        """The same from the end of one exchange to that of the next."""
        self.calls = 0
        """The number of exchanges done."""
        self._clock = clock
        self._residuals = Residuals()
        self._turns: list[str] = []  # the candidate whose turn it is, and those of the turns to come
        self._taken: list[float] = []  # the seconds of each exchange in this turn, or since the last look at the times
        self._ends: list[float] = []
        self._usual: float | None = None
        self._began = 0.0

    @property
    @override
    def inner(self) -> Exchange:
        return self.candidates[self.choice]

    @override
    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        candidate = self.begin(tensors, keys)
        totals = candidate(self.corrected(tensors, keys), keys)
        self.finished(delivered=not self.corrects or all(map(all_finite, totals)))
        return totals

    @override
    def begin(self, likes: Sequence[Tensor], keys: Sequence[str]) -> Exchange:
        self._residuals.begin()
        if self.link is None:
            self._predict(likes, keys)
        elif self._turns and len(self._taken) >= _TURN:
            self._next_turn()
        elif self.settled and len(self._taken) >= self.every and self._has_changed():
            self._predict(likes, keys)
        self._began = self._clock()
        return self.inner

    @property
    @override
    def corrects(self) -> bool:
        return bool(self._residuals)

    @override
    def corrected(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        return self._residuals.corrected(tensors, keys) if self.inner.counts else list(tensors)

    @override
    def finished(self, *, delivered: bool) -> None:
        if delivered:
            self._residuals.delivered()
        self._ends.append(self._clock())
        self._taken.append(self._ends[-1] - self._began)
        self.calls += 1

    @property
    def settled(self) -> bool:
        """Whether a candidate is chosen, and no others are being timed."""
        return self.link is not None and not self._turns

    def predictions(self) -> dict[str, float]:
        """The predicted seconds of an exchange with each candidate."""
        link = self.link
        if link is None:
            return {}
        return {name: cost.seconds + link.seconds(cost.sent_bytes, cost.rounds) for name, cost in self.costs.items()}

    def why(self) -> str:
        """The reason of the choice: what was measured, a line for each candidate."""
        if self.link is None:
            return "nothing was exchanged yet"
        lines = [f"{self.choice}, because the link has {self.link}:"]
        for name, seconds in sorted(self.predictions().items(), key=lambda item: item[1]):
            cost = self.costs[name]
            line = f"  {name}: {seconds * 1e3:.2f} ms = {cost.seconds * 1e3:.2f} ms of work, {cost.sent_bytes / 1e6:.3f} MB, "
            timed = ""
            if name in self.seconds:
                took, step = (1e3 * median(several[name]) for several in (self.seconds, self.steps))
                timed = f"; took {took:.2f} ms, in steps of {step:.2f} ms"
            lines.append(f"{line}{cost.rounds} rounds{timed}")
        return "\n".join(lines)

    @override
    def groups(self) -> tuple[object, ...]:
        return tuple(group for candidate in self.candidates.values() for group in candidate.groups())

    @override
    def release(self) -> dict[str, Tensor]:
        self._residuals.begin()
        self._residuals.add(self.inner.release())
        return self._residuals.release()

    @override
    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        for candidate in self.candidates.values():
            candidate.remapped(key, remap, shape)
        self._residuals.remapped(key, remap, shape)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The candidates' states, and the choice; resuming chooses anew, since the link may be another one."""
        return {
            "choice": self.choice,
            "calls": self.calls,
            "owed": self._residuals.state_dict(),
            "candidates": {name: candidate.state_dict() for name, candidate in self.candidates.items()},
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: the state is of other candidates.
        """
        if set(state["candidates"]) != set(self.candidates):
            raise ValueError(
                f"this state is of the candidates {sorted(state['candidates'])}, there are {sorted(self.candidates)}"
            )
        for name, part in state["candidates"].items():
            self.candidates[name].load_state_dict(part)
        self.choice, self.calls = state["choice"], int(state["calls"])
        self._residuals.load_state_dict(state["owed"])
        self.link, self._turns = None, []

    @override
    def __repr__(self) -> str:
        return f"Auto({self.candidates!r}, every={self.every}, turns={self.turns})"

    def _predict(self, likes: Sequence[Tensor], keys: Sequence[str]) -> None:
        """Measure the link, choose the candidate that should be the fastest, and have candidates near it take turns."""
        self.link = self.probe()
        with torch.no_grad():
            for _ in range(2):  # the first time also touches memory
                costs = [candidate.rehearse(likes, keys) for candidate in self.candidates.values()]
        numbers = [number for cost in costs for number in (cost.seconds, cost.sent_bytes, cost.rounds)]
        highest = iter(agreed(self.share, numbers))
        self.costs = {name: Cost(next(highest), next(highest), round(next(highest))) for name in self.candidates}
        self._usual, self.seconds, self.steps = None, {}, {}
        self._forget_times()
        predicted = self.predictions()
        first, *others = sorted(predicted, key=lambda name: predicted[name])
        within = {name: _TRY_PLAIN_WITHIN if name == self.plain else _TRY_WITHIN for name in others}
        near = [name for name in others if predicted[name] < within[name] * predicted[first]]
        self._turns = [first, *near] * self.turns if near else []
        self._choose(first)

    def _next_turn(self) -> None:
        """Note the times of this turn; go on to the next turn, or to the fastest candidate if no other can be as fast."""
        least = min(self._taken[1:]), min(end - begin for begin, end in pairwise(self._ends))
        seconds, step = agreed(self.share, least)
        self.seconds.setdefault(self.choice, []).append(seconds)
        self.steps.setdefault(self.choice, []).append(step)
        fastest = min(self.seconds, key=lambda name: median(self.seconds[name]))
        limit = median(self.seconds[fastest])
        slow = {
            name
            for name, several in self.seconds.items()
            if min(several) > (_DROP_LATER_AT if len(several) > 1 else _DROP_AT) * limit
        }
        self._turns = [name for name in self._turns[1:] if name not in slow]
        if set(self._turns) <= {fastest}:
            self._turns = []
        self._forget_times()
        timed = [x for x in (self.seconds, self.steps) if self.plain in x]
        if any(median(x[self.plain]) <= _KEEP_PLAIN_WITHIN * median(x[fastest]) for x in timed):
            fastest = self.plain
        self._choose(self._turns[0] if self._turns else fastest)

    def _choose(self, name: str) -> None:
        if name != self.choice:
            self._residuals.add(self.inner.release())
            self.choice = name

    def _has_changed(self) -> bool:
        """Whether exchanges take another time than they did, at the slowest worker, so that all workers say the same."""
        (now,) = agreed(self.share, [median(self._taken)])
        self._forget_times()
        if self._usual is None:
            self._usual = now
        return not 1.0 / _CHANGED < now / max(self._usual, 1e-9) < _CHANGED

    def _forget_times(self) -> None:
        self._taken, self._ends = [], []
