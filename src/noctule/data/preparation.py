"""The preparation of samples as tensors: learnt from the training part, stored as JSON, and applied alike in predictions."""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noctule.core.errors import DataError
from noctule.data.arrays import to_inputs
from noctule.data.columns import Column, Skip, fit_column
from noctule.data.dataset import Dataset
from noctule.data.frame import Arrays, Frame, unnamed
from noctule.data.target import Target

Samples = Frame | Arrays | Dataset
"""Samples as they were read; the built-in sets are of type `Dataset`."""

_FORMAT, _VERSION = "noctule-data", 1


@dataclass(frozen=True)
class Preparation:
    """The map from samples to inputs: columns or the shape of arrays, and standardisation; and the target.

    All of it comes from the training part; `encode` applies it to any samples.
    """

    name: str
    target: Target
    columns: tuple[Column, ...] = ()
    """The columns of a table that are used."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """The other columns of a table, each with the reason."""
    shape: tuple[int, ...] | None = None
    """Shape of a sample of an array, if it has more than one dimension."""
    features: int = 0
    """Number of inputs of a sample that is no row of a table."""
    bytes_scaled: bool = False
    """Whether samples are pictures of bytes, which are scaled to 0 .. 1."""
    mean: tuple[float, ...] = ()
    """Mean of each input in the training part, if inputs are standardised."""
    scale: tuple[float, ...] = ()
    """Factor of each input after its mean is subtracted."""
    target_mean: float = 0.0
    target_deviation: float = 1.0
    """Mean and deviation by which the target of a regression is standardised."""
    named: bool = True
    """Whether the columns of the training table had names."""
    note: str = ""
    """Description of what the reader did to the samples."""
    fingerprint: str = ""
    """Checksum of all tensors of all parts."""

    @property
    def is_table(self) -> bool:
        """Whether samples are rows of a table."""
        return bool(self.columns)

    def encode(self, samples: Samples) -> Tensor:
        """Encode samples as inputs, (rows, features) float32, standardised as in training.

        Raises:
            DataError: columns are missing, or the samples have another kind or shape than in training.
        """
        return self.standardized(self.plain_inputs(samples))

    def plain_inputs(self, samples: Samples) -> Tensor:
        """The inputs before standardisation, (rows, ...) float32."""
        if self.is_table:
            return torch.from_numpy(self._encode_table(self._as_table(samples)))
        if isinstance(samples, Frame):
            if samples.named:
                raise DataError(
                    f"{samples.source} is a table of named columns, but the model was trained on samples {self._form}"
                )
            samples = _as_array(samples, self)
        if isinstance(samples, Dataset):
            inputs, shape = samples.inputs, samples.shape
        else:
            self._check_bytes(samples)
            inputs = to_inputs(samples.inputs)
            shape = tuple(inputs.shape[1:]) if inputs.dim() > 2 else None
        if inputs.dim() < 2 or inputs[0].numel() != self.features or (shape and self.shape and shape != self.shape):
            found = shape or tuple(inputs.shape[1:])
            raise DataError(f"samples of shape {found}, but the model was trained on samples {self._form}; give such")
        return inputs

    @property
    def _form(self) -> str:
        return f"of shape {self.shape or (self.features,)}" + (", pixels in bytes" if self.bytes_scaled else "")

    def standardized(self, inputs: Tensor) -> Tensor:
        """Standardise inputs by the mean and scale of training, if any; (rows, features)."""
        inputs = inputs.flatten(1)
        if not self.mean:
            return inputs
        mean, scale = self._standard
        return ((inputs.double() - mean) * scale).float()

    def to_json(self) -> dict[str, Any]:
        """This preparation as plain JSON."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    @staticmethod
    def from_json(kept: Mapping[str, Any]) -> "Preparation":
        """The preparation in the JSON of `to_json`."""
        kept = dict(kept)
        if kept.pop("format", None) != _FORMAT or kept.pop("version", None) != _VERSION:
            raise DataError("not a preparation of data that this version can read")
        target = dict(kept["target"])
        target["labels"] = tuple(target["labels"])
        columns = tuple(Column(**{**column, "levels": tuple(column["levels"])}) for column in kept["columns"])
        shape = None if kept["shape"] is None else tuple(kept["shape"])
        more = {"mean": tuple(kept["mean"]), "scale": tuple(kept["scale"])}
        return Preparation(**{**kept, **more, "target": Target(**target), "columns": columns, "shape": shape})

    def describe(self) -> list[str]:
        """Lines that describe the preparation; none for arrays with classes 0, 1, 2, ..."""
        labels = self.target.labels
        lines = [self.target.describe()] if self.is_table or labels != tuple(range(len(labels))) else []
        lines += [self.note] if self.note else []
        if not self.is_table:
            return lines
        plain = [c for c in self.columns if c.kind == "number" and not c.missing and c.form == "plain"]
        others = [c for c in self.columns if c not in plain]
        inputs = sum(column.width for column in self.columns)
        lines.append(f"{len(self.columns)} columns become {inputs} inputs; {len(plain)} are plain numbers")
        lines += [f"  {column.name}: {column.describe()}" for column in others[:30]]
        lines += [f"  and {len(others) - 30} more columns"] if len(others) > 30 else []
        by_reason: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            by_reason.setdefault(why, []).append(name)
        for why, names in by_reason.items():
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            lines.append(f"left out: {', '.join(names[:10])}{more} ({why})")
        return lines

    def _encode_table(self, frame: Frame) -> np.ndarray:
        missing = [column.name for column in self.columns if column.name not in frame.columns]
        if missing:
            extra = [name for name in frame.columns if name not in self._order]
            raise DataError(
                f"{frame.source} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing[:10]))}"
                + (f" (it has {', '.join(map(repr, extra[:10]))} beside the known ones)" if extra else "")
                + "; columns are matched by name with those of training"
            )
        unknown, inputs = [], np.empty((len(frame), sum(column.width for column in self.columns)), np.float32)
        at = 0
        for column in self.columns:
            encoded = column.encode(frame.columns[column.name], frame.place)
            inputs[:, at : at + column.width] = encoded.inputs
            at += column.width
            unknown += [encoded.warning] if encoded.warning else []
        if unknown:
            more = f"; and {len(unknown) - 5} more such columns" if len(unknown) > 5 else ""
            warnings.warn(f"{frame.source}: {'; '.join(unknown[:5])}{more}", stacklevel=3)
        return inputs

    def _as_table(self, samples: Samples) -> Frame:
        """Samples as a table with the columns of training; columns without names are matched by their order."""
        if isinstance(samples, Arrays) and samples.inputs.ndim == 2:
            if samples.inputs.dtype.kind not in "biuf":
                raise DataError(f"{samples.source}: the inputs are of type {samples.inputs.dtype}; give numbers")
            samples = unnamed(samples.inputs, source=samples.source)
        if not isinstance(samples, Frame):
            raise DataError("the model was trained on a table; give one with the same columns")
        if samples.named == self.named:
            return samples if self.named else self._in_order(samples)
        with_names, without = "has named columns", "has no header"
        raise DataError(
            f"{samples.source} {with_names if samples.named else without}, but the table that the model was trained on "
            f"{with_names if self.named else without}: {', '.join(map(repr, self._order[:10]))}; give one like it"
        )

    def _in_order(self, frame: Frame) -> Frame:
        """A table without names in the order of training; the target's column may be absent."""
        order = self._order
        if len(frame.columns) == len(order):
            return frame
        if len(frame.columns) != len(order) - 1:
            raise DataError(
                f"{frame.source} has {len(frame.columns)} columns, but the table that the model was trained on had "
                f"{len(order)} with the target, {self.target.name}; give one like it"
            )
        others = [name for name in order if name != self.target.name]
        return replace(frame, columns=dict(zip(others, frame.columns.values(), strict=True)))

    @property
    def _order(self) -> list[str]:
        """All columns of the training table with the target, in their order if they have no names."""
        names = {self.target.name, *self.left_out, *(column.name for column in self.columns)}
        return list(names) if self.named else sorted(names, key=lambda name: int(name.rpartition(" ")[2]))

    def _check_bytes(self, samples: Arrays) -> None:
        if samples.inputs.ndim < 3 or (samples.inputs.dtype.kind == "f" and self._already_scaled(samples.inputs)):
            return
        pixels = samples.inputs.dtype == np.uint8
        if pixels != self.bytes_scaled:
            was, now = ("bytes" if flag else "other numbers" for flag in (self.bytes_scaled, pixels))
            raise DataError(
                f"{samples.source}: pictures of {now}, but the model was trained on pictures of {was}; give such"
            )

    def _already_scaled(self, inputs: np.ndarray) -> bool:
        return self.bytes_scaled and (not inputs.size or float(inputs.max()) <= 1)

    @cached_property
    def _standard(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.scale, dtype=torch.float64)


