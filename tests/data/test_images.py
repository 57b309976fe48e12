"""Pictures in class folders become tensors, in whatever mode and size they were saved."""

from pathlib import Path

import numpy as np
import pytest
import torch

from noctule.core.errors import DataError
from noctule.data import load
from noctule.data.images import read_images

Image = pytest.importorskip("PIL.Image")


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    (picture if mode is None else picture.convert(mode)).save(path)


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_class_folders(tmp_path: Path) -> None:
    for at in range(12):
        save(tmp_path / ("cat" if at % 2 else "dog") / f"{at:02d}.png", pixels(at, 4, 6, 3))
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"no picture")
    splits = load(tmp_path, validation_fraction=0)
    assert splits.preparation is not None
    assert splits.preparation.target.labels == ("cat", "dog")
    assert splits.preparation.describe()[1] == "12 pictures of 6 x 4 pixels, in colours"
    assert splits.train.image_shape == (3, 4, 6)
    first = torch.from_numpy(pixels(1, 4, 6, 3)).permute(2, 0, 1).flatten() / 255
    assert any(torch.equal(first, row) for part in (splits.train, splits.test) for row in part.inputs)


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "testing")])
def test_parts_in_folders(names: tuple[str, str], tmp_path: Path) -> None:
    for part, many in zip(names, (8, 4), strict=True):
        for at in range(many):
            save(tmp_path / part / str(at % 2) / f"{at}.png", pixels(at, 3, 3))
    splits = load(tmp_path, validation_fraction=0)
    assert (len(splits.train), len(splits.test)) == (8, 4)
    assert splits.train.shape == (3, 3), "without colours there is one channel"
    assert splits.preparation is not None
    assert splits.preparation.target.labels == (0, 1)


def test_other_sizes_and_modes_are_made_alike_and_told(tmp_path: Path) -> None:
    for at, mode in enumerate(["L", "RGB", "P", "RGBA", "1", "CMYK", "I;16", "LA"] * 2):
        shape = (10 + at, 8, 3)
        path = tmp_path / str(at % 2) / f"{at}.{'jpg' if mode == 'CMYK' else 'png'}"
        if mode == "I;16":
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels(at, 9, 9).astype(np.uint16) * 257).save(path)
        else:
            save(path, pixels(at, *shape), mode)
    splits = load(tmp_path, validation_fraction=0)
    assert splits.preparation is not None
    assert "of 64 x 64 pixels, in colours, resized from" in splits.preparation.note
    assert splits.train.image_shape == (3, 64, 64)
    assert 0 <= splits.train.inputs.min() < splits.train.inputs.max() <= 1


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png", pixels(0, 3, 3))
    save(tmp_path / "b" / "0.png", pixels(0, 3, 3))
    (tmp_path / "b" / "1.png").write_bytes((tmp_path / "b" / "0.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"b/1\.png is corrupt or no picture"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"b/1\.png"):
        read_images([tmp_path / "b" / "1.png"], mode="L", size=(3, 3))
