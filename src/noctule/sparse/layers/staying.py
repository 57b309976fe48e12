"""Why a dense layer stays dense, in words that say what to do."""

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from noctule.core.convert import hooked
from noctule.sparse.layers.sparse_layer import SparseLayer

QUANTISERS = ("torchao", "torch.ao", "bitsandbytes", "auto_gptq", "gptqmodel", "awq", "hqq", "optimum.quanto")

_REMEDIES: tuple[tuple[Any, str], ...] = (
    (
        BasePruningMethod,
        "a mask of torch.nn.utils.prune makes its {0} before each forward: prune.remove(layer, '{0}') first",
    ),
    (
        WeightNorm,
        "weight_norm makes its {0} before each forward: torch.nn.utils.remove_weight_norm(layer, '{0}') first",
    ),
    (
        SpectralNorm,
        "spectral_norm makes its {0} before each forward: torch.nn.utils.remove_spectral_norm(layer, '{0}') first",
    ),
)
"""What hooks on a dense layer compute its weight, and what to do about each."""

_KINDS: tuple[tuple[Any, str], ...] = (
    (
        (nn.Embedding, nn.EmbeddingBag),
        "a lookup: it reads whole rows and multiplies nothing, so sparse weights save nothing",
    ),
    (NonDynamicallyQuantizableLinear, "it belongs to an nn.MultiheadAttention, which reads its weight itself"),
    ((nn.RNNBase, nn.RNNCellBase), "torch computes {0} in one call that reads dense weights"),
    ((nn.modules.conv._ConvNd, nn.Bilinear), "there is no sparse kind of {0}"),
)


def obstacle(module: nn.Module) -> str | None:
    """What stands between a plain layer and its sparse kind, and what to do about it, or None."""
    if parametrize.is_parametrized(module):
        by = {n: " and ".join(type(p).__name__.strip("_") for p in made) for n, made in module.parametrizations.items()}  # type: ignore[operator,union-attr]
        name = next(iter(by))
        text = ", ".join(f"{each} is computed by {kinds}" for each, kinds in by.items())
        return f"its {text}: torch.nn.utils.parametrize.remove_parametrizations(layer, '{name}') first"
    for hook in module._forward_pre_hooks.values():
        for kind, remedy in _REMEDIES:
            if isinstance(hook, kind):
                return remedy.format(getattr(hook, "_tensor_name", None) or hook.name)  # type: ignore[union-attr]
    held = dict(module.named_parameters(recurse=False))
    if any(map(is_lazy, held.values())):
        return "it does not know its shape yet: run a batch through the model first"
    if hooked(module):
        return "it has hooks, which would be lost"
    for name, parameter in held.items():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            kind = parameter.dtype if type(parameter) is nn.Parameter else type(parameter).__name__
            return f"its {name} is {kind}, quantised or distributed: convert first, then do that"
    return None


def quantised(module: nn.Module) -> str | None:
    """Why a layer of a library that stores numbers in few bits stays, or None where it is none."""
    kind = type(module)
    library = next((name for name in QUANTISERS if f"{kind.__module__}.".startswith(f"{name}.")), None)
    if library is None or not any(word in kind.__name__ for word in ("Linear", "Conv")):
        return None
    return f"{kind.__name__} is quantised ({library}): convert the model first, then quantise what stays dense"


def adapted(module: nn.Module) -> str | None:
    """Why the layers inside a wrapper of `peft` stay, or None where it is none."""
    wrapper = type(module).__module__.startswith("peft.") and {"base_layer", "original_module"} & module._modules.keys()
    if not wrapper:
        return None
    return f"it is inside peft's {type(module).__name__}: convert the model first, then call get_peft_model"


def why_dense(module: nn.Module) -> str | None:
    """Why parameters that a module holds itself stay dense; None for sparse layers and norms."""
    kind = type(module)
    if isinstance(module, SparseLayer) or "norm" in kind.__name__.lower():
        return None
    for kinds, why in _KINDS:
        if isinstance(module, kinds):
            return why.format(kind.__name__)
    held = " and ".join(f"{n} {tuple(p.shape)}" for n, p in module.named_parameters(recurse=False) if p.dim() > 1)
    if not held:
        return f"vectors of {kind.__name__}"
    return f"{kind.__name__} reads its {held} in a forward of its own, which knows dense weights only"
