"""A published set is found where the user keeps it, else fetched once, else the error says what to put where."""

import gzip
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from noctule.core.errors import DataError, UsageError
from noctule.data.published import Published, PublishedFile, read_published

if TYPE_CHECKING:
    from conftest import Site

ONE, TWO = b"first content", b"second content"


def tiny(address: str) -> Published:
    files = (("parts/one.gz", ONE), ("two.txt", TWO))
    return Published(
        "tiny",
        address,
        tuple(PublishedFile(path, len(content), hashlib.sha256(content).hexdigest()) for path, content in files),
    )


NOWHERE = tiny("http://127.0.0.1:9/")


def put(folder: Path, one: bytes = ONE, two: bytes = TWO, *, plain: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ("one" if plain else "one.gz")).write_bytes(one if plain else gzip.compress(one))
    (folder / "two.txt").write_bytes(two)


@pytest.mark.parametrize("below", ["tiny", ""])
@pytest.mark.parametrize("plain", [True, False])
def test_every_place_is_looked_at(
    below: str, plain: bool, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(own_cache / below, plain=plain)
    assert read_published(NOWHERE) == [ONE, TWO]
    named, given = tmp_path / "named", tmp_path / "given"
    put(named / below, plain=plain)
    put(own_cache / below, b"never", b"read", plain=plain)
    monkeypatch.setenv("NOCTULE_DATA", str(named))
    assert read_published(NOWHERE) == [ONE, TWO]
    put(given / below, plain=plain)
    put(named / below, b"never", b"read", plain=plain)
    assert read_published(NOWHERE, data_dir=given) == [ONE, TWO]


def test_what_is_nowhere_is_fetched_once(site: "Site", own_cache: Path) -> None:
    site.put("/parts/one.gz", gzip.compress(ONE))
    site.put("/two.txt", TWO)
    assert read_published(tiny(site.address)) == [ONE, TWO]
    assert read_published(tiny(site.address)) == [ONE, TWO]
    assert site.asked == ["/parts/one.gz", "/two.txt"]
    assert sorted(path.name for path in (own_cache / "tiny").iterdir()) == ["one.gz", "two.txt"]


def test_only_what_is_missing_is_fetched_and_from_the_mirror(site: "Site", own_cache: Path, tmp_path: Path) -> None:
    put(tmp_path / "given")
    (tmp_path / "given" / "two.txt").unlink()
    site.put("/mirror/two.txt", TWO)
    contents = read_published(NOWHERE, data_dir=tmp_path / "given", mirror=site.address + "mirror")
    assert contents == [ONE, TWO]
    assert site.asked == ["/mirror/two.txt"]


@pytest.mark.parametrize("wrong", [b"", b"First content", ONE[:-1], ONE + b"x"])
def test_a_corrupt_local_file_is_named_with_what_to_do(wrong: bytes, own_cache: Path) -> None:
    put(own_cache / "tiny", wrong)
    with pytest.raises(DataError, match=r"one\.gz (is corrupt|holds more).*; if it is the tiny file delete it"):
        read_published(NOWHERE)
    (own_cache / "tiny" / "one.gz").write_bytes(gzip.compress(ONE)[:-9])
    with pytest.raises(DataError, match=r"one\.gz is corrupt or cut short .*; if it is the tiny file delete it"):
        read_published(NOWHERE)


def test_the_error_gives_expected_and_got(own_cache: Path) -> None:
    put(own_cache / "tiny", b"wrong content")
    expected, got = (hashlib.sha256(content).hexdigest() for content in (ONE, b"wrong content"))
    with pytest.raises(
        DataError, match=f"expected 13 bytes of content with sha256 {expected}, got 13 bytes with {got}"
    ):
        read_published(NOWHERE)


def test_no_network_and_no_copy_says_what_to_put_where(own_cache: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_published(NOWHERE)
    for part in (
        "tiny is not on this machine and could not be downloaded: http://127.0.0.1:9/parts/one.gz: no connection",
        "put these files into a folder called tiny:",
        "  one.gz  from  http://127.0.0.1:9/parts/one.gz\n  two.txt  from  http://127.0.0.1:9/two.txt\n",
        "NOCTULE_DATA",
        "--data-dir",
        str(own_cache),
    ):
        assert part in str(caught.value)


def test_a_folder_that_is_none(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"data_dir is .*nowhere', which is no folder"):
        read_published(NOWHERE, data_dir=tmp_path / "nowhere")
    monkeypatch.setenv("NOCTULE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"NOCTULE_DATA is .*nowhere', which is no folder"):
        read_published(NOWHERE)


def test_without_xdg_the_cache_is_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for relative in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("NOCTULE_DATA", raising=False)
        put(tmp_path / ".cache" / "noctule" / "tiny")
        assert read_published(NOWHERE) == [ONE, TWO]
