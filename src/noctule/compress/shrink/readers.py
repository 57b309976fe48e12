"""Find out which layer reads the neurons of another, and what stands between the two."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from noctule.compress.shrink.widths import VECTORS, groups_of, is_matrix, shape_of
from noctule.sparse.layers import AllReLU, SparseConv2d

Paths = Mapping[str, str | Sequence[str | nn.Module]]
"""Name of a layer -> name of the layer that reads it, or what follows it in order, such names or modules, that layer last."""

POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.Upsample)
"""They work on each channel alone, and a constant image stays one."""

_ELEMENTWISE = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(AllReLU, nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU),
    *(nn.LogSigmoid, nn.Mish, nn.RReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink),
    *(nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold),
)
_MIXING = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.Softmax, nn.LogSoftmax, nn.GLU)

_END = "no layer follows: its neurons are the outputs of the model"
_UNKNOWN = "is decided in a forward of its own: name it with paths="


class Passage(NamedTuple):
    """A module between a layer and its reader."""

    name: str
    """Empty for one that is not part of the model."""
    module: nn.Module
    each: int = 0
    """How many of its features belong to a neuron; 0 for a module without a width."""


@dataclass(frozen=True)
class Reader:
    """The layer that reads another's neurons."""

    name: str
    layer: nn.Module
    columns: int
    """How many of its columns belong to a neuron: 1, or of an image the places of the kernel, or the pixels flattened."""
    between: tuple[Passage, ...]
    """What the neurons pass before."""
    behind: nn.Module | None
    """What its own output passes first."""


def find_readers(model: nn.Module, paths: Paths | None = None) -> tuple[dict[str, Reader], dict[str, str]]:
    """The readers of a model's layers by their names, and why others have none: (readers, left).

    Followed are the modules of an `nn.Sequential`, nested ones too; what another module decides in its own forward, such as
    adding a residual, is known only from ``paths``.
    """
    after: dict[str, list[Passage]] = {}
    ends: dict[str, str] = {}
    for start, sequence in _sequences(model):
        leaves = list(_leaves(start, sequence))
        for at, leaf in enumerate(leaves):
            after[leaf.name] = leaves[at + 1 :]
            ends[leaf.name] = _END if sequence is model else f"no layer follows in {start}, and what does {_UNKNOWN}"
    after |= _given(model, paths or {})
    readers, left = {}, {}
    for name, module in model.named_modules():
        if not is_matrix(module):
            continue
        try:
            if name not in after:
                raise ValueError(_END if module is model else f"what follows it {_UNKNOWN}")
            trusted = name in (paths or {})
            readers[name] = _follow(module, after, name, trusted=trusted, end="" if trusted else ends[name])
        except ValueError as reason:
            left[name] = str(reason)
    return readers, left


def _given(model: nn.Module, paths: Paths) -> dict[str, list[Passage]]:
    """The paths that the caller gives, checked."""
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    given = {}
    for name, path in paths.items():
        steps = [path] if isinstance(path, str) else list(path)
        unknown = [step for step in (name, *steps) if isinstance(step, str) and step not in modules]
        if unknown:
            raise ValueError(f"paths names modules that are not there: {unknown}; there are {[*modules][1:]}")
        found = [modules[step] if isinstance(step, str) else step for step in steps]
        given[name] = [Passage(names.get(module, ""), module) for module in found]
    return given


def _follow(producer: nn.Module, after: Mapping[str, list[Passage]], name: str, *, trusted: bool, end: str) -> Reader:
    """Walk from a layer to its reader."""
    neurons = shape_of(producer)[0]
    image, flat = is_convolution(producer), False
    between: list[Passage] = []
    for passage in after[name]:
        module, each = passage.module, 0
        text = f"{passage.name or 'a module'} ({type(module).__name__})"
        if (is_matrix(module) or type(module) in VECTORS) and not passage.name:
            raise ValueError(f"{text} of the path given is not part of the model, but has a width")
        if is_matrix(module):
            columns = _columns(module, neurons, image, flat, text)
            return Reader(passage.name, module, columns, tuple(between), _next(after, passage.name))
        if isinstance(module, _MIXING):
            raise ValueError(
                f"{text} follows, which reckons with all neurons together: without some, the others change"
            )
        if type(module) is nn.Flatten:
            if (module.start_dim, module.end_dim) != (1, -1):
                raise ValueError(f"{text} follows with other dimensions than from 1 to -1")
            flat = True
        elif type(module) in VECTORS and not _is_single(module):
            each = _share(shape_of(module)[0], neurons, spread=image and flat, text=text)
        elif type(module) not in (*_ELEMENTWISE, *POOLS) and not _is_single(module) and not trusted:
            raise ValueError(
                f"{text} follows, of which it is not known that it keeps neurons apart: if it does, say so with paths="
            )
        between.append(Passage(passage.name, module, each))
    raise ValueError(end or "its path ends with no layer that reads it")


def _columns(layer: Any, neurons: int, image: bool, flat: bool, text: str) -> int:
    """How many columns of the reading layer belong to a neuron."""
    into_image = is_convolution(layer)
    if into_image != (image and not flat):
        raise ValueError(
            f"{text} follows, which does not read {'images' if image and not flat else 'rows of features'}"
        )
    if not into_image:
        return _share(shape_of(layer)[1], neurons, spread=image, text=text)
    if groups_of(layer) > 1:
        raise ValueError(f"{text} follows, whose {groups_of(layer)} groups have channels of their own")
    _share(layer.in_channels, neurons, spread=False, text=text)
    return shape_of(layer)[1] // neurons


def _share(features: int, neurons: int, *, spread: bool, text: str) -> int:
    if features != neurons and (not spread or features % neurons):
        raise ValueError(f"{text} follows, which has {features} features for {neurons} neurons")
    return features // neurons


def _next(after: Mapping[str, list[Passage]], name: str) -> nn.Module | None:
    return next((p.module for p in after.get(name, ()) if type(p.module) is not nn.Identity), None)


def is_convolution(module: nn.Module) -> bool:
    """Whether a layer makes and reads images."""
    return isinstance(module, nn.Conv2d | SparseConv2d)


def _is_single(module: nn.Module) -> bool:
    """Whether it is a PReLU with one slope for all."""
    return type(module) is nn.PReLU and module.num_parameters == 1


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _sequences(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The sequences that are not part of another."""
    inner = {
        child
        for module in model.modules()
        if _is_sequence(module)
        for child in module.children()
        if _is_sequence(child)
    }
    return ((name, m) for name, m in model.named_modules() if _is_sequence(m) and m not in inner)


def _leaves(name: str, module: nn.Module) -> Iterator[Passage]:
    if not _is_sequence(module):
        yield Passage(name, module)
        return
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _leaves(f"{name}.{child_name}" if name else child_name, child)
