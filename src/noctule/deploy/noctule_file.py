"""Write a model as the file that `noctule.runtime` runs without torch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noctule.checkpoint.file import write
from noctule.deploy.graph import graph_of
from noctule.runtime.file import FORMAT, VERSION


def write_model(model: nn.Module, example: Tensor, path: Path, facts: dict[str, Any] | None = None) -> None:
    """Write the graph and the weights of a model; the file takes its name when it is complete.

    Raises:
        ExportError: a module of the model does what the runtime cannot.
        CheckpointError: the disk is full, or the folder cannot be written; what was there before stays.
    """
    arrays: dict[str, np.ndarray] = {}
    graph = graph_of(model, example, facts).to_json(arrays)
    tensors = {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}
    write(path, tensors, {"format": FORMAT, "version": str(VERSION), "graph": graph}, stamp=True)
