"""The dense twin at its strongest: the fastest of several ways to compute it on this machine."""

import copy
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from noctule.measure import interleave
from noctule.report import files
from noctule.sparse.layers.onednn import OneDnnLinear

SECONDS = 2.0
"""Approximate time of the measurement."""
GIVE_UP_RATIO = 8.0
"""Ratio of first steps, to the fastest, above which a way is not timed again."""
LOSS_TOLERANCE = 0.05
"""Relative difference of a way's loss from that in float32 up to which it counts as correct."""

Way = Callable[[nn.Module], None]
"""Function that changes how a network computes; its parameters and their names stay."""


def use_onednn_(model: nn.Module) -> None:
    """Compute every `nn.Linear` by oneDNN's product."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, OneDnnLinear(child))


def use_bf16_(model: nn.Module) -> None:
    """Compute the forward pass under autocast to bfloat16; parameters and outputs stay float32."""
    model.forward = partial(_in_bf16, model)  # unlike a closure, it follows a deep copy


def _in_bf16(model: nn.Module, *inputs: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return type(model).forward(model, *inputs).float()


WAYS: dict[str, Way] = {"fp32": lambda model: None, "fp32 oneDNN": use_onednn_, "bf16 autocast": use_bf16_}
"""Ways by their names in the report; the first is the reference for the others."""


def strongest_(model: nn.Module, loss: Callable[[nn.Module], Tensor], file: Path) -> dict[str, Any]:
    """Switch a dense network to its fastest way, and return that way and the time of a step in each.

    Args:
        model: a new network; its optimizer may exist already.
        loss: function from a network to its loss on one batch.
        file: stores the choice for a resumed run and for other workers of the same folder: the first to write it chooses.

    Returns:
        ``way``, and ``ways_seconds``: of a step, forward and backward, in each way with the results of float32.
    """
    if not file.exists():
        found = _measured(model, loss)
        _publish(file, {"way": min(found, key=lambda name: found[name]), "ways_seconds": found})
    chosen = files.read_object(file)
    WAYS[chosen["way"]](model)
    return chosen


def _measured(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, float]:
    """Seconds of a step in each correct way: the median of several, of one step for ways that are far slower."""
    steps: dict[str, Callable[[], float]] = {}
    seconds: dict[str, float] = {}
    reference = None
    with torch.random.fork_rng(devices=[]):
        for name, use in WAYS.items():
            twin = copy.deepcopy(model)
            try:
                use(twin)
                torch.manual_seed(0)
                started = perf_counter()
                found = _step(twin, loss)
            except (RuntimeError, NotImplementedError, AttributeError):  # not in this build of torch
                continue
            reference = found if reference is None else reference
            if not seconds or abs(found - reference) <= LOSS_TOLERANCE * max(abs(reference), 1e-3):  # false for NaN
                seconds[name] = perf_counter() - started
                steps[name] = partial(_step, twin, loss)
        close = {name: step for name, step in steps.items() if seconds[name] <= GIVE_UP_RATIO * min(seconds.values())}
        once = interleave(close, rounds=1, warmup=1 if len(close) > 1 else 0)
        rounds = int(SECONDS / sum(timing.minimum for timing in once.values()))
        timings = interleave(close, rounds=min(max(rounds, 3), 15), warmup=0)
    return seconds | {name: timing.median_seconds for name, timing in timings.items()}


def _step(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> float:
    model.zero_grad(set_to_none=True)
    value = loss(model)
    value.backward()
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    return float(value.detach()) if finite else float("nan")


def _publish(file: Path, content: dict[str, Any]) -> None:
    """Write a file, whole, unless another worker has written it first."""
    own = file.with_name(f".{file.name}.{os.getpid()}")
    own.write_text(json.dumps(content))
    try:
        os.link(own, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        files.replace(file, own.read_bytes())
    finally:
        own.unlink()
