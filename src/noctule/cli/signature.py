"""A function's signature as command line options, and back."""

import argparse
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union

from noctule.core.errors import UsageError
from noctule.core.place import Place, absolute, nearest


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError` and suggests the nearest option for an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise UsageError(f"{message}. See {self.prog} --help")

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """Parse all of ``args``; what is left over is an error with a suggestion."""
        result, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            raise UsageError(
                f"{self.prog} has no argument {unknown[0]}{nearest(unknown[0].split('=')[0], known)}. See --help"
            )
        return result


def options(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function: its options, each with a default.

    Raises:
        UsageError: one has no default or a type that has no form on a command line.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    found: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if parameter.default is inspect.Parameter.empty or name not in hints:
            raise UsageError(f"the option {name} of {function.__name__} needs a type and a default value")
        found[name] = parameter.replace(annotation=hints[name])
    return found


def add_options(parser: argparse._ActionsContainer, function: Callable[..., Any]) -> None:
    """One ``--option`` for each keyword-only parameter, with its type, default and the text of the docstring."""
    texts: dict[str, str] = {}
    for each in reversed(function.__mro__) if isinstance(function, type) else [function]:
        texts |= _docstring_args(inspect.cleandoc(each.__doc__ or ""))
    for name, parameter in options(function).items():
        flag, default = "--" + name.replace("_", "-"), parameter.default
        kind, _ = _without_none(parameter.annotation)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = texts.get(name, "").replace("%", "%%") + ("" if default is None else f" (default: {shown})")
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "dest": name}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif typing.get_origin(kind) is Literal:
            parser.add_argument(flag, type=_one_of(typing.get_args(kind)), metavar=_braces(kind), **common)
        elif typing.get_origin(kind) is tuple and typing.get_args(kind)[1:] == (...,):
            item = typing.get_args(kind)[0]
            parser.add_argument(flag, nargs="*", type=item, metavar=item.__name__.upper(), action=_Tuple, **common)
        elif place := _place(kind):
            parser.add_argument(flag, type=place, metavar="PATH", **common)
        elif kind is Path:
            parser.add_argument(flag, type=absolute, metavar="PATH", **common)
        elif kind in (int, float, str):
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), **common)
        else:
            raise UsageError(
                f"the option {name} of {function.__name__} has the type {kind}, which has no form on a command line"
            )


def from_json(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Option values that were kept as JSON, in the types of the signature."""
    known = options(function)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UsageError(f"{function.__name__} has no option {unknown[0]}{nearest(unknown[0], list(known))}")
    return {name: _typed(known[name].annotation, value) for name, value in values.items()}


def _one_of(choices: tuple[Any, ...]) -> Callable[[str], Any]:
    """Reads one of some values; ArgumentTypeError with the nearest for any other."""

    def read(text: str) -> Any:
        for choice in choices:
            if str(choice) == text:
                return choice
        names = [str(choice) for choice in choices]
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r}{nearest(text, names)}, choose from {', '.join(names)}"
        )

    return read


def _braces(kind: Any) -> str:
    return "{" + ",".join(map(str, typing.get_args(kind))) + "}"


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values or ()))


def _typed(annotation: Any, value: Any) -> Any:
    kind, _ = _without_none(annotation)
    if _place(kind):
        kind = typing.get_args(kind)[0]
    if value is None or kind in (bool, Any) or typing.get_origin(kind) is Literal:
        return value
    if typing.get_origin(kind) is tuple:
        return tuple(typing.get_args(kind)[0](item) for item in value)
    return kind(value)


def _place(annotation: Any) -> Place | None:
    if typing.get_origin(annotation) is Annotated:
        return next((each for each in annotation.__metadata__ if isinstance(each, Place)), None)
    return None


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        if len(kinds) == 1:
            return kinds[0], True
    return annotation, False


def _docstring_args(text: str) -> dict[str, str]:
    """What the ``Args:`` part of a docstring says of each parameter, on one line."""
    part = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", text, re.MULTILINE)
    if not part:
        return {}
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", part[1], re.MULTILINE)
    return {name: re.sub(r"\s+", " ", entry).strip() for name, entry in entries}
