"""Published data sets: their files, the folders searched for them, and the download of missing ones."""

import os
from dataclasses import dataclass
from pathlib import Path

from noctule.core.errors import DataError, UsageError
from noctule.data.content import read_checked
from noctule.data.download import fetch


@dataclass(frozen=True)
class PublishedFile:
    """A file of a published data set; `path` is relative to its address, length and checksum are after gunzip."""

    path: str
    content_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """The name of the file, without the folders of its address."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Published:
    """A published data set: its name, address and files; `address` ends in a slash."""

    name: str
    address: str
    files: tuple[PublishedFile, ...]


def read_published(published: Published, *, data_dir: Path | None = None, mirror: str | None = None) -> list[bytearray]:
    """Read and check the files of a data set, in their order.

    The folders searched for each file, gzipped or not, are `data_dir`, the one in the environment variable NOCTULE_DATA
    and the cache, and in each a folder with the name of the set first. A missing file is downloaded to the cache, from
    `mirror` if given.

    Raises:
        UsageError: `data_dir` or NOCTULE_DATA is not a folder.
        DataError: a file is corrupt, or missing and cannot be downloaded; with the remedy.
    """
    folders = _folders(data_dir)
    contents = []
    for file in published.files:
        path = _find(file, published.name, folders) or _download(file, published, mirror=mirror)
        remedy = (
            f"if it is the {published.name} file delete it, and it will be downloaded; "
            f"if it belongs to another set give each set a folder of its own, here {published.name}/"
        )
        contents.append(read_checked(path, content_bytes=file.content_bytes, sha256=file.sha256, remedy=remedy))
    return contents


def cache_folder() -> Path:
    """The folder of downloads: noctule/ in $XDG_CACHE_HOME, or else in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "noctule"


def _folders(data_dir: Path | None) -> list[Path]:
    named = os.environ.get("NOCTULE_DATA")
    folders = []
    for origin, folder in (("data_dir", data_dir), ("NOCTULE_DATA", named)):
        if folder:
            if not Path(folder).is_dir():
                raise UsageError(f"{origin} is {str(folder)!r}, which is no folder; make it or name another")
            folders.append(Path(folder))
    return [*folders, cache_folder()]


def _find(file: PublishedFile, set_name: str, folders: list[Path]) -> Path | None:
    plain = file.name.removesuffix(".gz")
    for folder in folders:
        for place in (folder / set_name, folder):
            for name in (plain + ".gz", plain):
                if (place / name).is_file():
                    return place / name
    return None


def _download(file: PublishedFile, published: Published, *, mirror: str | None) -> Path:
    address = published.address if mirror is None else mirror.rstrip("/") + "/"
    target = cache_folder() / published.name / file.name
    try:
        return fetch(address + file.path, target, content_bytes=file.content_bytes, sha256=file.sha256)
    except DataError as error:
        wanted = "\n".join(f"  {each.name}  from  {published.address}{each.path}" for each in published.files)
        raise DataError(
            f"{published.name} is not on this machine and could not be downloaded: {error}\n"
            f"To do it by hand, put these files into a folder called {published.name}:\n{wanted}\n"
            "and give the folder that holds it as data_dir (--data-dir) or in the environment variable NOCTULE_DATA; "
            f"in {cache_folder()} it is found without either."
        ) from error