def fit_preparation(samples: Samples, target: Target, *, name: str) -> Preparation:
    """Learn the preparation from training samples without their target.

    Raises:
        DataError: no column is left, or a cell is wrong; with its place.
    """
    if isinstance(samples, Dataset):
        return Preparation(name, target, shape=samples.shape, features=samples.features)
    if isinstance(samples, Arrays):
        inputs = samples.inputs
        pixels = inputs.dtype == np.uint8 and inputs.ndim > 2
        shape = tuple(inputs.shape[1:]) if inputs.ndim > 2 else None
        features = int(np.prod(inputs.shape[1:], dtype=np.int64))
        return Preparation(name, target, shape=shape, features=features, bytes_scaled=pixels, note=samples.note)
    columns, left_out = [], {}
    for column, values in samples.columns.items():
        try:
            columns.append(fit_column(column, values, samples.place))
        except Skip as reason:
            left_out[column] = str(reason)
    if not columns:
        why = "; ".join(f"{column!r} is {reason}" for column, reason in left_out.items())
        raise DataError(f"{samples.source} has no column to learn from: {why or 'there is the target only'}")
    return Preparation(name, target, columns=tuple(columns), left_out=left_out, named=samples.named)


def fingerprint(tensors: list[Tensor]) -> str:
    """A checksum of the dtypes, shapes and values of tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def with_scaling(preparation: Preparation, mean: Tensor, scale: Tensor) -> Preparation:
    """The preparation with standardised inputs."""
    return replace(preparation, mean=tuple(mean.tolist()), scale=tuple(scale.tolist()))


def _as_array(frame: Frame, preparation: Preparation) -> Arrays:
    """A table of plain numbers for a model that was trained on an array."""
    encoded = [Column(name, "number").encode(values, frame.place) for name, values in frame.columns.items()]
    if warning := next((each.warning for each in encoded if each.warning), None):
        raise DataError(
            f"{frame.source}: {warning.split(' but')[0]}; the model was trained on an array without missing values"
        )
    inputs = np.concatenate([each.inputs for each in encoded], axis=1)
    if preparation.shape and inputs.shape[1] == preparation.features:
        inputs = inputs.reshape(-1, *preparation.shape)
    return Arrays(inputs, None, source=frame.source)
