"""Noctule: train, shrink and ship neural networks on the hardware people have.

The public names, each loaded on first use. Importing the package itself imports nothing else; it only sees to it that torch finds
our operators when an exported program asks for them, and that transformers loads sparse layers and peft adapts them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from noctule.on_import import on_import
from noctule.registration import offer

__version__ = "0.1.0"

_HOME = {
    "AllReLU": "layers",
    "Batches": "data",
    "Checkpoints": "checkpoint",
    "Conversion": "convert",
    "Dataset": "data",
    "Decay": "decay",
    "ExponentialAverage": "average",
    "FuseEpilogue": "layers",
    "ImportancePruning": "prune",
    "KeepLayout": "layers",
    "Method": "method",
    "Remap": "topology",
    "Rewire": "rewire",
    "RunFolder": "report",
    "Session": "method",
    "SparseConv2d": "layers",
    "SparseLinear": "layers",
    "SparseMLPClassifier": "estimators",
    "SparseMLPRegressor": "estimators",
    "ToDense": "layers",
    "ToSparse": "layers",
    "Topology": "topology",
    "attach": "method",
    "convert_": "convert",
    "ctre": "rewire",
    "erdos_renyi": "budget",
    "evaluate": "loop",
    "fit": "loop",
    "follow": "followers",
    "footprint": "measure",
    "gse": "rewire",
    "keep_freed_memory": "allocator",
    "load_model": "checkpoint",
    "merge": "topology",
    "mlp": "models",
    "param_groups": "optim",
    "resize": "topology",
    "rigl": "rewire",
    "save_model": "checkpoint",
    "set_": "rewire",
    "shrink": "prune",
    "uniform": "budget",
    "write_report": "report",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from noctule.allocator import keep_freed_memory
    from noctule.average import ExponentialAverage
    from noctule.budget import erdos_renyi, uniform
    from noctule.checkpoint import Checkpoints, load_model, save_model
    from noctule.convert import Conversion, convert_
    from noctule.data import Batches, Dataset
    from noctule.decay import Decay
    from noctule.estimators import SparseMLPClassifier, SparseMLPRegressor
    from noctule.followers import follow
    from noctule.layers import AllReLU, FuseEpilogue, KeepLayout, SparseConv2d, SparseLinear, ToDense, ToSparse
    from noctule.loop import evaluate, fit
    from noctule.measure import footprint
    from noctule.method import Method, Session, attach
    from noctule.models import mlp
    from noctule.optim import param_groups
    from noctule.prune import ImportancePruning, shrink
    from noctule.report import RunFolder, write_report
    from noctule.rewire import Rewire, ctre, gse, rigl, set_
    from noctule.topology import Remap, Topology, merge, resize


offer()
on_import("peft", lambda: import_module("noctule.layers.lora").know_sparse_layers())
on_import("transformers.quantizers.auto", lambda: import_module("noctule.layers.hugging_face"))


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'noctule' has no attribute {name!r}")
    value = getattr(import_module(f"noctule.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]
