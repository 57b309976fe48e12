"""The contract of a strategy: what differs between the ways in which workers train together. Nothing here needs torch."""

import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from noctule.core.place import nearest

if TYPE_CHECKING:
    from noctule.core.exchange import Exchange
    from noctule.core.method import Method
    from noctule.exchange import Weigh
    from noctule.team.member import Team
    from noctule.transport.ticket import Ticket

Coding = Literal["none", "bf16", "natural", "topk", "powersgd", "auto"]
"""The names of what can travel between workers: see `noctule.team.building`."""
TensorCoding = Literal["none", "bf16", "natural", "topk"]
"""The codings that encode each tensor by itself, as a parameter server needs."""


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """A way in which workers train together.

    The fields of a subclass are its options on the command line, and the first line of its docstring is its help. Each strategy is
    the only one in a file of ``strategies/`` that has its name.

    Raises:
        ValueError: an option has a value that it cannot have.
    """

    name: ClassVar[str]
    """What ``--strategy`` calls it."""

    def __post_init__(self) -> None:
        """Refuse values of another type or choice than the fields have; subclasses refuse more."""
        hints = get_type_hints(type(self))
        for each in fields(self):
            _check(self.name, each.name, hints[each.name], getattr(self, each.name))

    @property
    def meet_every(self) -> int:
        """Steps from one meeting of the workers, or push and pull, to the next."""
        return 1

    @property
    def timeout_seconds(self) -> float:
        """The silence after which a worker is taken to be lost; the more steps between two meetings, the longer all are silent."""
        return min(29.0 + self.meet_every, 300.0)

    def rewire_every(self, every: int) -> int:
        """Steps from one move of connections to the next, right after a meeting, where ``every`` were asked for."""
        return -(-every // self.meet_every) * self.meet_every

    def facts(self) -> dict[str, Any]:
        """The name and all options as plain data, as `noctule.team.strategies.made` takes them."""
        return {"strategy": self.name} | {each.name: getattr(self, each.name) for each in fields(self)}

    def changed(self) -> dict[str, Any]:
        """The name, and the options that are not at their defaults."""
        kept = {each.name: getattr(self, each.name) for each in fields(self)}
        return {"strategy": self.name} | {f.name: kept[f.name] for f in fields(self) if kept[f.name] != f.default}


class GroupMember(Protocol):
    """A worker whose process group is formed anew when a worker is lost or joins."""

    broken: bool
    """Whether the group has lost a worker, so that the next one has to be formed."""


class GroupStrategy(Strategy):
    """A strategy whose workers meet in a process group."""

    @property
    def equal_weights(self) -> bool:
        """Whether all workers have the same weights after every step."""
        return False

    @property
    def exact_gradients(self) -> bool:
        """Whether workers exchange gradients, and get their mean up to rounding."""
        return False

    @property
    def regroup_every(self) -> int:
        """Steps from one moment at which a whole group may end, for a worker that waits to join, to the next.

        It is not asked where weights are equal: there a group may end before any exchange.
        """
        return self.meet_every

    @abstractmethod
    def exchange(self, weigh: "Weigh") -> "Exchange":
        """An exchange over the process group as it is; ``weigh`` says what a worker's gradients count."""

    @abstractmethod
    def methods(self, exchange: "Exchange", member: GroupMember, *, rewire_every: int | None) -> "Sequence[Method]":
        """What a worker attaches, after the method that moves connections.

        Args:
            exchange: what `exchange` made, anew in each group.
            member: the worker.
            rewire_every: steps from one move of connections to the next; None where none move. After such a step the workers must
                have the same weights.
        """


class RunningServer(Protocol):
    """A server that listens, until it is closed."""

    def ticket(self, worker: int) -> "Ticket":
        """What one worker needs to take part."""
        ...

    def close(self) -> None:
        """Keep everything and end."""
        ...


class Meeting(Protocol):
    """How a worker of a server finds the others, where they have to meet in a process group."""

    def form(self) -> None:
        """Be in a process group with all the others, once they have come."""
        ...

    def leave(self) -> None:
        """Be in none."""
        ...


class ServedStrategy(Strategy):
    """A strategy whose workers meet at a server."""

    needs_supervisor: ClassVar[bool] = False
    """Whether the workers must be started by one supervisor, and ``noctule server`` cannot serve them on other machines."""

    @abstractmethod
    def serve(
        self,
        *,
        workers: int,
        folder: Path | None = None,
        patience_seconds: float = 60.0,
        host: str = "127.0.0.1",
        port: int | None = None,
    ) -> RunningServer:
        """Start the server in threads of this process.

        Args:
            workers: how many must have joined before any may go on.
            folder: where it keeps its keys and its state, and goes on from; None for nowhere.
            patience_seconds: a worker that is silent for longer is not waited for.
            host: the address of this machine on which it listens.
            port: the first of its ports; None for any that are free.
        """

    @abstractmethod
    def team(self, ticket: "Ticket", *, workers: int, timeout_seconds: float, meeting: Meeting | None = None) -> "Team":
        """The team of one worker.

        Args:
            ticket: the worker's, from the server.
            workers: how many there are.
            timeout_seconds: for any one answer of the server.
            meeting: how it finds the others; None where the workers are on machines of their own.
        """


def _check(strategy: str, name: str, hint: Any, value: Any) -> None:
    """Raise ValueError if an option has a value that its type does not allow."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            known = get_args(kind)
            if value not in known:
                raise ValueError(
                    f"{strategy} has no {name} {value!r}{nearest(str(value), list(map(str, known)))}: "
                    f"{', '.join(map(str, known))}"
                )
            return
        if type(value) is kind or (kind is float and type(value) is int):
            return
    raise ValueError(f"the option {name} of {strategy} is {getattr(hint, '__name__', hint)}, got {value!r}")
