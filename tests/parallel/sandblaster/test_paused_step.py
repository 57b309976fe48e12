"""A step that is paused at each evaluation is the step of torch's own optimizer, bit for bit; also over a restart."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noctule.checkpoint import Checkpoints
from noctule.parallel.sandblaster.paused_step import PausedStep

PROBLEMS = {
    "valley": lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(),
    "waves": lambda x: (x**4).sum() / 10 + torch.sin(3 * x).sum() + x.sum() ** 2,
    "bowl": lambda x: (torch.arange(1.0, len(x) + 1, dtype=x.dtype) ** 2 * (x - 1) ** 2).sum(),
}


def begin(size, seed=0):
    return nn.Parameter(torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 2)


def direct(optimizer, x, f, points):
    """A step in the usual way; the loss at its beginning."""

    def closure():
        points.append(x.detach().clone())
        optimizer.zero_grad()
        (loss := f(x)).backward()
        return loss

    return optimizer.step(closure).item()


def paused(optimizer, x, f, points):
    """The same step, with losses and gradients that come from elsewhere."""
    step = PausedStep(optimizer, x)
    first = step.advance()
    while first is None:
        points.append(x.detach().clone())
        point = points[-1].clone().requires_grad_()
        (loss := f(point)).backward()
        first = step.advance((loss.item(), point.grad))
    return first


@settings(max_examples=40, deadline=None)
@given(
    problem=st.sampled_from(sorted(PROBLEMS)),
    size=st.integers(2, 9),
    seed=st.integers(0, 99),
    steps=st.integers(1, 4),
    line_search_fn=st.sampled_from(["strong_wolfe", None]),
    max_iter=st.integers(1, 12),
    max_eval=st.none() | st.integers(1, 12),
    history_size=st.integers(1, 6),
    lr=st.sampled_from([1.0, 0.3, 1e-3]),
)
def test_points_losses_and_weights_are_those_of_the_optimizer_alone(problem, size, seed, steps, **options):
    found = []
    for one in (direct, paused):
        x, points = begin(size, seed), []
        optimizer = torch.optim.LBFGS([x], **options)
        losses = [one(optimizer, x, PROBLEMS[problem], points) for _ in range(steps)]
        found.append((losses, [point.tolist() for point in points], x.tolist(), optimizer.state[x]["func_evals"]))
    assert repr(found[0]) == repr(found[1])  # NaN too: without a line search the valley is left


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_resumed_from_a_checkpoint_is_never_stopped(tmp_path, steps):
    def new():
        x = begin(5)
        return torch.optim.LBFGS([x], max_iter=3, line_search_fn="strong_wolfe"), x, PROBLEMS["waves"], []

    whole, first, second = new(), new(), new()
    losses = [paused(*whole) for _ in range(steps + 3)]
    before = [paused(*first) for _ in range(steps)]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(steps, {"x": first[1].detach(), "optimizer": first[0].state_dict()})
    _, state = checkpoints.latest()
    second[1].data.copy_(state["x"])
    second[0].load_state_dict(state["optimizer"])
    assert before + [paused(*second) for _ in range(3)] == losses
    assert torch.equal(second[1], whole[1])


def test_an_abandoned_step_ends_its_thread_and_an_error_reaches_the_caller():
    x = begin(3)
    for advances in (0, 1):
        step = PausedStep(torch.optim.LBFGS([x]), x)
        for _ in range(advances):
            assert step.advance() is None
        step.abandon()
        step.abandon()
    assert not [thread for thread in threading.enumerate() if thread.name == "noctule-step"]
    step = PausedStep(torch.optim.LBFGS([x], line_search_fn="weak"), x)
    assert step.advance() is None
    with pytest.raises(RuntimeError, match="only 'strong_wolfe' is supported"):
        step.advance((1.0, torch.ones_like(x)))
