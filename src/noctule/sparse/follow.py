"""What is kept for each weight of a model follows the weight's place when sparse layers move their connections."""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from noctule.core.listeners import listeners
from noctule.core.remap import Remap, carried
from noctule.sparse.layers import SparseLayer


def follow(kept: nn.Module | MutableMapping[str, Tensor], model: nn.Module) -> "Follower":
    """Have numbers that are kept for each weight of a model follow its connections: an average, a teacher, an anchor.

    A weight that is gone is gone from ``kept`` at once; a new one begins there at zero. So the model in a
    ``torch.optim.swa_utils.AveragedModel`` stays the average by place. Without it, a sparse layer that notices that a copy of it
    is written to after connections moved raises.

    Args:
        kept: a model of the same structure, usually a ``copy.deepcopy``, whose sparse layers move along; or tensors by the names
            of the model's parameters, each of the parameter's shape, which are replaced in the mapping when they change.
        model: whose connections move, in `attach` or by hand.

    Returns:
        What follows; its ``remove()`` ends it.

    Raises:
        ValueError: ``kept`` does not have the structure of the model.

    >>> from noctule.sparse.layers import SparseLinear
    >>> model = nn.Sequential(SparseLinear(8, 4, density=0.5))
    >>> anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    >>> followed = follow(anchor, model)
    """
    return Follower(kept, model)


class Follower:
    """The `Listener` behind `follow`: moves a model's twin, or tensors by name, when the model moves."""

    def __init__(self, kept: nn.Module | MutableMapping[str, Tensor], model: nn.Module) -> None:
        self.model, self.kept = model, kept
        layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}
        for name, layer in layers.items():
            if isinstance(kept, nn.Module):
                twin = dict(kept.named_modules()).get(name)
                if not isinstance(twin, SparseLayer) or twin.topology.shape != layer.topology.shape:
                    raise ValueError(
                        f"what is kept has no sparse layer {name!r} of shape {layer.topology.shape}, as the model has: "
                        "give a copy.deepcopy of the model (of AveragedModel its .module), or tensors by parameter names"
                    )
                twin.kinship.leave()
        if not isinstance(kept, nn.Module):
            wrong = [f"{name} of shape {tuple(x.shape)}" for name, x in kept.items() if _shape(model, name) != x.shape]
            if wrong:
                raise ValueError(
                    f"{', '.join(wrong[:4])} is of no parameter of the model: give tensors by the names and of the shapes of "
                    "model.named_parameters()"
                )
        self._handles = [
            handle
            for layer in layers.values()
            for handle in (layer.register_remap_check(self.check_remap), layer.register_remap_hook(self.remapped))
        ]
        listeners.add(self)

    def remove(self) -> None:
        """Follow no more."""
        for handle in self._handles:
            handle.remove()
        listeners.discard(self)

    def check_remap(self, module: nn.Module, remap: Remap) -> None:
        """Refuse what the twin cannot follow."""
        twin = self._twin(module)
        if isinstance(twin, SparseLayer) and remap.rows is None is remap.columns:
            twin.check_remap(twin.topology, Remap.between(twin.topology, twin.topology))

    @torch.no_grad()
    def remapped(self, module: nn.Module, old: Mapping[str, Tensor], remap: Remap) -> None:
        """Move what is kept for a module."""
        if isinstance(self.kept, nn.Module):
            move_twin(self._twin(module), module, remap)
            return
        prefix = _name(self.model, module)
        for name in old:
            key, part = f"{prefix}.{name}" if prefix else name, remap.of(name)
            if part is not None and key in self.kept:
                x = self.kept[key]
                self.kept[key] = part.apply(x.flatten()).view(getattr(module, name).shape)

    def _twin(self, module: nn.Module) -> Any:
        return self.kept.get_submodule(_name(self.model, module)) if isinstance(self.kept, nn.Module) else None


@torch.no_grad()
def move_twin(twin: Any, module: nn.Module, remap: Remap) -> None:
    """Give a module's twin the places, or the widths, that the module has now; numbers follow by place."""
    if isinstance(module, SparseLayer):
        if twin.topology == module.topology:
            return
        same_width = twin.topology.shape == module.topology.shape
        twin.remap_(module.topology, Remap.between(twin.topology, module.topology) if same_width else remap)
        return
    for name, parameter in module.named_parameters(recurse=False):
        if (part := remap.of(name)) is not None:
            own = getattr(twin, name)
            setattr(twin, name, carried(own, part.apply(own.flatten()).view(parameter.shape), part))
    for name, buffer in module.named_buffers(recurse=False):
        if remap.rows is not None and buffer.dim() == 1:
            setattr(twin, name, remap.rows.apply(getattr(twin, name)))
    twin.__dict__.update({name: value for name, value in vars(module).items() if type(value) is int})  # the widths


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is module)


def _shape(model: nn.Module, name: str) -> torch.Size | None:
    parameter = dict(model.named_parameters()).get(name)
    return None if parameter is None else parameter.shape
