"""What does a run leave behind? Its folder, its page, and the table that compares it with others."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from noctule.report.compare import compare_table
    from noctule.report.folder import RunFolder
    from noctule.report.html import write_report
    from noctule.report.journal import Journal

__all__ = ["Journal", "RunFolder", "compare_table", "write_report"]

_HOME = {"Journal": "journal", "RunFolder": "folder", "compare_table": "compare", "write_report": "html"}


def __getattr__(name: str) -> Any:
    """Load a name when it is first asked for: a run is opened before it is known whether torch is needed."""
    if name not in _HOME:
        raise AttributeError(f"module 'noctule.report' has no attribute {name!r}")
    value = getattr(import_module(f"noctule.report.{_HOME[name]}"), name)
    globals()[name] = value
    return value
