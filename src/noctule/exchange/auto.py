"""Choose how to exchange by what it costs on the link that is really there."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from noctule.core.exchange import Exchange, Work
from noctule.core.finite import all_finite
from noctule.core.remap import Remap
from noctule.exchange.probe import LinkEstimate, agreed

_TURN = 3
"""Exchanges of a candidate in a turn; the first does not count."""
_WORTH, _PLAIN_WORTH = 4.0, 20.0
"""How many times as much as the cheapest a candidate, and the plain one, may cost for a price to be no proof."""
_SLOW = 1.5, 1.2
"""How many times as slow as the best a candidate may be, after its first turn and after more, to get another."""

_PLAIN_STAYS = 1.1
"""How many times as slow as the best the plain one, which leaves nothing out, may be to be chosen all the same, in its exchanges or
in whole steps: an exchange that is half of a step may well be a little slower."""


class Auto(Exchange):
    """Whichever candidate is the cheapest on the link that is there.

    At the first exchange each gets a price: encoding and decoding, as timed on the tensors themselves, plus bytes over the measured
    bandwidth, plus rounds times the latency. Those whose price is not far from the lowest, and the first one, then do the next
    exchanges in turns, and the fastest stays, or the plain one where its exchanges, or whole steps with it, are hardly slower: what
    hides behind a backward pass, or slows it down, no price knows. All workers decide alike, and again when exchanges have become
    slower or faster than they were. What a candidate that was left still owed is sent by the next one, so nothing is lost.

    Args:
        candidates: by name; the first should be the plain one, which is tried where it is anywhere near, and stays where others are
            hardly faster.
        probe: measures the link, such as ``lambda: probe_link(Group())``.
        every: exchanges from one look at the times to the next.
        change: how many times as slow, or as fast, the link must have become.
        turns: of each candidate that is tried; 0 to go by the price.

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
        turns: int = 5,
    ) -> None:
        """Nothing is measured yet."""
        if not candidates or every < 1 or not change > 1.0 or turns < 0:
            raise ValueError(
                f"choosing needs candidates, a look at least at every exchange, a change above 1 and no turns or more, got "
                f"{list(candidates)}, every={every}, change={change} and turns={turns}"
            )
        self.candidates, self.probe = dict(candidates), probe
        self.every, self.change, self.turns = every, change, turns
        self.choice = next(iter(self.candidates))
        self.link: LinkEstimate | None = None
        self.works: dict[str, Work] = {}
        """What each candidate takes, by name; of the worker that it takes most."""
        self.seconds: dict[str, list[float]] = {}
        """What the exchanges of those that were tried took the slowest worker, one number a turn."""
        self.steps: dict[str, list[float]] = {}
        """The same from the end of one exchange to that of the next."""
        self.calls = 0
        self._tries: list[str] = []  # whose turns they are, from this one on
        self._taken: list[float] = []
        self._ends: list[float] = []  # when those were done
        self._usual: float | None = None
        self._owed: dict[str, Tensor] = {}
        self._paying: dict[str, Tensor] = {}  # what of it is under way

    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """As the cheapest candidate does it, or the one whose turn it is."""
        candidate = self.turn(tensors, keys)
        started = time.perf_counter()
        totals = candidate(self.paid(tensors, keys), keys)
        self.took(time.perf_counter() - started, taken=not self.owes or all(map(all_finite, totals)))
        return totals

    # The three parts of a call, for whoever makes the exchange in another way, such as in pieces while backward goes on.

    def turn(self, likes: Sequence[Tensor], keys: Sequence[str]) -> Exchange:
        """Who does the next exchange, of tensors like these."""
        self._owed |= self._paying  # of an exchange that failed, or whose step is skipped
        self._paying = {}
        if self.link is None:
            self._price(likes, keys)
        elif self._tries and len(self._taken) >= _TURN:
            self._next_turn()
        elif not self._tries and len(self._taken) >= self.every and self._changed():
            self._price(likes, keys)
        return self.candidates[self.choice]

    def paid(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """The tensors, and what candidates that were left owed of them; it is paid when `took` says that it was taken."""
        if not self.candidates[self.choice].counts:
            return list(tensors)
        self._paying |= {key: self._owed.pop(key) for key in keys if key in self._owed}
        return [
            x + self._paying[key].view_as(x).to(x) if key in self._paying else x
            for x, key in zip(tensors, keys, strict=True)
        ]

    def took(self, seconds: float, *, taken: bool = True) -> None:
        """An exchange is done: so much later than if there had been none; where its step is skipped, nobody has taken it."""
        if taken:
            self._paying = {}
        self._taken.append(seconds)
        self._ends.append(time.perf_counter())
        self.calls += 1

    @property
    def owes(self) -> bool:
        """Whether something that candidates owed that were left is not taken yet."""
        return bool(self._owed or self._paying)

    @property
    def settled(self) -> bool:
        """Whether there is a choice, and nobody is being tried."""
        return self.link is not None and not self._tries

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
            line = f"  {name}: {seconds * 1e3:.2f} ms = {work.seconds * 1e3:.2f} ms of work, {work.sent_bytes / 1e6:.3f} MB, "
            tried = ""
            if name in self.seconds:
                took, step = (1e3 * median(several[name]) for several in (self.seconds, self.steps))
                tried = f"; took {took:.2f} ms, in steps of {step:.2f} ms"
            lines.append(f"{line}{work.rounds} rounds{tried}")
        return "\n".join(lines)

    def share(self, message: bytes) -> list[bytes]:
        """What every worker has to say, in their order."""
        return self.candidates[self.choice].share(message)

    def release(self) -> dict[str, Tensor]:
        """What is owed."""
        owed, self._owed, self._paying = self._owed | self._paying, {}, {}
        for key, more in self.candidates[self.choice].release().items():
            owed[key] = owed[key] + more.view_as(owed[key]) if key in owed else more
        return owed

    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        """The numbers of this key changed their places."""
        for candidate in self.candidates.values():
            candidate.remapped(key, remap, shape)
        for owed in (self._owed, self._paying):
            if key in owed:
                owed[key] = remap.apply(owed[key].flatten()).view(shape)

    def state_dict(self) -> dict[str, Any]:
        """The candidates', and what was chosen: resuming decides anew, since the link may be another one."""
        return {
            "choice": self.choice,
            "calls": self.calls,
            "owed": self._owed | self._paying,
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
        self.choice, self.calls, self._owed = state["choice"], int(state["calls"]), dict(state["owed"])
        self._paying = {}
        self.link, self._tries = None, []

    def __repr__(self) -> str:
        """What must be alike on all workers."""
        return f"Auto({self.candidates!r}, every={self.every}, change={self.change:g}, turns={self.turns})"

    def _price(self, likes: Sequence[Tensor], keys: Sequence[str]) -> None:
        self.link = self.probe()
        with torch.no_grad():
            for _ in range(2):  # the first time also touches memory
                works = [candidate.rehearse(likes, keys) for candidate in self.candidates.values()]
        numbers = [number for work in works for number in (work.seconds, work.sent_bytes, work.rounds)]
        most = iter(agreed(self.share, numbers))
        self.works = {name: Work(next(most), next(most), round(next(most))) for name in self.candidates}
        self._usual, self.seconds, self.steps = None, {}, {}
        self._forget()
        prices = self.prices()
        first, *others = sorted(prices, key=lambda name: prices[name])
        plain = next(iter(self.candidates))
        worth = [name for name in others if prices[name] < (_PLAIN_WORTH if name == plain else _WORTH) * prices[first]]
        self._tries = [first, *worth] * self.turns if worth else []
        self._choose(first)

    def _next_turn(self) -> None:
        """Note how the one whose turn it was did, and go on to the next, or to the fastest where nobody is left to beat it."""
        least = min(self._taken[1:]), min(end - begin for begin, end in pairwise(self._ends))
        seconds, step = agreed(self.share, least)  # the first has much to catch up on, and to send
        self.seconds.setdefault(self.choice, []).append(seconds)
        self.steps.setdefault(self.choice, []).append(step)
        fastest = min(self.seconds, key=lambda name: median(self.seconds[name]))
        limit = median(self.seconds[fastest])
        slow = {name for name, several in self.seconds.items() if min(several) > _SLOW[len(several) > 1] * limit}
        self._tries = [name for name in self._tries[1:] if name not in slow]
        if set(self._tries) <= {fastest}:
            self._tries = []
        self._forget()
        plain = next(iter(self.candidates))
        if any(median(x[plain]) <= _PLAIN_STAYS * median(x[fastest]) for x in (self.seconds, self.steps) if plain in x):
            fastest = plain
        self._choose(self._tries[0] if self._tries else fastest)

    def _choose(self, name: str) -> None:
        if name != self.choice:
            for key, owed in self.candidates[self.choice].release().items():
                self._owed[key] = self._owed[key] + owed.view_as(self._owed[key]) if key in self._owed else owed
            self.choice = name

    def _changed(self) -> bool:
        """Whether exchanges take another time than they did; asked of all workers, so all say the same."""
        (now,) = agreed(self.share, [median(self._taken)])
        self._forget()
        if self._usual is None:
            self._usual = now
        return not 1.0 / self.change < now / max(self._usual, 1e-9) < self.change

    def _forget(self) -> None:
        """How long exchanges took, before others are looked at."""
        self._taken, self._ends = [], []
