"""Names and paths as users give them: of a file that has to be there, or of the nearest thing that is known."""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Of a ``str``, ``Any`` or ``Path`` option, in `Annotated`: a file or folder that has to be there, or one of some names.

    What is there is kept as an absolute path, so that a run goes on from any folder.
    """

    names: tuple[str, ...] = ()
    what: str = "file or folder"

    def __call__(self, text: str) -> str:
        """The name as it is, or the path; ArgumentTypeError where there is neither."""
        if text in self.names:
            return text
        if (path := absolute(text)).exists():
            return str(path)
        if any(letter in text for letter in ":*?["):  # more than a path: what reads it knows
            return text
        listed = f". Names: {', '.join(self.names)}; or give a path" if self.names else ""
        close = nearest(text.lower().replace("_", "-"), self.names)
        raise argparse.ArgumentTypeError(f"there is no {self.what} called {text!r}{close}{listed}")


def absolute(text: str) -> Path:
    """A path that means the same in any folder; ``~`` is the user's own. ArgumentTypeError where it is none."""
    try:
        if text:
            path = Path(text).expanduser().absolute()
            return path.resolve() if ".." in path.parts else path
    except RuntimeError as error:  # ~nobody
        raise argparse.ArgumentTypeError(f"{text} is no path here: {error}") from error
    raise argparse.ArgumentTypeError("a path is empty: was a variable of the shell not set?")


def nearest(given: str, known: Sequence[str]) -> str:
    """`` (did you mean X?)`` for the known name most like the given one, or nothing.

    >>> nearest("--epoch", ["--epochs", "--batch"])
    ' (did you mean --epochs?)'
    """
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
