"""Strategies of training together, each a Method for a plain loop."""

from noctule.parallel.diloco import AVERAGE, NESTEROV, DiLoCo

__all__ = ["AVERAGE", "NESTEROV", "DiLoCo"]
