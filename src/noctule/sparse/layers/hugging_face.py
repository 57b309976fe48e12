"""Hugging Face models with sparse layers: ``save_pretrained`` says which layers are sparse, ``from_pretrained`` makes them so.

The seam is the one that quantised models use. ``config.quantization_config`` names the sparse layers; the class registered for it
puts them into the empty model before transformers loads the weights, which bring their places along. In between the model is
none that transformers takes for quantised: it trains, moves and saves like any other.

Imported as soon as transformers is (see ``noctule/__init__.py``); where Noctule was not imported at all, transformers warns of an
unknown quantization type and lists the weights that it does not find.
"""

import sys
import warnings
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import override

from noctule.core.convert import convert_
from noctule.core.topology import Topology
from noctule.kernels import IDENTITY, Epilogue
from noctule.sparse.layers.fuse import FuseEpilogue
from noctule.sparse.layers.sparse_layer import SparseLayer
from noctule.sparse.layers.to_sparse import ToSparse

METHOD = "noctule"
"""How the config of a model says that some of its layers are sparse."""


def note_sparse_layers(model: nn.Module) -> None:
    """Write into the config of a Hugging Face model, and of those inside it, which of its layers are sparse, or that none is.

    `convert_` does it. By hand it is needed only where sparse layers came into the model in another way.
    """
    for part in reversed([m for m in model.modules() if isinstance(m, _pretrained())]):
        _note(part)  # where several share a config, the names are those of the outermost


