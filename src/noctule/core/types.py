"""The shared type names."""

from collections.abc import Callable

Schedule = Callable[[int], float]
"""A number that changes with the step: step (from 0) -> value."""
