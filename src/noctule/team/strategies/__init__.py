"""Which ways of training together there are: one file a strategy. A name and options become a strategy here and nowhere else."""

import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any

from noctule.core.errors import UsageError
from noctule.core.place import nearest
from noctule.team.strategy import Strategy

DEFAULT = "sync"
"""The strategy where none is named."""


def names() -> list[str]:
    """The names of all strategies: those of the files in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def chosen(name: Any) -> type[Strategy]:
    """The class of a strategy.

    Raises:
        UsageError: there is none of that name.
    """
    known = names()
    if name not in known:
        raise UsageError(f"there is no strategy {name}{nearest(str(name), known)}. Strategies: {', '.join(known)}")
    module = import_module(f"{__name__}.{name}")
    return next(each for each in vars(module).values() if _is_strategy(each) and each.__module__ == module.__name__)


def made(facts: Mapping[str, Any]) -> Strategy:
    """The strategy of a name under ``strategy`` and its options, as a command line, a ticket, a ``run.json`` or a plan says them.

    Raises:
        UsageError: there is no such strategy, it has no such option, or the option cannot have that value.

    >>> made({"strategy": "ssp", "bound": 5}).bound
    5
    """
    options = {key: value for key, value in facts.items() if key != "strategy"}
    kind = chosen(facts.get("strategy", DEFAULT))
    for option in options:
        if option not in options_of(kind):
            raise UsageError(no_option(kind, option))
    try:
        return kind(**options)
    except ValueError as error:
        raise UsageError(str(error)) from error


def options_of(kind: type[Strategy]) -> list[str]:
    """The names of a strategy's options."""
    return [each.name for each in fields(kind)]


def no_option(kind: type[Strategy], option: str) -> str:
    """Says that a strategy does not have an option, and which have it, or which option of its own is nearest."""
    owners, flag = owners_of(option), option.replace("_", "-")
    if owners:
        return f"{kind.name} has no --{flag}: it is an option of {', '.join(owners)}"
    own = [f"--{each.replace('_', '-')}" for each in options_of(kind)]
    return f"{kind.name} has no --{flag}{nearest(f'--{flag}', own)}. Its options: {', '.join(own) or 'none'}"


def owners_of(option: str) -> list[str]:
    """The strategies that have an option of that name."""
    return [name for name in names() if option in options_of(chosen(name))]


def workers_and_strategy(together: Mapping[str, Any]) -> tuple[int | None, Strategy]:
    """How many workers, None for this process alone, and their strategy.

    Raises:
        UsageError: they do not go together.
    """
    workers = together.get("workers")
    options = {k: v for k, v in together.items() if k != "workers"}
    strategy = made(options)
    if workers is None and options:
        flags = ", ".join(f"--{k.replace('_', '-')}" for k in options)
        raise UsageError(f"{flags} needs --workers, how many train together")
    if workers is not None and (type(workers) is not int or workers < 1):
        raise UsageError(f"--workers must be at least 1, got {workers}")
    return workers, strategy


def _is_strategy(each: Any) -> bool:
    return isinstance(each, type) and issubclass(each, Strategy) and not inspect.isabstract(each)
