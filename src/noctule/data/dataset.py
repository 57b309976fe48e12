"""A labelled data set in memory: one flat float32 row and one class or number per sample, checked when it is made."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from noctule.core.errors import DataError

_ROWS_AT_A_TIME = 4096
_MOST_CHANNELS = 4
"""Most channels of an image: a last dimension of at most this size holds channels, not pixels."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples and their targets, classes or numbers; rows are counted from 0.

    Inputs of any real dtype and of shape (samples, ...) become contiguous float32 of shape (samples, features), and
    more than one trailing dimension is remembered as `shape`; integer targets become int64. With ``classes=0`` the
    targets are numbers to predict, and become float32. Tensors of that form are not copied.

    Raises:
        DataError: no samples, inputs and targets of different lengths, NaN or infinite inputs or targets, labels
            outside 0 .. classes - 1. It names the set, the first offending row and the remedy.

    >>> Dataset(torch.rand(5, 8, 8), torch.tensor([0, 1, 2, 1, 0]), name="toy", classes=3)
    Dataset('toy', samples=5, features=64, classes=3, shape=(8, 8))
    """

    inputs: Tensor
    targets: Tensor
    _: KW_ONLY
    name: str
    classes: int
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        inputs, targets = self.inputs, self.targets
        if inputs.dim() < 2 or targets.dim() != 1:
            raise self._error(
                f"has inputs of shape {tuple(inputs.shape)} and targets of shape {tuple(targets.shape)}; "
                "give (samples, features) and (samples,)"
            )
        if len(inputs) != len(targets):
            raise self._error(f"has {len(inputs)} inputs but {len(targets)} targets; give one target per row")
        if inputs.numel() == 0:
            raise self._error(f"is empty (inputs of shape {tuple(inputs.shape)}); give at least one sample and feature")
        if inputs.is_complex() or targets.is_complex() or (targets.is_floating_point() and self.classes):
            raise self._error(f"has {inputs.dtype} inputs and {targets.dtype} targets; give real and integer numbers")
        shape = tuple(inputs.shape[1:]) if self.shape is None and inputs.dim() > 2 else self.shape
        kind = torch.int64 if self.classes else torch.float32
        object.__setattr__(self, "inputs", inputs.detach().flatten(1).to(torch.float32).contiguous())
        object.__setattr__(self, "targets", targets.to(inputs.device, kind).contiguous())
        object.__setattr__(self, "shape", None if shape is None else tuple(shape))
        if self.shape is not None and torch.Size(self.shape).numel() != self.features:
            raise self._error(f"has {self.features} features, which do not fill the sample shape {self.shape}")
        self._check_targets()
        self._check_inputs()

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        shape = "" if self.shape is None else f", shape={self.shape}"
        return f"Dataset({self.name!r}, samples={len(self)}, features={self.features}, classes={self.classes}{shape})"

    @property
    def features(self) -> int:
        """Number of inputs of a sample."""
        return self.inputs.shape[1]

    @property
    def outputs(self) -> int:
        """Number of outputs of a network for a sample: the classes, or 1 in a regression."""
        return self.classes or 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sample; a shape of two is an image of one channel.

        Raises:
            DataError: the samples are no images, or their channels come last.
        """
        shape = (1, *self.shape) if self.shape is not None and len(self.shape) == 2 else self.shape
        if shape is None or len(shape) != 3:
            raise self._error(
                f"has samples of {'no shape' if shape is None else f'shape {shape}'}, which are no images; give inputs of "
                "shape (samples, height, width) or (samples, channels, height, width)"
            )
        if shape[2] <= _MOST_CHANNELS < shape[0]:
            raise self._error(
                f"has samples of shape {shape}: channels come last; give (samples, channels, height, width)"
            )
        return shape[0], shape[1], shape[2]

    def take(self, indices: Tensor | Sequence[int]) -> "Dataset":
        """The samples at `indices` (row numbers, or a mask of all rows) as a set of their own, copied."""
        rows = torch.as_tensor(indices, device=self.inputs.device)
        rows = rows if rows.numel() else rows.long()
        return replace(self, inputs=self.inputs[rows], targets=self.targets[rows])

    def _check_targets(self) -> None:
        if not self.classes:
            if not torch.isfinite(self.targets).all():
                row = int((~torch.isfinite(self.targets)).nonzero()[0])
                raise self._error(f"has the target {float(self.targets[row])} in row {row}; repair or drop such rows")
            return
        wrong = (self.targets < 0) | (self.targets >= self.classes)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise self._error(
                f"has the label {int(self.targets[row])} in row {row}; with {self.classes} classes "
                f"labels must be whole numbers from 0 to {self.classes - 1}: renumber them"
            )

    def _check_inputs(self) -> None:
        # A sum is finite only if every term is, and it costs one pass without a temporary; a sum of huge finite
        # numbers may overflow, so the rows themselves decide.
        if torch.isfinite(self.inputs.sum()):
            return
        for start in range(0, len(self), _ROWS_AT_A_TIME):
            wrong = (~torch.isfinite(self.inputs[start : start + _ROWS_AT_A_TIME])).nonzero()
            if len(wrong):
                row, column = start + int(wrong[0, 0]), int(wrong[0, 1])
                raise self._error(
                    f"has the input {float(self.inputs[row, column])} in row {row}, feature {column} (as float32); "
                    "repair or drop such rows before training"
                )

    def _error(self, what: str) -> DataError:
        return DataError(f"data set {self.name!r} {what}")
