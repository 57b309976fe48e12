"""How OpenMP's threads wait for work, which torch and the kernels share: GNU's runtime reads it once, as torch is loaded."""

import os
import sys

_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def let_threads_sleep() -> bool:
    """Have idle OpenMP threads sleep; returns False where the environment says otherwise or torch is loaded, which is too late.

    By default a thread that waits for the others spins for milliseconds. Where other programs want the processor too, it keeps the
    very thread that it waits for from running: steps of a small network then take ten to a hundred times as long. A thread that
    sleeps is woken in some microseconds. ``noctule run`` does this.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _VARIABLES):
        return False
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return True


def how_threads_wait() -> str:
    """How idle threads wait, as the environment variables say, in words."""
    found = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    if found:
        return f"as {' and '.join(found)} say" if len(found) > 1 else f"as {found[0]} says"
    return "they spin for a while: where other programs run too, start Python with OMP_WAIT_POLICY=passive, as noctule run does"
