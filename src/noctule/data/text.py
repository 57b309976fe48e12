"""The characters of any text file as numbers, in windows of which a model guesses each next character."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from noctule.core.errors import DataError, UsageError


@dataclass(frozen=True, eq=False)
class Windows:
    """Stretches of a text, and for each of their characters the one that follows; no two stretches share a guess."""

    inputs: Tensor
    """Numbers of characters, (samples, T) int64."""
    targets: Tensor
    """The same, one character on."""
    name: str
    classes: int
    """The characters that there are."""
    shape: None = None

    def __len__(self) -> int:
        """The number of stretches."""
        return len(self.inputs)

    def __repr__(self) -> str:
        """The sizes, not the numbers."""
        return f"Windows({self.name!r}, samples={len(self)}, characters={self.features}, classes={self.classes})"

    @property
    def features(self) -> int:
        """The characters of a stretch: T."""
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
        """The characters that these numbers stand for."""
        return "".join(self.vocabulary[k] for k in numbers.flatten().tolist())


def read_text(
    path: str | Path | None = None, *, context: int = 128, validation: float = 0.1, test: float = 0.1
) -> Text:
    """Read a text file, or what Python's own help says of its language, and cut it into windows.

    Args:
        path: a file in UTF-8; with None some 450 KB of English about Python, which come with it.
        context: characters of a window.
        validation: share of the text that selects, just before the test part.
        test: share of the text at its end.

    Raises:
        UsageError: there is no such file, or the numbers make no sense.
        DataError: it is no UTF-8, or too short for such windows.

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
