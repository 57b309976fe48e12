"""Where do samples come from? Data sets by name or from the user's files: loaded, split, standardised and batched."""

from noctule.data.batches import Batches
from noctule.data.catalog import load, names, read
from noctule.data.dataset import Dataset
from noctule.data.scaling import standardize
from noctule.data.splits import Splits, split
from noctule.data.target import Task
from noctule.data.text import Text, Windows, read_text

__all__ = [
    "Batches",
    "Dataset",
    "Splits",
    "Task",
    "Text",
    "Windows",
    "load",
    "names",
    "read",
    "read_text",
    "split",
    "standardize",
]
