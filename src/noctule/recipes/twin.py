"""The dense twin at its strongest: of the ways that this machine has to train it, the one whose steps are the fastest."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
"""That measuring may take, about."""
HOPELESS = 8.0
"""Times as long as another's that a way's first step may take."""
NEAR = 0.05
"""How far the loss of a way may lie from that in float32, of that loss."""

Way = Callable[[nn.Module], None]
"""Has a network compute in a way of its own from now on; its parameters and their names stay."""


def use_onednn_(model: nn.Module) -> None:
    """Every `nn.Linear` on oneDNN's product."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, OneDnnLinear(child))


def use_bf16_(model: nn.Module) -> None:
    """The forward pass under autocast to bfloat16; parameters and outputs stay float32."""
    model.forward = partial(_in_bf16, model)  # unlike a closure, it follows a deep copy


def _in_bf16(model: nn.Module, *inputs: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return type(model).forward(model, *inputs).float()


WAYS: dict[str, Way] = {"fp32": lambda model: None, "fp32 oneDNN": use_onednn_, "bf16 autocast": use_bf16_}
"""By the names that a report gives them; the first is what the others have to agree with."""


def strongest_(model: nn.Module, loss: Callable[[nn.Module], Tensor], file: Path) -> dict[str, Any]:
    """Have a dense network compute in its fastest way, and say which that is and what a step of each took.

    Args:
        model: new, with its optimizer made or not.
        loss: of one batch, by a network.
        file: keeps the choice for a run that goes on, and for other workers of the same folder: the first to write it chooses.

    Returns:
        ``way``, and ``ways_seconds``: a step, forward and backward, in each way that computes what float32 does.
    """
    if not file.exists():
        found = _measured(model, loss)
        _publish(file, {"way": min(found, key=lambda name: found[name]), "ways_seconds": found})
    chosen = files.read_object(file)
    WAYS[chosen["way"]](model)
    return chosen


def _measured(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, float]:
    """Seconds of a step, the median of turns; of what takes many times as long as another way, of one step."""
    steps: dict[str, Callable[[], float]] = {}
    seconds: dict[str, float] = {}
    right = None
    with _same_draws():
        for name, use in WAYS.items():
            twin = copy.deepcopy(model)
            try:
                use(twin)
                torch.manual_seed(0)
                started = perf_counter()
                found = _step(twin, loss)
            except (RuntimeError, NotImplementedError, AttributeError):  # not in this build of torch
                continue
            right = found if right is None else right
            if not seconds or abs(found - right) <= NEAR * max(abs(right), 1e-3):  # NaN is not
                seconds[name] = perf_counter() - started
                steps[name] = partial(_step, twin, loss)
        close = {name: step for name, step in steps.items() if seconds[name] <= HOPELESS * min(seconds.values())}
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


@contextmanager
def _same_draws() -> Iterator[None]:
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _publish(file: Path, content: dict[str, Any]) -> None:
    """Write a file unless another worker just has."""
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
