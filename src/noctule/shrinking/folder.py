"""The folder of a search: what was asked, a line for each candidate, and its file with its card."""

import json
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from noctule.checkpoint.atomic import replacing
from noctule.core.errors import DataError, UsageError
from noctule.report import files
from noctule.shrinking.candidates import Candidate


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A command, as it is kept in its folder."""

    model: str
    data: str
    target: tuple[str, ...]
    within: float = 0.5
    """Points of accuracy on the validation part that the smallest may lie below the source."""
    epochs: int = 4
    """Of each candidate whose weights change."""
    teacher_epochs: int = 5
    """Of a source that is not trained yet."""
    seed: int = 0
    to: str = "noctule"
    threads: int = 1

    def command(self, *more: str) -> str:
        """The command line."""
        words = ["noctule", "shrink", self.model, "--data", self.data]
        words += [word for text in self.target for word in ("--target", text)]
        for name in ("within", "epochs", "teacher_epochs", "seed", "to", "threads"):
            words += [f"--{name.replace('_', '-')}", str(getattr(self, name))]
        return shlex.join([*words, *more])


class Folder:
    """The folder of one command; another command's is refused.

    Raises:
        UsageError: there is something else, or the command was another one: the text names the first difference.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path, self._lines = path, path / "candidates.jsonl"
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; name a folder with --out")
        wanted, about = files.plain(asked), path / "shrink.json"
        if about.exists():
            found = files.read_object(about)
            for name in wanted:
                if found.get(name) != wanted[name]:
                    raise UsageError(
                        f"{path} is of another command: {name.replace('_', '-')} was {_words(found.get(name))} there and is "
                        f"{_words(wanted[name])} now. Give another --out"
                    )
        elif path.exists() and any(path.iterdir()):
            raise UsageError(f"{path} is not empty and holds no search; name another folder with --out")
        else:
            self.write("shrink.json", wanted)

    def write(self, name: str, value: Any) -> None:
        """Write a file of JSON, whole or not at all."""
        with replacing(self.path / name) as file:
            file.write(files.to_json(files.plain(value), indent=2) + b"\n")

    def candidates(self) -> list[Candidate]:
        """What was finished, in that order.

        Raises:
            DataError: a line is damaged.
        """
        if not self._lines.exists():
            return []
        known = {field.name for field in fields(Candidate)}
        found = []
        for number, line in enumerate(self._lines.read_text().splitlines(), start=1):
            try:
                entries = json.loads(line)
                found.append(Candidate(**{k: v for k, v in entries.items() if k in known and v is not None}))
            except (ValueError, TypeError, AttributeError) as error:
                raise DataError(f"{self._lines}, line {number}, is damaged ({error}): remove that line") from error
        return found

    def add(self, candidate: Candidate) -> None:
        """Add a finished candidate; one of the same name is replaced."""
        kept = [other for other in self.candidates() if other.name != candidate.name]
        with replacing(self._lines) as file:
            for each in [*kept, candidate]:
                file.write(files.to_json(files.plain(asdict(each))) + b"\n")


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
