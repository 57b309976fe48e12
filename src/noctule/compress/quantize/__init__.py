"""How few bits does a number need? Weights and activations as small whole numbers, stored and computed with."""

from noctule.compress.quantize.calibration import Histogram, calibrate, least_error, min_max, percentile
from noctule.compress.quantize.fake import FakeQuantize, FakeQuantized
from noctule.compress.quantize.fold import fold_batch_norms
from noctule.compress.quantize.mixed import choose_bits, sensitivity, weight_bytes
from noctule.compress.quantize.numbers import Grid, dequantize, dequantize_weight, grid, quantize, quantize_weight
from noctule.compress.quantize.static import Int8Layer, StaticInt8
from noctule.compress.quantize.weight_only import WeightOnly, WeightOnlyLayer

__all__ = [
    "FakeQuantize",
    "FakeQuantized",
    "Grid",
    "Histogram",
    "Int8Layer",
    "StaticInt8",
    "WeightOnly",
    "WeightOnlyLayer",
    "calibrate",
    "choose_bits",
    "dequantize",
    "dequantize_weight",
    "fold_batch_norms",
    "grid",
    "least_error",
    "min_max",
    "percentile",
    "quantize",
    "quantize_weight",
    "sensitivity",
    "weight_bytes",
]
