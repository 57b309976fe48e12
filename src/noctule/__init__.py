"""Noctule: train, shrink and ship neural networks on the hardware people have.

The public names, each loaded on first use. Importing the package imports nothing else: hooks on the imports of torch, transformers
and peft register our operators, sparse layers and adapters there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from noctule.core.on_import import offer_operators, on_import

__version__ = "0.1.0"

_HOME = {
    "AllReLU": "sparse.layers",
    "Batches": "data",
    "Checkpoints": "checkpoint",
    "Conversion": "core.convert",
    "Dataset": "data",
    "Decay": "sparse.rewire.decay",
    "ExponentialAverage": "sparse.average",
    "Factor": "compress.factor",
    "FuseEpilogue": "sparse.layers",
    "ImportancePruning": "compress.shrink",
    "KeepLayout": "sparse.layers",
    "Method": "core.method",
    "Prune": "compress.prune",
    "Remap": "core.remap",
    "Rewire": "sparse.rewire",
    "RunFolder": "report",
    "Session": "core.method",
    "SparseConv2d": "sparse.layers",
    "SparseLinear": "sparse.layers",
    "SparseMLPClassifier": "estimators",
    "SparseMLPRegressor": "estimators",
    "StaticInt8": "compress.quantize",
    "ToDense": "sparse.layers",
    "ToSparse": "sparse.layers",
    "Topology": "core.topology",
    "WeightOnly": "compress.quantize",
    "attach": "core.method",
    "compress_saved": "memory",
    "card_of": "deploy",
    "convert_": "core.convert",
    "ctre": "sparse.rewire",
    "erdos_renyi": "sparse.budget",
    "evaluate": "train.fit",
    "export": "deploy",
    "fit": "train.fit",
    "follow": "sparse.follow",
    "footprint": "measure",
    "gradual_magnitude": "compress.prune",
    "gse": "sparse.rewire",
    "keep_freed_memory": "measure.allocator",
    "load_model": "checkpoint",
    "merge": "core.remap",
    "mlp": "models",
    "param_groups": "core.optim",
    "rebuild": "compress.shrink",
    "resize": "core.remap",
    "rigl": "sparse.rewire",
    "save_model": "checkpoint",
    "set_": "sparse.rewire",
    "shrink": "compress.shrink",
    "taps": "compress.distill",
    "uniform": "sparse.budget",
    "write_report": "report",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from noctule.checkpoint import Checkpoints, load_model, save_model
    from noctule.compress.distill import taps
    from noctule.compress.factor import Factor
    from noctule.compress.prune import Prune, gradual_magnitude
    from noctule.compress.quantize import StaticInt8, WeightOnly
    from noctule.compress.shrink import ImportancePruning, rebuild, shrink
    from noctule.core.convert import Conversion, convert_
    from noctule.core.method import Method, Session, attach
    from noctule.core.optim import param_groups
    from noctule.core.remap import Remap, merge, resize
    from noctule.core.topology import Topology
    from noctule.data import Batches, Dataset
    from noctule.deploy import card_of, export
    from noctule.estimators import SparseMLPClassifier, SparseMLPRegressor
    from noctule.measure import footprint
    from noctule.measure.allocator import keep_freed_memory
    from noctule.memory import compress_saved
    from noctule.models import mlp
    from noctule.report import RunFolder, write_report
    from noctule.sparse.average import ExponentialAverage
    from noctule.sparse.budget import erdos_renyi, uniform
    from noctule.sparse.follow import follow
    from noctule.sparse.layers import AllReLU, FuseEpilogue, KeepLayout, SparseConv2d, SparseLinear, ToDense, ToSparse
    from noctule.sparse.rewire import Rewire, ctre, gse, rigl, set_
    from noctule.sparse.rewire.decay import Decay
    from noctule.train.fit import evaluate, fit


on_import("torch", offer_operators)
on_import("peft", lambda: import_module("noctule.sparse.layers.lora"))
on_import("transformers.quantizers.auto", lambda: import_module("noctule.sparse.layers.hugging_face"))


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
