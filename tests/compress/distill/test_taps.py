"""Taps: what they record, and that nothing of them is left."""

import contextlib

import pytest
import torch
from torch import nn

from noctule.compress.distill import taps


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_outputs_are_recorded_with_their_graph_and_without_under_no_grad():
    model, x = network(), torch.randn(5, 3)
    with taps(model, ["0", ""]) as heard:
        y = model(x)
        assert heard[""] is y
        heard["0"].sum().backward()
        with torch.no_grad():
            model(x)
        assert not heard["0"].requires_grad
        with torch.inference_mode():
            model(x)
        assert list(heard) == ["0", ""]
        assert len(heard) == 2
    assert model[0].weight.grad.abs().sum() > 0
    assert model[2].weight.grad is None


def test_the_block_leaves_no_hook_and_no_output_even_after_an_error():
    model = network()
    with contextlib.suppress(KeyError), taps(model, ["0", "1"]) as heard:
        model(torch.randn(5, 3))
        raise KeyError
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="returned nothing"):
        heard["0"]


def test_unknown_names_leave_no_hook():
    model = network()
    with pytest.raises(ValueError, match="no module 'O'"), taps(model, ["0", "O"]):
        pass
    assert not model[0]._forward_hooks
    with taps(model, ["0"]) as heard, pytest.raises(KeyError, match="not tapped"):
        heard["1"]


def test_an_output_that_was_changed_in_place_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    with taps(model, ["0", "1"]) as heard:
        model(torch.randn(5, 3))
        assert heard["1"].shape == (5, 4)
        with pytest.raises(RuntimeError, match="in place"):
            heard["0"]
