"""Which layers take part in quantising, and the rule that replaces them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from noctule.compress.quantize.numbers import check_bits
from noctule.core.convert import Leave, Rule
from noctule.core.finite import all_finite
from noctule.core.topology import Topology
from noctule.sparse.layers import SparseConv2d, SparseLayer, SparseLinear
from noctule.sparse.layers.staying import obstacle, quantised

Layer = nn.Linear | nn.Conv2d | SparseLinear | SparseConv2d
KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, SparseLinear, SparseConv2d)

Bits = int | Mapping[str, int]
"""8, 4 or 1 for all layers, or a mapping from names of layers; layers that it does not name stay as they are."""


def weight_of(layer: Any) -> tuple[Tensor, Topology | None]:
    """The weight of a dense layer, or the values of a sparse one and where they lie."""
    return (layer.values, layer.topology) if isinstance(layer, SparseLayer) else (layer.weight, None)


def widths_of(layer: Any) -> tuple[int, int]:
    """Features or channels in and out."""
    if isinstance(layer, nn.Conv2d | SparseConv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def check_evaluation(modules: Iterable[nn.Module]) -> None:
    """Refuse a model that is not in evaluation mode as a whole."""
    if any(module.training for module in modules):
        raise ValueError("the model is in training mode, where it computes something else: call model.eval() first")


def check_width(layer: Layer, narrowest: int) -> None:
    """Raise `Leave` for a layer that is too narrow to gain time from int8."""
    into, out = widths_of(layer)
    if min(into, out) < narrowest:
        raise Leave(
            f"{into} -> {out} is narrower than {narrowest}: int8 products gain no time there. WeightOnly(bits=8) saves its bytes; "
            "narrowest= includes it"
        )


def bits_by_name(bits: Bits, modules: Mapping[str, nn.Module]) -> Mapping[str, int]:
    """The bits of each of these modules that has some.

    Raises:
        ValueError: a number of bits that weights cannot have, or names of another model.
    """
    by_name = dict.fromkeys(modules, bits) if isinstance(bits, int) else bits
    for each in by_name.values():
        check_bits(each)
    if by_name and not any(name in modules for name in by_name):
        raise ValueError(f"bits= is of another model: this one has no {', '.join([*by_name][:8])}")
    return by_name


def rule_for(modules: Mapping[str, nn.Module], make: Callable[[str, Any], nn.Module], wrapper: type[nn.Module]) -> Rule:
    """The rule that replaces each layer by what ``make`` gives for its name and itself.

    Args:
        modules: those the rule may look at.
        make: may raise `Leave`.
        wrapper: the kind of modules round a ``layer`` that are given to ``make`` in its place.

    Raises:
        ValueError: a weight is NaN or infinite; nothing was changed yet.
    """
    names = {module: name for name, module in modules.items()}
    inside = {module.layer for module in names if isinstance(module, wrapper)}
    for module, name in names.items():
        if type(module) in KINDS and not (weight := weight_of(module)[0]).is_meta and not all_finite(weight.detach()):
            raise ValueError(f"the weights of {name or 'the model'} are NaN or infinite: load a checkpoint from before")

    def rule(module: nn.Module) -> nn.Module | None:
        if reason := quantised(module):
            raise Leave(reason)
        if module in inside or not isinstance(module, (wrapper, *KINDS)):
            return None
        if reason := obstacle(module):
            raise Leave(reason)
        if type(module) not in (wrapper, *KINDS):
            raise Leave(f"{type(module).__name__} is not one of {', '.join(kind.__name__ for kind in KINDS)}")
        if module not in names:
            raise Leave("it holds tied weights")
        if any(parameter.is_meta for parameter in module.parameters()):
            raise Leave("it is on the meta device: load its weights first")
        return make(names[module], module)

    return rule
