"""The dense twin computes what `nn.Linear` computes in every way, and the choice is stored."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from noctule import mlp
from noctule.data import Batches, load, standardize
from noctule.recipes.difference import accuracies, difference, interval
from noctule.recipes.single_process import single_process_seconds, slowdown
from noctule.recipes.twin import WAYS, strongest_

BATCH = torch.randn(16, 12, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return mlp(12, 20, 20, 3)


def loss(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(BATCH[0]), BATCH[1])


@pytest.mark.parametrize("way", WAYS)
def test_every_way_computes_the_same_function_and_keeps_the_parameters(way):
    model, plain = network(), network()
    parameters = list(model.parameters())
    WAYS[way](model)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert list(model.state_dict()) == list(plain.state_dict())
    loss(model).backward()
    loss(plain).backward()
    assert model(BATCH[0]).dtype is torch.float32
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        away = float((found.grad - expected.grad).norm() / expected.grad.norm())
        assert away < (0.3 if "bf16" in way else 1e-4)


def test_a_copy_of_a_twin_computes_with_its_own_parameters():
    model = network()
    WAYS["bf16 autocast"](model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(BATCH[0]).any()
    assert model(BATCH[0]).any()


def test_choosing_changes_nothing_but_the_way_and_a_resumed_run_keeps_it(tmp_path):
    model, before = network(), copy.deepcopy(network().state_dict())
    torch.manual_seed(5)
    draws = torch.get_rng_state()
    chosen = strongest_(model, loss, tmp_path / "twin.json")
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    seconds = chosen["ways_seconds"]
    assert chosen["way"] == min(seconds, key=seconds.get)
    (tmp_path / "twin.json").write_text(json.dumps({"way": "bf16 autocast", "ways_seconds": {}}))
    assert strongest_(network(), loss, tmp_path / "twin.json")["way"] == "bf16 autocast"
    assert [path.name for path in tmp_path.iterdir()] == ["twin.json"]


def test_what_does_not_compute_the_same_is_not_chosen(tmp_path, monkeypatch):
    def wrong(model):
        model.forward = lambda inputs: torch.full((16, 3), float("nan"), requires_grad=True)

    monkeypatch.setitem(WAYS, "wrong", wrong)
    assert "wrong" not in strongest_(network(), loss, tmp_path / "twin.json")["ways_seconds"]


def test_equal_networks_do_not_differ_and_the_points_are_those_of_the_accuracies(tmp_path):
    a, b = (np.random.default_rng(seed).random(400) < share for seed, share in ((0, 0.9), (1, 0.6)))
    for name, hits in (("a", a), ("b", b)):
        np.save(tmp_path / f"{name}.npy", hits.astype(np.float32))
    found = difference(tmp_path / "a.npy", tmp_path / "b.npy")
    assert math.isclose(found["points"], 100 * (a.mean() - b.mean()), abs_tol=1e-4)
    assert found["margin_points"] < found["points"]
    same = difference(tmp_path / "a.npy", tmp_path / "a.npy")
    assert same["points"] == 0.0 < same["margin_points"]
    assert difference(tmp_path / "a.npy", tmp_path / "missing.npy") is None


def test_the_interval_of_equal_accuracies_holds_its_promise():
    draws = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        pairs = draws.choice([-1.0, 0.0, 1.0], p=[0.05, 0.9, 0.05], size=200)
        found = interval(pairs)
        held += abs(found["points"]) <= found["margin_points"]
    assert held >= 930


def test_the_mean_over_samples_is_the_accuracy():
    from noctule import evaluate

    test = standardize(load("digits")).test
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    hits = accuracies(model, test)
    assert hits.shape == (len(test),)
    assert math.isclose(float(hits.mean()), evaluate(model, test)[1], abs_tol=1e-6)


def test_one_process_is_measured_on_a_copy():
    train = standardize(load("digits")).train
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    before, draws, threads = copy.deepcopy(model.state_dict()), torch.get_rng_state(), torch.get_num_threads()
    assert (
        single_process_seconds(model, optimizer, Batches(train, 128, seed=0), nn.functional.cross_entropy, workers=2)
        > 0
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), draws)
    assert torch.get_num_threads() == threads
    assert slowdown(2, 1.0, 1.5, threads=2) is None
    assert "one process with 2 threads takes about 1.50 s" in slowdown(2, 3.0, 1.5, threads=2)
