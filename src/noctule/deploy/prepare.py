"""What stands between a model and its file: a copy in evaluation mode, in the precision that is asked for."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from noctule.compress.quantize import FakeQuantized, Int8Layer, StaticInt8, calibrate, fold_batch_norms
from noctule.compress.quantize.layers import KINDS
from noctule.core.convert import convert_
from noctule.core.errors import ExportError
from noctule.core.evaluating import evaluating
from noctule.deploy.target import Ranges
from noctule.sparse.layers import SparseLayer, ToDense

PRECISIONS = ("float32", "bfloat16", "int8")


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of an example: a tensor, a tuple, or a mapping.

    Raises:
        ValueError: there is no tensor in it.
    """
    args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (example, {})
    args = args if isinstance(args, tuple) else (args,)
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if not tensors or not tensors[0].dim() or not len(tensors[0]):
        raise ValueError("example= is a batch of inputs: a tensor, a tuple of arguments, or a mapping from their names")
    return args, kwargs


def first(outputs: Any) -> Tensor:
    """The first tensor of what a model gives."""
    leaves = tree_leaves(outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs)
    found = next((x for x in leaves if isinstance(x, Tensor)), None)
    if found is None:
        raise ExportError(f"the model gives {type(outputs).__name__}, in which there is no tensor")
    return found


@torch.no_grad()
def answers(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a model gives in evaluation mode, float32 on the CPU."""
    with evaluating(model):
        return first(model(*args, **kwargs)).detach().float().cpu()


def in_precision(
    model: nn.Module,
    example: Any,
    precision: str,
    ranges: Ranges | None,
    batches: Iterable[Any] | None,
    activation_bits: int = 8,
) -> tuple[nn.Module, Ranges, Ranges]:
    """A copy in evaluation mode and in a precision, with the ranges of inputs and outputs of its quantised layers.

    Raises:
        ExportError: int8 is asked for without ranges of activations, or another precision of a model in int8.
    """
    args, kwargs = arguments(example)
    model = copy.deepcopy(model).cpu().eval()
    kept = [*batches] if batches is not None else []
    if any(isinstance(m, FakeQuantized) for m in model.modules()):
        raise ExportError("the model still learns its bits: convert it with StaticInt8() or WeightOnly() first")
    quantised = any(isinstance(m, Int8Layer) for m in model.modules())
    if precision != "int8":
        if quantised:
            raise ExportError(f'the model has layers in int8: give precision="int8" instead of "{precision}"')
        fold_batch_norms(model)
        return model, {}, {}
    if not quantised:
        if not ranges and not kept:
            raise ExportError(
                "int8 needs ranges of activations: give batches= of training data, or ranges= of calibrate(). Ranges measured anew "
                "in each call (dynamic int8) make convolutions 6 to 11 times slower than float32, so they are not offered"
            )
        fold_batch_norms(model)
        named = any(isinstance(batch, Mapping) for batch in kept)
        ranges = ranges or (_ranges(model, kept, KINDS, of_inputs=True) if named else calibrate(model, kept))
        model = convert_(model, StaticInt8(ranges=ranges, activation_bits=activation_bits, narrowest=1)).model
    inputs = [batch[0] if isinstance(batch, tuple | list) else batch for batch in kept]
    return model, ranges or {}, _ranges(model, inputs or [kwargs or args], (Int8Layer,))


def dense(model: nn.Module) -> nn.Module:
    """The model with its sparse layers dense."""
    return convert_(model, ToDense()).model if any(isinstance(m, SparseLayer) for m in model.modules()) else model


def _ranges(
    model: nn.Module, batches: list[Any], kinds: tuple[type[nn.Module], ...], *, of_inputs: bool = False
) -> dict[str, list[float]]:
    """The lowest and the highest number, 0 at least, that these kinds of layers get or give."""
    found: dict[str, list[float]] = {}

    def watch(name: str) -> Any:
        def see(layer: nn.Module, args: Any, y: Tensor) -> None:
            x = args[0] if of_inputs else y
            low, high = found.get(name, (0.0, 0.0))
            found[name] = [min(low, float(x.min())), max(high, float(x.max()))]

        return see

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, kinds)]
    try:
        for batch in batches:
            args, kwargs = arguments(batch)
            answers(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found
