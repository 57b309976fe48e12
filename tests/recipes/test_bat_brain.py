"""The largest network in small: what it is made of, that it learns, that a stop at any moment changes nothing."""

import json
import os
import platform
import random
import re
import resource
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noctule.core.errors import UsageError
from noctule.data.prototypes import Prototypes
from noctule.measure.activations import kept_for_backward
from noctule.measure.allocator import keep_memory
from noctule.measure.memory import resident_bytes
from noctule.recipes import bat_brain
from noctule.recipes.bat_brain_network import Brain, connected, momentum_sgd, sparse_linears
from noctule.report import RunFolder
from noctule_bench import bat_brain as program
from noctule_bench.program import run as bench

SMALL = {"neurons": 2000, "layers": 4, "features": 300, "steps": 7, "every": 3, "samples": 50}


def train(folder: Path, **options) -> dict:
    with RunFolder.create(folder, recipe="bat_brain", options=options, seed=0) as run:
        return bat_brain(run, **options)["series"]["sparse"]


# -- the data -------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**40), part=st.sampled_from(["train", "test"]), number=st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_a_batch_is_a_function_of_seed_part_and_number(seed, part, number):
    data = Prototypes(features=40, classes=3, seed=seed)
    x, y = data.batch(part, number, 5)
    again, targets = Prototypes(features=40, classes=3, seed=seed).batch(part, number, 5)
    assert torch.equal(x, again)
    assert torch.equal(y, targets)
    for other in (
        data.batch(part, number + 1, 5),
        data.batch("validation", number, 5),
        Prototypes(features=40, classes=3, seed=seed + 1).batch(part, number, 5),
    ):
        assert not torch.equal(x, other[0])


def test_samples_are_their_prototypes_and_noise():
    data = Prototypes(features=2000, classes=4, noise=3.0, seed=1)
    x, y = data.batch("train", 0, 400)
    assert x.var().item() == pytest.approx(1.0, abs=0.02)
    means = torch.stack([x[y == c].mean(0) for c in range(4)]) * 10**0.5
    assert set(means.sign().flatten().tolist()) == {-1.0, 1.0}
    assert means.abs().mean().item() == pytest.approx(1.0, abs=0.05)
    fresh, targets = data.batch("test", 0, 100)
    assert bool(((fresh @ means.T).argmax(1) == targets).all())
    assert targets.bincount(minlength=4).min() > 10


@pytest.mark.parametrize("wrong", [{"features": 0}, {"classes": 1}, {"noise": -1.0}, {"noise": float("nan")}])
def test_data_without_a_task_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))[:5]):
        Prototypes(**wrong)


# -- the network ----------------------------------------------------------------------------------------------------


@given(
    neurons=st.integers(8, 3000),
    layers=st.integers(1, 6),
    features=st.integers(1, 400),
    epsilon=st.floats(0.1, 5.0),
)
@settings(max_examples=25, deadline=None)
def test_it_has_the_neurons_and_weights_that_it_says(neurons, layers, features, epsilon):
    brain = Brain(neurons=neurons, layers=layers, features=features, epsilon=epsilon)
    model = brain.model(seed=3)
    found = sparse_linears(model)
    assert sum(layer.out_features for layer in list(found.values())[:-1]) == neurons
    assert sum(layer.weights for layer in found.values()) == brain.weights
    for layer, (inputs, outputs) in zip(found.values(), pairwise(brain.widths), strict=True):
        assert layer.weights == min(max(1, round(epsilon * (inputs + outputs))), inputs * outputs)
    dead = sum(
        int(((into.to_dense().weight != 0).sum(1) == 0).logical_or((out.to_dense().weight != 0).sum(0) == 0).sum())
        for into, out in pairwise(found.values())
    )
    assert connected(model) == neurons - dead


def test_the_signal_keeps_its_size_through_ten_layers_both_ways():
    brain = Brain(neurons=200_000, layers=10, features=5000)
    model = brain.model(seed=0)
    assert isinstance(model, nn.Sequential)
    x, sizes = torch.randn(16, 5000), []
    for layer in model:
        x = layer(x)
        sizes.append(x.square().mean().item())
    outputs = sizes[:-1:2]  # after the activations, which are folded into the layers
    assert outputs[0] == pytest.approx(1.0, rel=0.1)
    assert outputs[-1] == pytest.approx(outputs[0], rel=0.5)
    nn.functional.cross_entropy(x, torch.arange(16) % 10).backward()
    steps = [layer.values.grad.norm().item() for layer in list(sparse_linears(model).values())[1:-1]]
    assert max(steps) < 1.3 * min(steps)


def test_learning_rates_are_over_the_fan_in():
    brain = Brain(neurons=20_000, layers=2, features=100)
    groups = momentum_sgd(brain.model(seed=0), 0.1).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.1 / 1.01, 0.1 / 2, 0.1 / 1001])


