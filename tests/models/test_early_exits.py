"""Early exits: thresholds at both ends, each sample's own output, and operations that are really saved."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from noctule.compress.distill import self_distillation
from noctule.core.convert import convert_
from noctule.data import Batches, load
from noctule.models import EarlyExits, cnn, exit_head, exits_loss, measure_exits, mlp
from noctule.sparse.layers import ToSparse
from noctule.train.fit import evaluate, fit


def network(threshold=0.5):
    torch.manual_seed(0)
    stages = cnn((1, 8, 8), 10, channels=(4, 8), convolutions=1)
    assert isinstance(stages[5], nn.BatchNorm2d)
    return EarlyExits(stages, {"5": exit_head(4, 10)}, threshold=threshold)


def test_with_a_threshold_of_1_nothing_leaves_and_with_0_everything_at_once():
    model, x = network(1.0).eval(), 100 * torch.rand(20, 64)
    torch.testing.assert_close(model(x), model.stages(x))
    assert model.leave(x)[1].tolist() == [1] * 20
    model.threshold = 0.0
    torch.testing.assert_close(model(x), model.heads["5"](model.stages[:6](x)))
    assert model.leave(x)[1].tolist() == [0] * 20


def test_each_sample_gets_the_output_of_the_first_exit_that_is_sure():
    stages = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 4))
    torch.manual_seed(1)
    model = EarlyExits(stages, {"0": nn.Linear(6, 4), "2": nn.Linear(6, 4)}, threshold=0.5)
    x = 5 * torch.randn(200, 6)
    every = model(x)
    outputs, exits = model.eval().leave(x)
    assert {*exits.tolist()} == {0, 1, 2}
    sure = [y.softmax(1).amax(1) > 0.5 for y in every]
    for k in range(200):
        expected = 0 if sure[0][k] else 1 if sure[1][k] else 2
        assert exits[k] == expected
        torch.testing.assert_close(outputs[k], every[expected][k])
    assert model(x[:0]).shape == (0, 4)


def test_operations_are_those_of_the_stages_that_ran():
    model = EarlyExits(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)), {"0": nn.Linear(8, 3)})
    x = torch.randn(10, 4)
    with torch.no_grad():
        model.heads["0"].weight.zero_()
        model.heads["0"].bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    found = measure_exits(model, x, batch_size=3)
    assert model.training
    assert found.left == {"0": 10, "": 0}
    assert found.full_multiply_adds == 10 * (4 * 8 + 8 * 8 + 8 * 3)
    assert found.multiply_adds == 10 * (4 * 8 + 8 * 3)
    assert found.saved == pytest.approx(1 - 56 / 120)
    model.threshold = 1.0
    found = measure_exits(model, x)
    assert found.left == {"0": 0, "": 10}
    assert found.multiply_adds == found.full_multiply_adds + 10 * 8 * 3


def test_sparse_stages_are_counted_too():
    torch.manual_seed(0)
    stages = convert_(mlp(16, 32, 32, 3), ToSparse(density=0.25)).model
    weights = sum(m.weights for m in stages.modules() if hasattr(m, "weights"))
    found = measure_exits(EarlyExits(stages, {"1": nn.Linear(32, 3)}, threshold=1.0), torch.randn(8, 16))
    assert found.full_multiply_adds == 8 * weights


def test_the_loss_weighs_the_exits():
    outputs, targets = torch.randn(3, 5, 4).unbind(), torch.tensor([0, 1, 2, 3, 0])
    losses = [F.cross_entropy(y, targets) for y in outputs]
    torch.testing.assert_close(exits_loss(outputs, targets), sum(losses))
    torch.testing.assert_close(exits_loss(outputs, targets, weights=[1.0, 0.0, 0.3]), losses[0] + 0.3 * losses[2])
    assert exits_loss(outputs[0], targets) == losses[0]
    with pytest.raises(ValueError, match="2 weights for 3 exits"):
        exits_loss(outputs, targets, weights=[1.0, 1.0])


@pytest.mark.parametrize("loss_fn", [exits_loss, self_distillation])
def test_fit_trains_it_as_it_is_and_easy_samples_leave(loss_fn):
    splits = load("digits", seed=0)
    model = network(0.8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    fit(model, optimizer, Batches(splits.train, 32, seed=0), validation=splits.validation, epochs=3, loss_fn=loss_fn)
    early = evaluate(model, splits.test)[1]
    found = measure_exits(model, splits.test.inputs)
    assert early > 0.8
    assert min(found.left.values()) > 0
    assert sum(found.left.values()) == len(splits.test)


def test_heads_and_thresholds_that_there_cannot_be_are_refused():
    stages = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    for heads in ({"1": nn.Linear(3, 3)}, {"7": nn.Linear(8, 3)}):
        with pytest.raises(ValueError, match="no exit can stand after"):
            EarlyExits(stages, heads)
    for heads, threshold in (({}, 0.5), ({"0": nn.Linear(8, 3)}, 1.5)):
        with pytest.raises(ValueError, match="at least one head and a threshold"):
            EarlyExits(stages, heads, threshold=threshold)
    named = EarlyExits({"stem": nn.Linear(4, 8), "head": nn.Linear(8, 3)}, {"stem": nn.Linear(8, 3)})
    assert len(named(torch.rand(2, 4))) == 2
