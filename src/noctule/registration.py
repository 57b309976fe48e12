"""Whoever asks ``torch.ops.noctule`` for an operator gets it, so that an exported program opens where Noctule was only imported.

Importing Noctule imports neither torch nor the operators: they come when torch is there and one of them is asked for.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_HOMES = {
    "multiply_adds": "noctule.kernels.flops",
    "sparse_linear": "noctule.layers.operators",
    "sparse_linear_backward": "noctule.layers.operators",
    "sparse_conv2d": "noctule.layers.compiled_convolution",
    "sparse_conv2d_backward": "noctule.layers.compiled_convolution",
}
"""Operator -> the module that registers it."""


def offer() -> None:
    """Offer them now if torch is there, else as soon as it is imported."""
    if "torch" in sys.modules and hasattr(sys.modules["torch"], "ops"):
        _offer_in(sys.modules["torch"])
    else:
        sys.meta_path.insert(0, _WaitingForTorch())


def _offer_in(torch: ModuleType) -> None:
    class Operators(type(torch.ops.aten)):
        __module__ = type(torch.ops.aten).__module__  # programs name their operators after it

        def __getattr__(self, name: str) -> Any:
            home = _HOMES.get(name)
            if home is not None and home not in sys.modules:  # one that is there is just registering it
                import_module(home)
            return super().__getattr__(name)

    torch.ops.noctule = Operators("noctule")


class _WaitingForTorch(MetaPathFinder):
    """Finds nothing itself; what finds torch is made to say when it has loaded it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of torch from the other finders, and None for any other module."""
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_offer(module: ModuleType) -> None:
            execute(module)
            _offer_in(module)

        spec.loader.exec_module = execute_and_offer  # type: ignore[method-assign]
        return spec
