"""Reader of data in memory: DataFrames, arrays, tensors, dicts of columns, data sets of Hugging Face, without their imports."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from noctule.core.errors import DataError, UsageError
from noctule.data.dataset import Dataset
from noctule.data.frame import Arrays, Frame
from noctule.data.npz import PART_WORDS, find_keys
from noctule.data.preparation import Samples

_ACCEPTED = "give a name, a path, a DataFrame, a Hugging Face Dataset, (X, y), a dict of columns or of parts, or a noctule.Dataset"


def read_object(source: Any, *, labels: bool = True) -> dict[str, Samples]:
    """Read the samples of an object in memory by part.

    Args:
        source: a DataFrame, an object with columns like one of Hugging Face, polars or pyarrow, a pair (X, y), a
            `Dataset`, a TensorDataset, or a dict: of parts, of arrays with the keys of .npz, or of columns.
        labels: whether labels are required.

    Raises:
        UsageError: the object is none of these.
        DataError: its data are empty or inconsistent.
    """
    if isinstance(source, Mapping):
        parts = {PART_WORDS.get(str(key).lower().strip("_")): value for key, value in source.items()}
        if source and None not in parts and len(parts) == len(source):
            return {str(part): _one(value, labels=labels) for part, value in parts.items()}
        arrays = {str(key): value for key, value in source.items()}
        if any(np.ndim(value) > 1 for value in arrays.values() if hasattr(value, "shape")):
            keys = find_keys("the dict", list(arrays), labels=labels)
            return {
                part: _one((arrays[x], arrays[y]) if y else arrays[x], labels=labels) for part, (x, y) in keys.items()
            }
    return {"train": _one(source, labels=labels)}


def frame_of(table: Any, *, source: str = "the DataFrame") -> Frame:
    """Convert a pandas DataFrame."""
    names = [str(name).strip() for name in table.columns]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{source} has two columns called {twice!r}; rename one")
    columns: dict[str, np.ndarray] = {}
    for at, name in enumerate(names):
        columns |= _expanded(name, _series(table.iloc[:, at], source))
    if not names or not len(table):
        raise DataError(f"{source} is empty; give at least one row and column")
    return Frame(columns, source=source)


def _one(source: Any, *, labels: bool) -> Samples:
    if isinstance(source, Dataset):
        return source
    if _is_frame(source):
        return frame_of(source)
    if _is_hugging_face(source):
        return _of_hugging_face(source)
    if hasattr(source, "to_pydict"):
        return _of_columns(source.to_pydict())
    if isinstance(source, Mapping):
        return _of_columns(source)
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        return _of_columns(source.to_dict(as_series=False))
    pair = getattr(source, "tensors", source)
    if isinstance(pair, tuple | list) and len(pair) == 2 and not _is_matrix(pair):
        return _pair(*pair)
    array = _array(source)
    if array is not None and array.dtype.names:
        columns = {name: _values(array[name]) for name in array.dtype.names}
        return Frame(columns, source="the array")
    if array is not None and array.ndim > 1 and not labels:
        return Arrays(array, None, source="the array")
    raise UsageError(
        f"data cannot be {'an array without labels' if array is not None else f'a {type(source).__name__}'}; {_ACCEPTED}"
    )


def _pair(inputs: Any, labels: Any) -> Samples:
    """Convert a pair of inputs and labels."""
    y = _array(labels)
    if y is None:
        raise UsageError(f"the labels are a {type(labels).__name__}; give an array with one for each sample")
    if len(y) != len(inputs if hasattr(inputs, "__len__") else _array(inputs)):  # type: ignore[arg-type]
        raise DataError(f"{len(inputs)} inputs but {len(y)} targets; give one target per row")
    if _is_frame(inputs):
        frame = frame_of(inputs)
        name = str(getattr(labels, "name", None) or "target")
        if name in frame.columns:
            raise DataError(f"the inputs have a column {name!r}, as the labels are called; rename one")
        y = _values(y.reshape(len(y), -1)[:, 0] if y.ndim > 1 and y[0].size == 1 else y)
        return Frame({**frame.columns, name: y}, source=frame.source)
    array = _array(inputs.toarray() if hasattr(inputs, "toarray") else inputs)
    if array is None or array.ndim < 2:
        raise DataError(
            f"inputs of shape {None if array is None else array.shape}; give one row of numbers for each sample: "
            "(samples, features)"
        )
    if array.dtype.kind in "OUS" and array.ndim == 2:
        columns = {f"column {at + 1}": _values(array[:, at]) for at in range(array.shape[1])}
        columns[f"column {array.shape[1] + 1}"] = _values(y)
        return Frame(columns, source="the array", named=False)
    return Arrays(array, y, source="the array", label_name=str(getattr(labels, "name", None) or "label"))


def _of_columns(columns: Mapping[Any, Any]) -> Frame:
    made: dict[str, np.ndarray] = {}
    for name, cells in columns.items():
        array = _array(cells)
        if array is None or array.ndim == 0:
            raise UsageError(f"the column {name!r} is a {type(cells).__name__}; {_ACCEPTED}")
        made |= _expanded(str(name).strip(), _values(array) if array.ndim == 1 else array)
    if len({len(values) for values in made.values()}) != 1 or not len(next(iter(made.values()))):
        sizes = ", ".join(f"{name}: {len(values)}" for name, values in list(made.items())[:10])
        raise DataError(f"the columns must be equally long, and not empty: {sizes or 'there are none'}")
    return Frame(made, source="the columns")


def _of_hugging_face(dataset: Any) -> Samples:
    features, rows = dataset.features, len(dataset)
    if not rows:
        raise DataError("the Dataset is empty; give at least one row")
    names = {name: getattr(feature, "names", None) for name, feature in features.items()}
    pictures = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if pictures:
        label = next((name for name, known in names.items() if known), None)
        label = label or next((name for name in ("label", "labels", "target") if name in features), None)
        shots = [np.asarray(picture) for picture in dataset.with_format(None)[:][pictures[0]]]
        if len({shot.shape for shot in shots}) > 1:
            raise DataError(
                f"the pictures in {pictures[0]!r} differ in size or colours; resize them first (Dataset.map)"
            )
        pixels = np.stack(shots)
        if pixels.ndim == 4:
            pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        labels = None if label is None else _named(np.asarray(dataset[:][label]), names[label])
        return Arrays(pixels, labels, source="the Dataset", label_name=label or "label", always_classes=True)
    frame = frame_of(dataset.with_format(None).to_pandas(), source="the Dataset")
    named = {name: _named(values, names.get(name)) for name, values in frame.columns.items()}
    return Frame(named, source=frame.source)


def _named(values: np.ndarray, names: Sequence[str] | None) -> np.ndarray:
    """Class numbers as the names of the classes; -1, with which Hugging Face marks unlabelled samples, as missing."""
    if not names:
        return values
    return np.array(["" if value != value or value < 0 else names[int(value)] for value in values.tolist()], object)


def _series(series: Any, source: str) -> np.ndarray:
    """Convert a pandas Series to a column."""
    dtype = series.dtype
    kind = getattr(dtype, "kind", "O")
    if hasattr(dtype, "categories"):
        return _values(series.astype(object).to_numpy())
    if kind == "M":
        series = series.dt.tz_convert("UTC").dt.tz_localize(None) if getattr(dtype, "tz", None) is not None else series
        return series.to_numpy("datetime64[us]")
    if kind == "m":
        return series.dt.total_seconds().to_numpy(np.float64)
    if kind in "iuf":
        return series.to_numpy(dtype=np.float64, na_value=np.nan)
    if kind == "c":
        raise DataError(f"{source}, column {series.name!r}: complex numbers; give real ones")
    return _values(series.to_numpy(dtype=object, na_value=None))


def _values(values: np.ndarray) -> np.ndarray:
    """Convert a one-dimensional array to a column: float64, datetime64, or text."""
    if values.dtype.kind == "b":
        return np.array([str(value) for value in values.tolist()], object)
    if values.dtype.kind in "iuf":
        return values.astype(np.float64)
    if values.dtype.kind == "M":
        return values.astype("datetime64[us]")
    cells = values.tolist()
    if any(isinstance(cell, list | tuple | np.ndarray) for cell in cells):
        try:
            return np.stack([np.asarray(cell, np.float64) for cell in cells])
        except (TypeError, ValueError) as error:
            raise DataError("a column holds lists that are no numbers, or of different lengths; unfold them") from error
    numbers = [np.nan if cell is None else cell for cell in cells]
    if all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in numbers):
        return np.array(numbers, np.float64)
    return np.array([_text(cell) for cell in cells], object)


def _text(cell: Any) -> str:
    if cell is None or cell != cell:
        return ""
    if isinstance(cell, bytes):
        return cell.decode(errors="replace").strip()
    return (cell.isoformat(sep=" ") if hasattr(cell, "hour") and hasattr(cell, "isoformat") else str(cell)).strip()


def _expanded(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Split a column of vectors into one column for each component."""
    if values.ndim == 1:
        return {name: values}
    flat = values.reshape(len(values), -1).astype(np.float64)
    return {f"{name}[{at}]": flat[:, at] for at in range(flat.shape[1])}


def _array(value: Any) -> np.ndarray | None:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if hasattr(value, "to_numpy"):
        return value.to_numpy()
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, list | tuple) or hasattr(value, "__array__"):
        try:
            array = np.asarray(value)
        except ValueError:  # rows of different lengths
            return None
        return np.asarray(value, object) if array.dtype.kind in "US" else array
    return None


def _is_matrix(pair: Any) -> bool:
    """Whether a pair is a matrix of two rows, not X and y: a plain list of lists is."""
    return isinstance(pair, list) and not any(hasattr(part, "shape") for part in pair)


def _is_frame(value: Any) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame)


def _is_hugging_face(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("features", "column_names", "with_format", "to_pandas"))
