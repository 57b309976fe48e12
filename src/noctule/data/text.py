"""Text data: characters as numbers, in windows whose targets are the next characters."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from noctule.core.errors import DataError, UsageError


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a text and, as targets, the character after each of theirs; the targets of windows do not overlap."""

    inputs: Tensor
    """Numbers of the characters, (samples, T) int64."""
    targets: Tensor
    """Numbers of the next characters, (samples, T) int64."""
    name: str
    classes: int
    """Number of different characters."""
    shape: None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        return f"Windows({self.name!r}, samples={len(self)}, characters={self.features}, classes={self.classes})"

    @property
    def features(self) -> int:
        """Number of characters in a window: T."""
        return self.inputs.shape[1]


@dataclass(frozen=True)
class Text:
    """A text in three parts that follow one another: fit on `train`, choose on `validation`, read `test` once."""

    vocabulary: str
    """The characters in the order of their numbers."""
    train: Windows
    validation: Windows
    test: Windows

    def decode(self, numbers: Tensor) -> str:
        """The text of these numbers."""
        return "".join(self.vocabulary[k] for k in numbers.flatten().tolist())


def read_text(
    path: str | Path | None = None, *, context: int = 128, validation: float = 0.1, test: float = 0.1
) -> Text:
    """Read a text file, or Python's own help on its language, and split it into windows.

    Args:
        path: a file in UTF-8; None for some 450 KB of English about Python, which are part of it.
        context: characters of a window.
        validation: share of the text for model selection, just before the test part.
        test: share of the text at its end.

    Raises:
        UsageError: there is no such file, or a number is out of range.
        DataError: the text is no UTF-8, or too short for such windows.

    >>> read_text(context=64).train
    Windows('python-help', samples=..., characters=64, classes=...)
    """
    if context < 1 or min(validation, test) <= 0.0 or validation + test >= 1.0:
        raise UsageError(
            f"context must be at least 1, and the shares for validation and test above 0 and below 1 together, "
            f"got {context}, {validation} and {test}"
        )
    name, text = ("python-help", _python_help()) if path is None else (Path(path).stem, _file(Path(path)))
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    found, numbers = np.unique(codes, return_inverse=True)
    characters = torch.from_numpy(numbers.astype(np.int64))
    stops = [round(len(characters) * (1.0 - test - validation)), round(len(characters) * (1.0 - test)), len(characters)]
    parts = {}
    for part, start, stop in zip(("train", "validation", "test"), (0, *stops), stops):
        samples = (stop - start - 1) // context
        if samples < 1:
            raise DataError(
                f"the text {name!r} has {len(characters)} characters, {stop - start} of them for {part}: too few for one "
                f"window of {context} and the character after it. Give a longer text, or a shorter context"
            )
        inputs, targets = (characters[at : at + samples * context].view(-1, context) for at in (start, start + 1))
        parts[part] = Windows(inputs, targets, name=name, classes=len(found))
    return Text("".join(map(chr, found.tolist())), **parts)


def _file(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: byte {error.start} is wrong. Save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"cannot read the text {path}: {error.strerror}") from error


def _python_help() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python comes without its help (pydoc_data); name a text file instead") from error
    return "\n\n".join(topics[topic] for topic in sorted(topics))
