"""Dataclasses from JSON and back: each field by its type, and nothing that the type does not allow."""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

LARGEST = 2**31 - 1
"""Of any whole number in a file: sizes, strides, places."""

Tensors = Mapping[str, np.ndarray]


class ModelFileError(ValueError):
    """A file of a model is torn, foreign, too new, or says something that cannot be."""


def parse(kind: Any, data: Any, where: str, tensors: Tensors) -> Any:
    """Make a value of a type from JSON.

    Args:
        kind: a dataclass, or the type of one of its fields.
        data: what JSON has there.
        where: the path to it, for errors.
        tensors: arrays by name; JSON holds their names.

    Raises:
        ModelFileError: the JSON is not of this type; the text names the field.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in inner:
            return None
        return parse(next(t for t in inner if t is not type(None)), data, where, tensors)
    if origin is Literal:
        return _sound(
            data, type(data) is type(inner[0]) and data in inner, where, f"one of {', '.join(map(str, inner))}"
        )
    if origin is tuple:
        each = inner[:1] * len(data) if isinstance(data, list) and inner[-1] is Ellipsis else inner
        _sound(data, isinstance(data, list) and len(data) == len(each), where, f"a list of {len(inner)}")
        return tuple(parse(t, x, f"{where}[{k}]", tensors) for k, (t, x) in enumerate(zip(each, data, strict=True)))
    if kind is np.ndarray:
        _sound(data, isinstance(data, str) and data in tensors, where, "the name of a tensor of the file")
        return tensors[data]
    if is_dataclass(kind):
        return _parse_fields(kind, data, where, tensors)
    if kind is int:
        return _sound(data, type(data) is int and abs(data) <= LARGEST, where, f"a whole number up to {LARGEST}")
    if kind is float:
        number = type(data) in (int, float) and abs(data) < 3.4e38 and math.isfinite(data)
        return float(_sound(data, number, where, "a finite float32"))
    return _sound(data, type(data) is kind, where, f"a {kind.__name__}")


def unparse(value: Any, name: str, tensors: dict[str, np.ndarray]) -> Any:
    """Make JSON of a value that `parse` takes, and add the arrays in it to ``tensors`` under names that begin with ``name``."""
    if isinstance(value, np.ndarray):
        tensors[name] = value
        return name
    if is_dataclass(value):
        held = ((f, getattr(value, f.name)) for f in fields(value))
        return {
            f.name: unparse(x, f"{name}.{f.name}", tensors)
            for f, x in held
            if f.default is MISSING or _differ(x, f.default)
        }
    if isinstance(value, tuple):
        return [unparse(x, f"{name}.{k}", tensors) for k, x in enumerate(value)]
    return value


def _parse_fields(kind: Any, data: Any, where: str, tensors: Tensors) -> Any:
    known = {f.name: f for f in fields(kind)}
    _sound(data, isinstance(data, dict), where, f"an object with {', '.join(known)}")
    if unknown := [*data.keys() - known.keys()]:
        raise ModelFileError(f"{where} has an unknown field {min(unknown)!r:.100}; it has {', '.join(known)}")
    if missing := [name for name, f in known.items() if f.default is MISSING and name not in data]:
        raise ModelFileError(f"{where} lacks {', '.join(missing)}")
    hints = get_type_hints(kind)
    given = {name: parse(hints[name], data[name], f"{where}.{name}", tensors) for name in known if name in data}
    try:
        return kind(**given)
    except ModelFileError:
        raise
    except ValueError as error:
        raise ModelFileError(f"{where}: {error}") from error


def _sound(data: Any, sound: bool, where: str, expected: str) -> Any:
    if not sound:
        raise ModelFileError(f"{where} must be {expected}, got {data!r:.100}")
    return data


def _differ(a: Any, b: Any) -> bool:
    return isinstance(a, np.ndarray) or a != b