def test_index_arrays_are_as_narrow_as_they_can_be():
    layers = list(sparse_linears(Brain(neurons=140_000, layers=2, features=65_536).model(seed=0)).values())
    assert [layer.topology.columns.dtype for layer in layers] == [torch.uint16, torch.int32, torch.int32]
    assert {layer.topology.row_ptr.dtype for layer in layers} == {torch.int32}


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"neurons": 3, "layers": 4}, {"epsilon": 0.0}])
def test_sizes_without_a_network_are_refused(wrong):
    with pytest.raises(ValueError, match=r"neuron|epsilon"):
        Brain(**wrong)


def test_activations_are_counted_once_each_and_without_weights():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    with kept_for_backward(model) as kept:
        model(torch.randn(3, 10))
    assert kept.nbytes == 4 * 3 * (10 + 20)


def page_faults(rounds: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(1 << 24)  # 64 MiB, in 16,384 small pages or 32 huge ones
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc is meant")
def test_memory_is_kept_within_the_block_and_given_back_after_it():
    with keep_memory():
        page_faults(10)
        kept = page_faults(20)
        held = resident_bytes() or 0
    assert (resident_bytes() or 0) < held - (50 << 20)
    assert kept < page_faults(20) / 4
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ


# -- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewire", ["set", "gse", "none"])
def test_it_learns_and_leaves_everything_a_run_promises(tmp_path, capsys, rewire):
    options = {"neurons": 50_000, "layers": 5, "features": 4096, "steps": 45, "every": 15, "samples": 100, "noise": 1.0}
    found = train(tmp_path / "run", rewire=rewire, **options)
    run = RunFolder(tmp_path / "run")
    names = {path.name for path in run.path.iterdir()}
    assert names >= {"metrics.jsonl", "checkpoints", "model.safetensors", "model.json", "summary.json", "report.html"}
    records = run.metrics()
    assert [(r["epoch"], r["step"]) for r in records] == [(1, 15), (2, 30), (3, 45)]
    assert records[-1]["train_loss"] < 0.5 * records[0]["train_loss"]
    assert found["test_accuracy"] > 0.9
    moved = [sum(layer["moved"] for layer in r["layers"].values()) for r in records]
    weights = [layer["weights"] for layer in records[0]["layers"].values()]
    each = sum(int(0.3 * n) for n in weights)
    assert moved == ([0, 0, 0] if rewire == "none" else [each, each, 0])
    assert (found["seconds_per_moving_step"] is None) == (rewire == "none")
    text = capsys.readouterr().out
    assert "50,000" in text
    for fact in ("values and biases", "indices", "gradients", "optimizer state", "activations", "peak", "a step"):
        assert re.search(rf"^{fact}.* (\d|\.)+\S? (B|kB|MB|GB|ms|s)$", text.replace("\xa0", " "), re.MULTILINE), fact


def test_bytes_are_those_of_the_formula(tmp_path):
    found = train(tmp_path / "run", **SMALL)
    weights, neurons, batch = found["weights"], 2000, 8
    assert weights == 300 + 500 + 3 * 1000 + 510
    parameters = weights + neurons + 10
    assert found["parameters"] == parameters
    assert found["weights_bytes"] == found["gradient_bytes"] == found["optimizer_bytes"] == 4 * parameters
    # columns and rows of the transpose in two bytes each, its slots in four; pointers for both sides of each layer
    assert found["index_bytes"] == 8 * weights + 4 * (300 + 2 * neurons + 10 + 2 * 5)
    activations = 4 * batch * (300 + neurons) + neurons  # two bytes would be a bit each: a batch of eight is one
    assert activations <= found["activation_bytes"] <= activations + 2 * 4 * 8 * 10  # and the loss
    assert found["multiply_adds_per_sample"] == 3 * weights - 800


def test_nothing_dense_is_ever_made(tmp_path):
    before = resident_bytes() or 0
    found = train(tmp_path / "run", neurons=120_000, layers=2, features=65_536, steps=3, every=1, samples=20)
    assert found["peak_memory_bytes"] < before + 0.4e9  # 60,000 x 60,000 bits would be 0.45 GB, floats 14.4


@pytest.mark.parametrize("rewire", ["set", "gse"])
def test_resumed_from_any_checkpoint_it_ends_in_the_same_weights(tmp_path, rewire):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    losses = {}
    for folder in (whole, torn):
        train(folder, rewire=rewire, checkpoint_seconds=0.0, **SMALL)
    checkpoints = torn / "checkpoints" / "sparse"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["step-000000000006.safetensors", "step-000000000007.safetensors"]
    (checkpoints / names[1]).unlink()
    for left in ("summary.json", "model.safetensors", "model.json"):
        (torn / left).unlink()
    with RunFolder(torn) as run:
        bat_brain(run, rewire=rewire, checkpoint_seconds=0.0, **SMALL)
    assert (torn / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for folder in (whole, torn):
        losses[folder] = [(r["epoch"], r["step"], r["train_loss"], r["validation_loss"]) for r in metrics(folder)]
    assert losses[torn] == losses[whole]
    assert [step for _, step, *_ in losses[torn]] == [3, 6, 7]


def test_a_prolonged_run_ends_in_the_same_weights(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    train(whole, **SMALL)
    train(torn, **SMALL | {"steps": 4})  # connections move once before and once after
    (torn / "summary.json").unlink()
    with RunFolder(torn) as run:
        bat_brain(run, **SMALL)
    assert (torn / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_finished_run_is_not_run_again(tmp_path):
    first = train(tmp_path / "run", **SMALL)
    with RunFolder(tmp_path / "run") as run:
        assert bat_brain(run, **SMALL)["series"]["sparse"]["seconds"] == first["seconds"]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("rewire", ["set", "gse"])
def test_killed_in_the_middle_it_ends_in_the_same_weights(noctule_command, tmp_path, rewire):
    options = ["--neurons", 100_000, "--layers", 5, "--steps", 120, "--every", 10, "--samples", 20, "--threads", 1]
    words = ["run", "bat_brain", *options, "--rewire", rewire, "--checkpoint-seconds", 0.2]
    whole = noctule_command(*words, "--out", "whole")
    _, err = whole.communicate(timeout=600)
    assert whole.returncode == 0, err
    torn, moments = tmp_path / "torn", random.Random(0)
    command = [*words, "--out", "torn"]
    for _ in range(4):
        process = noctule_command(
            *command, killed=(moments.randint(2, 4), moments.choice(["before", "written", "after"]))
        )
        _, err = process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL, err
        command = ["run", "--resume", "torn"]
    last = noctule_command(*command)
    _, err = last.communicate(timeout=600)
    assert last.returncode == 0, err
    assert (torn / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    found = [
        [(r["step"], r["train_loss"], r["validation_loss"]) for r in metrics(f)] for f in (torn, tmp_path / "whole")
    ]
    assert found[0] == found[1]


def test_options_that_make_no_run_are_refused(tmp_path):
    for wrong in ({"batch": 0}, {"every": 0}, {"samples": 0}, {"steps": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            train(tmp_path / str(wrong), **{**SMALL, **wrong})


# -- the benchmark --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_sweep_says_what_each_size_costs(capsys, tmp_path):
    out = tmp_path / "results.jsonl"
    wide = program.last_cache_bytes() // (4 * 2048) + 1
    words = f"--millions {wide / 1e6} 0.001 --layers 1 --features 64 --batch 2048 --threads 1 --rounds 2 --out {out}"
    assert bench("bat_brain", words.split()) == 0
    captured = capsys.readouterr()
    *lines, linear = [json.loads(line) for line in out.read_text().splitlines()]
    assert [json.loads(line) for line in captured.out.splitlines()] == [*lines, linear]
    assert [(line["neurons"], line["threads"], line["outside_cache"]) for line in lines] == [
        (1000, 1, False),
        (wide, 1, True),
    ]
    for line in lines:
        assert line["machine"]["threads"] == line["threads"]
        assert line["weights"] == Brain(neurons=line["neurons"], layers=1, features=64).weights
        assert line["timing"]["rounds"] == 2
        assert line["total_bytes"] > 4 * line["weights"]
        assert line["activation_bytes"] > 4 * 2048 * line["neurons"]
        assert line["peak_memory_bytes"] > line["activation_bytes"]
    assert linear["name"] == "bat_brain.linear"
    assert linear["outside_cache"] == [lines[1]["weights"]]
    seconds = lines[1]["timing"]["median_seconds"]
    assert linear["seconds_per_weight"] == pytest.approx(seconds / lines[1]["weights"])
    assert linear["holds"]
    assert "a training step, and gigabytes" in captured.err
    assert "in proportion to the weights" in captured.err


def test_deviations_are_from_the_line_through_the_sizes_outside_the_cache():
    slope, off = program.deviations({1: 0.05, 10: 1.0, 20: 2.2, 40: 3.6}, [10, 20, 40])
    assert slope == pytest.approx(0.1, rel=0.01)
    assert off[1] == pytest.approx(-0.5, abs=0.01)
    assert off[20] == pytest.approx(0.1, abs=0.01)
    assert program.deviations({10: 1.0, 30: 3.0}, [10, 30])[1] == pytest.approx({10: 0.0, 30: 0.0})


def test_a_wrong_sweep_is_refused():
    for words in (["--millions", "0.000001"], ["--rounds", "0"], ["--threads"], ["--millions"]):
        with pytest.raises(UsageError):
            bench("bat_brain", words)
