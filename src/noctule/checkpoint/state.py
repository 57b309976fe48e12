"""Training state in one checked file: a tree of plain values and tensors."""

import json
import os
from pathlib import Path
from typing import Any

from noctule.checkpoint.file import FORMAT, MALFORMED, VERSION, read, write
from noctule.checkpoint.tree import pack, unpack
from noctule.core.errors import CheckpointError


def save(path: str | os.PathLike, state: Any) -> None:
    """Write a tree of plain values and tensors to one file, whole or not at all.

    The tree is made of dicts (str, int or float keys), lists, tuples, None, bool, int, float, str, bytes and dense
    tensors; tensors that share memory, or are views, are copied. Devices and `requires_grad` are not kept.

    Raises CheckpointError, with what was at `path` intact, where something in the tree cannot be kept or the disk is
    full.

    >>> import tempfile, torch
    >>> path = tempfile.mkdtemp() + "/state.safetensors"
    >>> save(path, {"step": 3, "weights": torch.ones(2)})
    >>> load(path)
    {'step': 3, 'weights': tensor([1., 1.])}
    """
    tree, tensors = pack(state)
    metadata = {"format": FORMAT, "version": str(VERSION), "tree": json.dumps(tree, separators=(",", ":"))}
    write(Path(path), tensors, metadata, stamp=True)


def load(path: str | os.PathLike) -> Any:
    """Read what `save` wrote, with its types and dtypes, tensors on the CPU.

    Raises CheckpointError where the file is missing, torn, damaged, foreign or from a newer version.
    """
    tensors, metadata, checksum = read(Path(path), checkpoint=True)
    if checksum != metadata.get("checksum"):
        raise CheckpointError(f"{path} is damaged: its checksum is not that of its contents; use another checkpoint")
    try:
        return unpack(json.loads(metadata["tree"]), tensors)
    except MALFORMED as error:
        raise CheckpointError(f"{path} holds no tree that this version can read ({error!r})") from error
