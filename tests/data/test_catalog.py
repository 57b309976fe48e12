"""The built-in sets are what they are said to be, and what does not exist is told with what does."""

import doctest
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from sklearn.datasets import load_digits

from noctule.core.errors import DataError, UsageError
from noctule.data import Splits, load, names, standardize
from noctule.data.digits import read_digits
from noctule.data.madelon import MADELON

if TYPE_CHECKING:
    from conftest import Site


def sizes(splits: Splits) -> list[int]:
    return [len(part) for part in (splits.train, splits.validation, splits.test)]


def test_names_are_sorted() -> None:
    assert names == ("digits", "fashion-mnist", "madelon", "mnist")


def test_digits_need_nothing() -> None:
    splits = load("digits")
    assert sizes(splits) == [1258, 180, 359]
    assert sum(sizes(splits)) == 1797
    assert (splits.train.name, splits.train.classes, splits.train.shape) == ("digits", 10, (8, 8))
    assert splits.train.inputs.min() == 0
    assert splits.train.inputs.max() == 1
    for part in (splits.train, splits.validation, splits.test):
        share = torch.bincount(part.targets) / len(part)
        assert (share - 0.1).abs().max() < 0.01
    again, other = load("digits"), load("digits", seed=1)
    assert torch.equal(again.train.inputs, splits.train.inputs)
    assert torch.equal(other.test.inputs, splits.test.inputs)
    assert not torch.equal(other.validation.inputs, splits.validation.inputs)


def test_digits_are_those_of_scikit_learn_which_is_not_imported_and_asked_for_where_it_is_missing() -> None:
    pixels, labels = load_digits(return_X_y=True)
    digits = read_digits()["train"]
    assert torch.equal(digits.inputs, torch.from_numpy(pixels / 16).float())
    assert torch.equal(digits.targets, torch.from_numpy(labels))
    code = (
        "import sys, noctule.data\n"
        "noctule.data.load('digits')\n"
        "print('sklearn' in sys.modules)\n"
        "sys.modules['sklearn'] = None\n"
        "try: noctule.data.load('digits')\n"
        "except noctule.core.errors.DataError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("False\n")
    assert "pip install scikit-learn" in done.stdout


def test_fashion_mnist(real_data: Path) -> None:
    if not any(real_data.glob("**/train-images-idx3-ubyte*")):
        pytest.skip("NOCTULE_DATA holds no fashion-mnist")
    splits = load("fashion-mnist", data_dir=real_data, validation_fraction=1 / 12)
    assert sizes(splits) == [55_000, 5_000, 10_000]
    assert (splits.train.features, splits.train.classes, splits.train.shape) == (784, 10, (28, 28))
    assert torch.bincount(splits.validation.targets).tolist() == [500] * 10
    assert torch.bincount(splits.test.targets).tolist() == [1000] * 10
    assert splits.test.targets[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert splits.train.inputs.min() == 0
    assert splits.train.inputs.max() == 1
    scaled = standardize(splits).train.inputs[:, 300:310]
    assert scaled.mean(0).abs().max() < 1e-4
    assert (scaled.std(0, correction=0) - 1).abs().max() < 1e-3


def test_madelon_from_a_server_and_then_from_the_cache(real_data: Path, site: "Site", own_cache: Path) -> None:
    for file in MADELON.files:
        path = next(real_data.glob(f"**/{file.name}"), None)
        if path is None:
            pytest.skip(f"NOCTULE_DATA holds no {file.name}")
        site.put("/mirror/" + file.path, path.read_bytes())
    fetched = load("madelon", mirror=site.address + "mirror/")
    site.replies.clear()
    cached = load("madelon", mirror=site.address + "mirror/")
    assert len(site.asked) == 4
    assert sizes(fetched) == [1800, 200, 600]
    assert (fetched.train.features, fetched.train.classes) == (500, 2)
    assert torch.bincount(fetched.test.targets).tolist() == [300, 300]
    # the check sum of all 600 x 500 values that the organisers publish with the set
    assert fetched.test.inputs.double().sum() == 146_395_833
    for one, other in ((fetched.train, cached.train), (fetched.test, cached.test)):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "madelon"])
def test_no_copy_and_no_server(name: str, site: "Site", own_cache: Path) -> None:
    with pytest.raises(DataError, match=f"{name} is not on this machine .* 404 Not Found\nTo do it by hand, put these"):
        load(name, mirror=site.address)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fashon-mnist", "did you mean 'fashion-mnist'"),
        ("fashion_mnist", "did you mean 'fashion-mnist'"),
        ("DIGITS", "did you mean 'digits'"),
        ("/nowhere/at/all", "Built-in sets: digits, fashion-mnist, madelon, mnist"),
        (Path("digits-that-are-a-path"), "Built-in sets"),
    ],
)
def test_an_unknown_name_is_a_usage_error(name: str | Path, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load(name)


def test_a_path_goes_before_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "own.csv").write_text("a,label\n" + "1,0\n2,1\n" * 5)
    assert load("digits").train.features == 64
    assert load(Path("digits")).train.features == load("./digits").train.features == 1


@pytest.mark.parametrize("module", ["batches", "catalog", "dataset"])
def test_the_examples_in_the_docstrings(module: str) -> None:
    result = doctest.testmod(import_module(f"noctule.data.{module}"))
    assert result.attempted
    assert not result.failed