def _note(model: Any) -> None:
    mark = getattr(model.config, "quantization_config", None)
    method = mark.get("quant_method") if isinstance(mark, dict) else getattr(mark, "quant_method", None)
    converted = {name: m for name, m in model.named_modules() if hasattr(m, "to_dense") and _parts(m)}
    inner = {f"{name}.{below}" for name, m in converted.items() for below, _ in m.named_modules() if below}
    layers = {
        name: [[*part.topology.shape, part.weights] for part in _parts(m)]
        for name, m in converted.items()
        if name not in inner
    }
    epilogues = {
        name: [m.epilogue.slope, m.epilogue.dropout]
        for name, m in converted.items()
        if isinstance(m, SparseLayer) and m.epilogue != IDENTITY
    }
    if layers and method not in (None, METHOD):
        warnings.warn(
            f"the model is quantised by {method}, and its config has no room for the sparse layers: from_pretrained will not "
            "find them. Keep such a model with noctule.save_model, or convert one that is not quantised",
            stacklevel=2,
        )
    elif layers:
        model.config.quantization_config = {"quant_method": METHOD, "layers": layers, "epilogues": epilogues}
    elif method == METHOD:
        del model.config.quantization_config


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """What the config says.

    Args:
        layers: name of each module that is sparse -> (O, I, N) of each sparse layer in it.
        epilogues: name of a sparse layer -> slope and dropout that were folded into it.
    """

    def __init__(
        self, layers: dict[str, list[list[int]]], epilogues: dict[str, list[float]] | None = None, **_: Any
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.layers, self.epilogues = layers, epilogues or {}


@register_quantizer(METHOD)
class SparseLayers(HfQuantizer):
    """Makes the layers of an empty model sparse before transformers loads the weights, and leaves a plain model behind."""

    quantization_config: Any

    @override
    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        """Put empty sparse layers in, whose places come with their values."""
        shapes = self._in_this_model(model)
        rule = ToSparse(weights=1, budget=lambda dense, _: [1] * len(dense), pattern=_first_places, fresh=False)
        with torch.device("cpu"):  # places are real, though the model is on meta
            if not shapes:
                return
            there = {name for name in shapes if _parts(model.get_submodule(name))}  # of a class that converts itself
            new = shapes.keys() - there
            left = convert_(model, rule, where=lambda name, module: name in new).left if new else {}
            for name, wanted in shapes.items():
                parts = _parts(model.get_submodule(name))
                if len(parts) != len(wanted):
                    why = left.get(name, "it is of another kind than it was")
                    raise ValueError(f"the config says that {name} is sparse, and it cannot become so: {why}")
                for part, (rows, columns, weights) in zip(parts, wanted, strict=True):
                    _empty(part, (rows, columns), weights)
            self._fold(model)

    def _in_this_model(self, model: Any) -> dict[str, list[list[int]]]:
        """The modules that are to be sparse, by their names in a model that may have another head, or none."""
        modules, prefix = dict(model.named_modules()), model.base_model_prefix
        found, lost = {}, []
        for name, shapes in self.quantization_config.layers.items():
            here = next((n for n in _names(name, prefix) if n in modules), None)
            if here is None:
                lost.append(name)
            else:
                found[here] = shapes
        if lost and type(model).__name__ in (model.config.architectures or ()):
            raise ValueError(
                f"the config names sparse layers that a {type(model).__name__} does not have: {', '.join(lost[:8])}. "
                "After changing a model by hand, call noctule.sparse.layers.hugging_face.note_sparse_layers(model) before saving it"
            )
        return found

    def _fold(self, model: Any) -> None:
        """Fold what follows a layer into it where it was so."""
        modules = dict(model.named_modules())
        wanted = {
            next((n for n in _names(name, model.base_model_prefix) if n in modules), name): Epilogue(*epilogue)
            for name, epilogue in self.quantization_config.epilogues.items()
        }
        wanted = {name: epilogue for name, epilogue in wanted.items() if name in modules}
        if wanted:
            parents = {name.rpartition(".")[0] for name in wanted}
            convert_(model, FuseEpilogue(), where=lambda name, module: name in parents)
        for name, epilogue in wanted.items():
            if (have := model.get_submodule(name).epilogue) != epilogue:
                raise ValueError(
                    f"{name} had {epilogue} folded into it when it was saved; in this model it would be {have}"
                )

    @override
    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """See that all places have come, and have the model be a plain one again."""
        for name, layer in model.named_modules():
            if isinstance(layer, SparseLayer):
                if layer.loading.taken is None or layer.values.shape != (layer.weights,):  # not from the file
                    raise ValueError(
                        f"the places of {name} did not come with its values: load without an offload to disk, "
                        "and from a folder that save_pretrained wrote"
                    )
                layer.loading.complete()
                layer.topology = layer.topology.to(layer.values.device)
        for part in model.modules():
            if isinstance(part, _pretrained()):
                for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
                    vars(part).pop(mark, None)
                vars(part.config).pop("_is_quantized", None)
        vars(model.config).pop("quantization_config", None)
        note_sparse_layers(model)

    @override
    def is_serializable(self) -> bool:
        return True

    @property
    @override
    def is_trainable(self) -> bool:
        return True


def _pretrained() -> type[nn.Module]:
    """Hugging Face's base class, which cannot be imported while its module is itself being imported."""
    return sys.modules["transformers.modeling_utils"].PreTrainedModel


def _parts(module: nn.Module) -> list[SparseLayer]:
    return [m for m in module.modules() if isinstance(m, SparseLayer)]


def _names(name: str, prefix: str) -> tuple[str, ...]:
    """How a module may be called in a model that has a head around the base model, or has none."""
    return name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")


def _first_places(dense: nn.Module, weights: int, generator: Any = None) -> Topology:
    weight = dense.get_parameter("weight")
    return Topology.from_keys((weight.shape[0], weight[0].numel()), torch.arange(weights))


def _empty(layer: SparseLayer, shape: tuple[int, int], weights: int) -> None:
    """Give a layer without numbers this shape and number of weights; where they are is said later."""
    topology = Topology.from_keys(shape, torch.arange(weights))
    layer._take_shape(topology)
    layer.topology = topology
    layer.values = nn.Parameter(layer.values.new_empty(weights))
    layer.loading.pair(layer.values)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(shape[0]))
