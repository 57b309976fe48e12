"""The useful batch size, in words, from the noise of several workers' gradients (the gradient noise scale)."""

from collections.abc import Mapping

from noctule.report.curves import Records
from noctule.report.facts import mapping, number
from noctule.report.units import count, digits

FEW = 50
"""Measurements, of all workers together, that say nothing yet."""
_FAR = 1000
"""Times the batch there was, from which on a figure says no more than that."""


def useful_batch(workers: Mapping[int, Records], of: str = "") -> str:
    """The hint, from the sums over all workers at the end of the training; nothing where too little is known.

    Args:
        of: which of several networks it was.
    """
    last = [mapping(mapping(records[-1], "together"), "noise_scale") for records in workers.values() if records]
    measured, signal, noise = (
        sum(number(said, name) or 0 for said in last) for name in ("measured", "signal", "noise")
    )
    batch = next((found for said in last if (found := number(said, "batch"))), None)
    if measured < FEW or batch is None or noise <= 0.0:
        return ""
    had = f"this run had {count(batch)}{of}"
    if signal <= 0.0 or noise / signal > _FAR * batch:
        return (
            f"Useful batch size: far more samples in a step than there were ({had}), as the workers' gradients were almost all "
            "noise. Twice as many samples, or workers, would take almost half as many steps."
        )
    return (
        f"Useful batch size: up to about {digits(max(1.0, noise / signal), 2)} samples in a step; {had}. Below it, twice as many "
        "samples in a step, or workers, take almost half as many steps; far above, almost as many. It is measured by how far the "
        "workers' gradients lie from one another (the gradient noise scale) and mostly grows as training goes on: this is where "
        "it stood at the end."
    )
