"""How does a model leave torch? Files for other runtimes, checked against the model, and what they cost, measured.

The names are loaded on first use, so that a process which measures a file need not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from noctule.deploy.agreement import Agreement
    from noctule.deploy.card import Card, card_of
    from noctule.deploy.exporting import Exported, export
    from noctule.deploy.precisions import Precisions, precisions_of
    from noctule.deploy.targets import TARGETS

__all__ = ["TARGETS", "Agreement", "Card", "Exported", "Precisions", "card_of", "export", "precisions_of"]

_HOME = {
    "TARGETS": "targets",
    "Agreement": "agreement",
    "Card": "card",
    "Exported": "exporting",
    "Precisions": "precisions",
    "card_of": "card",
    "export": "exporting",
    "precisions_of": "precisions",
}


def __getattr__(name: str) -> Any:
    """Load a name when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'noctule.deploy' has no attribute {name!r}")
    module = import_module(f"noctule.deploy.{_HOME[name]}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    """The names."""
    return __all__
