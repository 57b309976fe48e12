"""Gradual magnitude pruning: the smallest weights go, fast at first and ever more slowly.

Zhu, Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression", arXiv 1710.01878. Differs
from the authors' code: gradients and weights are masked, where there the weight is masked in the forward pass only, so a pruned
weight does not live on out of sight; layers may share the weights in other ways than all alike.
"""

from typing import Any

from noctule.compress.prune.engine import Prune
from noctule.core.schedule import cubic
from noctule.sparse.budget import check_density


def gradual_magnitude(*, density: float, until: int, start: int = 0, every: int = 100, **options: Any) -> Prune:
    """`Prune` by magnitude on the cubic ramp from 1 after ``start`` steps to ``density`` after ``until``.

    Args:
        density: the last one, in (0, 1].
        until: the number of steps after which it is reached (at the next multiple of ``every``).
        start: steps before the first connection goes.
        every: steps from one removal to the next.
        options: others of `Prune`, such as ``pattern``.
    """
    check_density(density)
    if not 0 <= start < until:
        raise ValueError(f"the ramp needs 0 <= start < until, got start={start} and until={until}")
    ramp = cubic(1.0, end=density, steps=until - start)
    return Prune(schedule=lambda step: ramp(max(step - start, 0)), every=every, **options)
