"""A tree of plain values and tensors as JSON and named tensors, and back.

JSON has no tuples, bytes, NaN, or keys other than str: each becomes an object with one key, the name of the type.
"""

import base64
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from noctule.checkpoint.file import NAMES
from noctule.core.errors import CheckpointError


def pack(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree as plain JSON, and its tensors by name."""
    tensors: dict[str, Tensor] = {}
    try:
        return _packed(state, "", tensors), tensors
    except RecursionError:
        raise CheckpointError("cannot save a state that contains itself or is nested hundreds deep") from None


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    kind = type(value)  # exact: a numpy float is a float by inheritance, and would come back as another type
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if value.bit_length() < 64 else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if kind in (list, tuple):
        items = [_packed(item, f"{place}[{i}]", tensors) for i, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if kind in (dict, OrderedDict):
        pairs = []
        for key, item in value.items():
            if type(key) not in (str, int, float):
                raise CheckpointError(f"cannot save {place or 'the state'}: its key {key!r} is no str, int or float")
            label = _packed(key, place, tensors)
            inner = f"{place}[{label}]" if type(key) is not str else f"{place}.{key}" if place else key
            pairs.append([label, _packed(item, inner, tensors)])
        packed = {kind.__name__: pairs}
        if kind is OrderedDict and (versions := vars(value).get("_metadata")):  # those of a state_dict's modules
            packed["_metadata"] = _packed(versions, f"{place}._metadata", tensors)
        return packed
    if kind in (Tensor, torch.nn.Parameter):
        return {"tensor": _register(value, place, tensors)}
    what = f"a function, {value!r}" if callable(value) else f"a {kind.__module__}.{kind.__qualname__}"
    raise CheckpointError(
        f"cannot save {place or 'the state'}: it is {what}; a checkpoint holds dicts, lists, tuples, numbers, str, "
        "bytes, None and tensors: convert it to those"
    )


def _register(tensor: Tensor, place: str, tensors: dict[str, Tensor]) -> str:
    """Store a tensor by its place in the tree, with a suffix where that name is taken; returns the name."""
    if tensor.dtype not in NAMES or tensor.layout is not torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"cannot save {place or 'the state'}: a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device} has "
            "no form in safetensors; convert it first"
        )
    name = text = place.encode(errors="replace").decode() or "state"
    count = 1
    while name in tensors or name == "__metadata__":
        name = f"{text}#{(count := count + 1)}"
    tensors[name] = tensor
    return name


def unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`; takes each tensor it uses out of ``tensors``."""
    if isinstance(node, list):
        return [unpack(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    kind, content = next(iter(node.items()))
    match kind:
        case "tensor":
            return tensors.pop(content)
        case "dict":
            return {unpack(key, tensors): unpack(item, tensors) for key, item in content}
        case "OrderedDict":
            ordered = OrderedDict((unpack(key, tensors), unpack(item, tensors)) for key, item in content)
            if "_metadata" in node:
                ordered._metadata = unpack(node["_metadata"], tensors)  # pyright: ignore
            return ordered
        case "tuple":
            return tuple(unpack(item, tensors) for item in content)
        case "bytes":
            return base64.b64decode(content, validate=True)
        case "int":
            return int(content, 16)
        case "float":
            return float(content)
    raise ValueError(f"unknown kind of value {kind!r}")
