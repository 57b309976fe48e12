"""What the reference models refuse."""


def check_image_model(shape: tuple[int, int, int], classes: int, *, skipped: float = 0.0, **counts: int) -> None:
    """Raise ValueError for shapes, numbers of classes and other counts below 1, and for a probability that is none."""
    if len(shape) != 3 or min(shape) < 1 or min(classes, *counts.values()) < 1:
        raise ValueError(
            f"shape must be (C, H, W), and it, classes, {' and '.join(counts)} at least 1, got {shape}, {classes}, "
            f"{', '.join(map(str, counts.values()))}"
        )
    if not 0.0 <= skipped < 1.0:
        raise ValueError(f"skipped must lie in [0, 1), got {skipped}")
