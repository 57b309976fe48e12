"""The names of the built-in data sets, and the type of an option that takes one of them or a path."""

from pathlib import Path
from typing import Annotated, Any

from noctule.core.place import Place

names: tuple[str, ...] = ("digits", "fashion-mnist", "madelon", "mnist")
"""Names of the built-in data sets."""
DataSource = Annotated[Any, Place(names, "data set, file or folder")]
"""Type of an option: a built-in data set, or a path to the user's own; from Python a DataFrame or arrays too."""
InputFile = Annotated[Path, Place((), "file")]
"""Type of an option: a file that must exist."""
