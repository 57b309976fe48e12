"""Made-up results of a run, and how the laws of these tests are tried."""

import math
from typing import Any

from hypothesis import settings

law = settings(deadline=None, derandomize=True)

LAYERS = {"0": (41_200, 784_000), "3": (46_100, 1_000_000), "6": (3_100, 10_000)}

DATA = {"name": "fashion-mnist", "features": 784, "classes": 10, "train": 50_000, "validation": 10_000, "test": 10_000}
SPARSE = {
    "test_accuracy": 0.9012,
    "test_loss": 0.289,
    "best_epoch": 9,
    "epochs": 10,
    "seconds_per_epoch": 1.25,
    "seconds": 12.6,
    "parameters": 100_000,
    "weights_bytes": 400_000,
    "index_bytes": 200_000,
    "gradient_bytes": 400_000,
    "optimizer_bytes": 400_000,
    "peak_memory_bytes": 612_000_000,
    "multiply_adds_per_sample": 300_000,
    "joules": None,
}
DENSE = SPARSE | {
    "test_accuracy": 0.9045,
    "seconds_per_epoch": 8.5,
    "seconds": 85.2,
    "parameters": 2_500_000,
    "weights_bytes": 10_000_000,
    "index_bytes": 0,
    "gradient_bytes": 10_000_000,
    "optimizer_bytes": 10_000_000,
    "multiply_adds_per_sample": 7_500_000,
}


def epochs(series: str, number: int = 10, *, pace: float = 1.25, layers: bool = False) -> list[dict[str, Any]]:
    """The records of a series that learns as series do."""
    records = []
    for epoch in range(1, number + 1):
        done = math.exp(-4 * epoch / number)
        record: dict[str, Any] = {
            "series": series,
            "epoch": epoch,
            "step": epoch * 391,
            "seconds": epoch * pace,
            "train_loss": 0.2 + 0.6 * done,
            "validation_loss": 0.3 + 0.4 * done,
            "validation_accuracy": 0.9 - 0.2 * done,
            "samples_per_second": 50_000 / pace,
        }
        if layers:
            record["layers"] = {
                name: {"weights": weights, "places": places, "moved": int(weights * 0.3 * done)}
                for name, (weights, places) in LAYERS.items()
            }
        records.append(record)
    return records
