"""Calls a function as soon as another library is imported, which is not imported for it; offers torch our operators in this way."""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

OPERATORS = {
    "multiply_adds": "noctule.kernels.flops",
    "sparse_linear": "noctule.sparse.layers.operators",
    "sparse_linear_backward": "noctule.sparse.layers.operators",
    "sparse_conv2d": "noctule.sparse.layers.compiled_convolution",
    "sparse_conv2d_backward": "noctule.sparse.layers.compiled_convolution",
}
"""Operator -> the module that registers it."""


def on_import(name: str, then: Callable[[], Any]) -> None:
    """Call ``then()`` now if the module of this name has been imported, else right after it will have been."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        then()
    else:
        sys.meta_path.insert(0, _Awaited(name, then))


def offer_operators() -> None:
    """Have ``torch.ops.noctule`` load an operator when it is first asked for, as by an exported program; needs torch."""
    torch: Any = sys.modules["torch"]

    class Operators(type(torch.ops.aten)):
        __module__ = type(torch.ops.aten).__module__  # programs name their operators after it

        def __getattr__(self, name: str) -> Any:
            home = OPERATORS.get(name)
            if home is not None and home not in sys.modules:  # one that is there is just registering it
                import_module(home)
            return super().__getattr__(name)

    torch.ops.noctule = Operators("noctule")


class _Awaited(MetaPathFinder):
    """A finder that finds nothing itself, but wraps the loader of the awaited module to call ``then`` after it has run."""

    def __init__(self, name: str, then: Callable[[], Any]) -> None:
        self.name, self.then = name, then
        self._asking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of that module from the other finders, and None for any other."""
        if name != self.name or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(name)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # a spec may be asked for without an import, to see what is installed
                sys.meta_path.remove(self)
                self.then()

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign] of this one spec
        return spec
