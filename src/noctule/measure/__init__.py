"""What does work cost? Seconds, bytes, operations and joules: counted, compared and reported."""

from noctule.measure.measurement import Measurement, measure
from noctule.measure.progress import Progress
from noctule.measure.results import machine, result_line
from noctule.measure.storage import Footprint, footprint
from noctule.measure.timing import Ratio, Timing, interleave, ratio

__all__ = [
    "Footprint",
    "Measurement",
    "Progress",
    "Ratio",
    "Timing",
    "footprint",
    "interleave",
    "machine",
    "measure",
    "ratio",
    "result_line",
]
