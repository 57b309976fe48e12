"""Reader of pictures, a folder for each class, by Pillow, an optional extra."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from noctule.core.errors import DataError
from noctule.data.frame import Arrays

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
LARGEST_SIDE = 128
"""Longest side, in pixels, of pictures of one size that are not resized."""
_SIDE = 64
"""Height and width of resized pictures, in pixels."""


def find_images(folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def classes_of(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class: of each subfolder that holds any, by its name."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {path.name: images for path in inside if (images := find_images(path))}


def read_classes(parts: dict[str, Path], *, mode: str = "", size: tuple[int, int] | None = None) -> dict[str, Arrays]:
    """Read the pictures of each part; its subfolders are the classes.

    Args:
        parts: a folder of class folders by part.
        mode: L or RGB; if not given L where no picture has colours.
        size: height and width; if not given that of all pictures, or 64 x 64 where they differ or are larger than 128.
    """
    files = {part: classes_of(folder) for part, folder in parts.items()}
    flat = {part: [path for of_class in found.values() for path in of_class] for part, found in files.items()}
    mode, size, note = _form(flat["train"], mode, size)
    made = {}
    for part, found in files.items():
        labels = [name for name, of_class in found.items() for _ in of_class]
        names = [str(path.relative_to(parts[part])) for path in flat[part]]
        pixels = read_images(flat[part], mode=mode, size=size)
        labels_array = np.array(labels, object)
        source = str(parts[part])
        made[part] = Arrays(pixels, labels_array, source=source, files=names, always_classes=True, note=note)
    return made


def read_images(paths: Sequence[Path], *, mode: str, size: tuple[int, int]) -> np.ndarray:
    """Pixels of pictures, resized if necessary: (N, H, W) or (N, 3, H, W) uint8."""
    high, wide = size
    pixels = np.empty((len(paths), high, wide) if mode == "L" else (len(paths), high, wide, 3), np.uint8)
    for position, path in enumerate(paths):
        picture = _open(path)
        converted = _as_mode(picture, mode)
        if converted.size != (wide, high):
            converted = converted.resize((wide, high), _pillow().Resampling.BILINEAR)
        pixels[position] = np.asarray(converted)
    return pixels if mode == "L" else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _form(paths: Sequence[Path], mode: str, size: tuple[int, int] | None) -> tuple[str, tuple[int, int], str]:
    """A common mode, L or RGB, a common height and width, and a description of the conversion."""
    if mode and size:
        return mode, size, ""
    sizes, colours = Counter(), False
    for path in paths:
        picture = _open(path)
        sizes[picture.size] += 1
        colours = colours or picture.mode not in ("L", "1", "LA", "I", "I;16", "F")
    (wide, high), _ = sizes.most_common(1)[0]
    done = ""
    if len(sizes) > 1 or max(wide, high) > LARGEST_SIDE:
        were = f"{len(sizes)} different sizes" if len(sizes) > 1 else f"{wide} x {high}"
        wide = high = _SIDE
        done = f", resized from {were}"
    mode = mode or ("RGB" if colours else "L")
    note = f"{len(paths)} pictures of {wide} x {high} pixels, {'in colours' if mode == 'RGB' else 'grey'}{done}"
    return mode, size or (high, wide), note


def _as_mode(picture, mode: str):
    if picture.mode.startswith("I"):  # 16 bits
        values = np.asarray(picture, np.float64)
        picture = _pillow().fromarray((values / (257 if values.max(initial=0) > 255 else 1)).astype(np.uint8))
    return picture.convert(mode)


def _open(path: Path):
    from PIL import ImageOps

    try:
        with _pillow().open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture) or picture
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} is corrupt or no picture ({error}); repair it or take it away") from error


def _pillow():
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("pictures are read by Pillow: pip install 'noctule[images]'") from error
    return Image
