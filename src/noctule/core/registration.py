"""Whoever asks ``torch.ops.noctule`` for an operator gets it, so that an exported program opens where Noctule was only imported.

Importing Noctule imports neither torch nor the operators: they come when torch is there and one of them is asked for.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from noctule.core.on_import import on_import

_HOMES = {
    "multiply_adds": "noctule.kernels.flops",
    "sparse_linear": "noctule.sparse.layers.operators",
    "sparse_linear_backward": "noctule.sparse.layers.operators",
    "sparse_conv2d": "noctule.sparse.layers.compiled_convolution",
    "sparse_conv2d_backward": "noctule.sparse.layers.compiled_convolution",
}
"""Operator -> the module that registers it."""


def offer() -> None:
    """Offer them now if torch is there, else as soon as it is imported."""
    on_import("torch", lambda: _offer_in(sys.modules["torch"]))


def _offer_in(torch: ModuleType) -> None:
    class Operators(type(torch.ops.aten)):
        __module__ = type(torch.ops.aten).__module__  # programs name their operators after it

        def __getattr__(self, name: str) -> Any:
            home = _HOMES.get(name)
            if home is not None and home not in sys.modules:  # one that is there is just registering it
                import_module(home)
            return super().__getattr__(name)

    torch.ops.noctule = Operators("noctule")
