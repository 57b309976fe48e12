"""The objects that follow the weights of a model when these change places or widths: open sessions and `Follower`."""

from collections.abc import Mapping
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor, nn

from noctule.core.remap import Remap


class Listener(Protocol):
    """Follows the weights of its model: called before and after those of a module change places or widths."""

    model: nn.Module

    def check_remap(self, module: nn.Module, remap: Remap) -> None:
        """Raise ValueError where it cannot follow."""
        ...

    def remapped(self, module: nn.Module, old: Mapping[str, Tensor], remap: Remap) -> None:
        """Follow a change that was made; ``old`` are the module's parameters of before, by name."""
        ...


listeners: WeakSet[Any] = WeakSet()
"""The open sessions, and what `follow` made."""


def listeners_of(module: nn.Module) -> list[Listener]:
    """The listeners of the models that this module is part of."""
    return [listener for listener in listeners if any(m is module for m in listener.model.modules())]
