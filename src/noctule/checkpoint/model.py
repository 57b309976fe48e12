"""A trained model as plain safetensors, which any tool reads, and its structure as JSON."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from noctule.checkpoint.atomic import replacing
from noctule.checkpoint.file import MALFORMED, VERSION, read, write
from noctule.checkpoint.tree import pack, unpack
from noctule.core.errors import CheckpointError


def save_model(path: str | os.PathLike, state: dict[str, Any], structure: dict[str, Any]) -> None:
    """Write a model as `model.safetensors`, which any tool reads, and `model.json`, its structure.

    `path` is a folder, or a file named *.safetensors. `state` is a `state_dict()`: tensors inside extra states get
    dotted names ("0._extra_state.columns"), what is not a tensor goes to the JSON. `structure` is plain JSON.

    Raises CheckpointError where something cannot be kept or the disk is full.
    """
    weights_path, json_path = _model_paths(Path(path))
    try:
        plain = json.loads(json.dumps(structure, allow_nan=False)) == structure
    except (TypeError, ValueError, RecursionError):
        plain = False
    if not plain:
        raise CheckpointError(
            f"a structure is plain JSON (dicts with str keys, lists, numbers, str), not {structure!r:.200}"
        )
    tree, tensors = pack(state)
    checksum = write(weights_path, tensors, {"format": "pt"}, stamp=False)
    entries = {
        "format": "noctule-model",
        "version": VERSION,
        "structure": structure,
        "checksum": checksum,
        "state": tree,
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
    with replacing(json_path) as file:
        file.write(f"{{\n{lines}\n}}\n".encode())


def load_model(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `save_model` wrote: (state, structure), tensors on the CPU.

    Raises CheckpointError where a file is missing, damaged or foreign, or the two do not belong together; warns where
    the weights were changed since.
    """
    weights_path, json_path = _model_paths(Path(path))
    try:
        entries = json.loads(json_path.read_bytes())
        if entries["format"] != "noctule-model" or entries["version"] > VERSION:
            raise ValueError(f"format {entries['format']!r}, version {entries['version']!r}")
        tree, structure, checksum = entries["state"], entries["structure"], entries["checksum"]
    except OSError as error:
        raise CheckpointError(f"cannot read {json_path}, the structure of the model: {error.strerror}") from error
    except MALFORMED as error:
        raise CheckpointError(f"{json_path} is no model structure that this version can read ({error!r})") from error
    tensors, _, found = read(weights_path, checkpoint=False)
    try:
        state = unpack(tree, tensors)
    except MALFORMED as error:
        raise CheckpointError(f"{weights_path} and {json_path} do not belong together ({error!r})") from error
    if tensors:
        raise CheckpointError(f"{weights_path} has tensors that {json_path} does not know: {', '.join(tensors)}")
    if found != checksum:
        warnings.warn(f"{weights_path} was changed, or damaged, since {json_path} was written", stacklevel=2)
    return state, structure


def _model_paths(path: Path) -> tuple[Path, Path]:
    weights_path = path if path.suffix == ".safetensors" else path / "model.safetensors"
    return weights_path, weights_path.with_suffix(".json")
