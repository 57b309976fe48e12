"""`export` and what it is made of, with a runtime of the tests' own: weights in a numpy file."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from noctule import ToSparse, convert_
from noctule.compress.quantize import FakeQuantize, Int8Layer, StaticInt8, calibrate
from noctule.core.errors import ExportError, UsageError
from noctule.deploy import TARGETS, card_of, export
from noctule.deploy.agreement import agreement, plain, resized
from noctule.deploy.prepare import arguments, dense, in_precision
from noctule.deploy.target import Job, Target, Written, feed, needed
from noctule.deploy.targets import named, of_file
from noctule.models import mlp, resnet


def write(job: Job) -> Written:
    layers = [m for m in dense(job.model).modules() if isinstance(m, nn.Linear)]
    arrays = {
        f"{kind}{n}": getattr(m, kind).detach().numpy() for n, m in enumerate(layers) for kind in ("weight", "bias")
    }
    with job.path.open("wb") as file:
        save: Any = np.savez
        save(file, **arrays)

    def inside(x):
        found = {}
        for n in range(len(layers)):
            x = x[0] if isinstance(x, tuple) else x
            x = x @ arrays[f"weight{n}"].T + arrays[f"bias{n}"]
            found[str(2 * n)] = x
            x = np.maximum(x, 0.0)
        return found

    return Written(inside=inside)


def opened(path: Path, threads: int):
    with path.open("rb") as file:
        stored = dict(np.load(file))

    def run(x):
        x = x[0] if isinstance(x, tuple) else x
        for n in range(len(stored) // 2):
            x = np.maximum(x, 0.0) if n else x
            x = x @ stored[f"weight{n}"].T + stored[f"bias{n}"]
        return x

    return run


FAKE = Target(
    name="fake",
    suffix=".fake",
    precisions=("float32",),
    module="numpy",
    needs="pip install fake",
    write=write,
    open=opened,
)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(TARGETS, "fake", FAKE)
    return lambda **changes: monkeypatch.setitem(TARGETS, "fake", replace(FAKE, **changes))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_file_that_agrees_is_kept_and_the_model_stays_as_it_is(fake, tmp_path, sparse):
    model = mlp(20, 30, 5)
    model = convert_(model, ToSparse(density=0.3)).model if sparse else model
    before = {name: x.clone() for name, x in model.state_dict().items()}
    exported = export(model, torch.rand(4, 20), tmp_path / "m.fake", to="fake")
    assert exported.agreement.holds
    assert exported.agreement.relative < 1e-5
    assert exported.agreement.batches == (4, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["m.fake"]
    assert model.training
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])


def test_a_file_that_differs_is_removed_and_the_first_layer_is_named_with_both_values(fake, tmp_path):
    def worse(job: Job) -> Written:
        with torch.no_grad():
            job.model[2].bias[1] += 1.0
        return write(job)

    (tmp_path / "m.fake").write_text("before")
    fake(write=worse)
    model = mlp(20, 30, 30, 5)
    with pytest.raises(
        ExportError, match=r"first layer that differs is 2 \(Linear\), which gives \S+ in the model and \S+ in"
    ):
        export(model, torch.rand(4, 20), tmp_path / "m.fake", to="fake")
    assert (tmp_path / "m.fake").read_text() == "before"
    assert len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_leaves_the_old_file(fake, tmp_path, code):
    def full(job: Job) -> Written:
        job.path.write_bytes(b"torn")
        raise OSError(code, os.strerror(code))

    (tmp_path / "m.fake").write_text("before")
    fake(write=full)
    with pytest.raises(ExportError, match="before is as it was") as caught:
        export(mlp(20, 5), torch.rand(4, 20), tmp_path / "m.fake", to="fake")
    assert ("free some space" in str(caught.value)) == (code == errno.ENOSPC)
    assert (tmp_path / "m.fake").read_text() == "before"
    assert len([*tmp_path.iterdir()]) == 1


def test_what_belongs_to_a_file_comes_with_it(fake, tmp_path):
    def two(job: Job) -> Written:
        job.path.with_suffix(".more").write_text("more")
        return write(job)

    fake(write=two)
    export(mlp(20, 5), torch.rand(1, 20), tmp_path / "m.fake", to="fake")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.fake", "m.more"]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"to": "tensorrt"}, "no target 'tensorrt'. Targets: onnxruntime"),
        ({"to": "fake", "precision": "bfloat16"}, "fake has no precision 'bfloat16', it has float32"),
        ({"to": "fake", "path": "m.onnx"}, r"ends in .fake, got m.onnx"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(fake, tmp_path, words, match):
    path = tmp_path / words.pop("path", "m.fake")
    with pytest.raises(UsageError, match=match):
        export(mlp(20, 5), torch.rand(1, 20), path, **words)
    assert not path.exists()


def test_a_library_that_is_not_there_is_named_with_the_command_that_installs_it(fake, tmp_path):
    with pytest.raises(ExportError, match="no_such_runtime is not installed: pip install it"):
        needed("no_such_runtime.inside", "pip install it")
    fake(module="no_such_runtime")
    with pytest.raises(ExportError, match="pip install fake"):
        export(mlp(20, 5), torch.rand(1, 20), tmp_path / "m.fake", to="fake")


def test_targets_are_told_apart_by_suffix():
    assert [of_file(Path(f"a.b{target.suffix}")) for target in TARGETS.values()] == [*TARGETS.values()]
    assert named("openvino").precisions == ("float32", "bfloat16", "int8")
    with pytest.raises(UsageError, match=r"a\.pt: no runtime .* \.onnx \(onnxruntime\)"):
        of_file(Path("a.pt"))


def test_int8_needs_ranges_and_a_model_in_int8_stays_one():
    model, x = mlp(20, 30, 5).eval(), torch.rand(4, 20)
    with pytest.raises(ExportError, match="dynamic int8"):
        in_precision(model, x, "int8", None, None)
    ranges = calibrate(model, [x])
    prepared, inputs, outputs = in_precision(model, x, "int8", ranges, None)
    again, *_ = in_precision(model, x, "int8", None, [x])
    assert [type(m) for m in prepared] == [Int8Layer, nn.ReLU, Int8Layer]
    assert torch.equal(prepared(x), again(x))
    assert inputs == ranges
    y = prepared[0](x)
    assert outputs["0"] == [min(0.0, float(y.min())), max(0.0, float(y.max()))]
    convert_(model, StaticInt8(ranges=ranges, narrowest=1))
    with pytest.raises(ExportError, match="has layers in int8"):
        in_precision(model, x, "float32", None, None)
    kept, *_ = in_precision(model, x, "int8", None, None)
    assert torch.equal(kept(x), model(x))


def test_named_batches_give_the_ranges_that_tensors_do():
    model, x = mlp(20, 30, 5).eval(), torch.randn(4, 20)
    a = in_precision(model, x, "int8", None, [x])
    b = in_precision(model, x, "int8", None, [{"input": x}])
    for name, ends in a[1].items():
        assert b[1][name] == pytest.approx(ends)


def test_batch_norms_are_folded_and_activation_bits_kept():
    model = resnet((1, 12, 12), 10, depth=8)
    prepared, *_ = in_precision(model, torch.rand(2, 144), "float32", None, None)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in prepared.modules())
    prepared, *_ = in_precision(model, torch.rand(2, 144), "int8", None, [torch.rand(2, 144)], 7)
    assert {m.grid.highest for m in prepared.modules() if isinstance(m, Int8Layer)} == {127}


def test_a_model_that_still_learns_its_bits_is_refused():
    model = convert_(mlp(20, 30, 20), FakeQuantize()).model
    with pytest.raises(ExportError, match=r"StaticInt8\(\)"):
        in_precision(model, torch.rand(2, 20), "int8", None, None)


@pytest.mark.parametrize("example", [3, (), {}, torch.tensor(1.0), torch.empty(0, 3)])
def test_an_example_without_a_batch_is_refused(example):
    with pytest.raises(ValueError, match="example= is a batch of inputs"):
        arguments(example)


def test_a_batch_of_another_size_repeats_the_samples():
    x, mask = torch.arange(6).view(3, 2), torch.tensor(7)
    (more,), named_too = resized((x,), {"mask": mask}, 5)
    assert more[:, 0].tolist() == [0, 2, 4, 0, 2]
    assert named_too["mask"] is mask
    assert plain({"a": (x, 3)})["a"][1] == 3
    assert feed(x, ["a"]) == {"a": x}
    with pytest.raises(ValueError, match="takes a, b: there is no b"):
        feed((x,), ["a", "b"])


def test_the_bound_is_relative_to_the_largest_output_or_to_the_spread():
    model, x = nn.Identity(), torch.tensor([[-2.0, 0.0], [1.0, 1.0]])
    exact = agreement(model, (x,), {}, lambda given: given[0], "int8", (2,))
    assert (exact.relative, exact.of_spread, exact.holds) == (0.0, 0.0, True)
    off = agreement(model, (x,), {}, lambda given: given[0] + 0.1, "float32", (2,))
    assert off.relative == pytest.approx(0.05)
    assert off.of_spread == pytest.approx(0.1 / float(x.std(correction=0)))
    assert not off.holds
    assert agreement(model, (x,), {}, lambda given: given[0] + 0.1, "int8", (2,)).holds
    assert not agreement(model, (x,), {}, lambda given: given[0] * float("nan"), "int8", (2,)).holds
    with pytest.raises(ExportError, match=r"shape \(2, 1\) where the model gives \(2, 2\)"):
        agreement(model, (x,), {}, lambda given: given[0][:, :1], "int8", (2,))
    with pytest.raises(ExportError, match="NaN or infinite"):
        agreement(model, (x * float("inf"),), {}, lambda given: given[0], "int8", (2,))


@pytest.mark.parametrize(
    ("inputs", "targets", "match"),
    [
        (np.zeros((0, 3)), None, "samples"),
        ((np.zeros((2, 3)), np.zeros((3, 3))), None, "samples"),
        (np.zeros((2, 3)), [1], "1 targets for 2 samples"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tmp_path, inputs, targets, match):
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=match):
        card_of(tmp_path / "m.onnx", inputs, targets)
    with pytest.raises(ExportError, match="there is no file"):
        card_of(tmp_path / "other.onnx", np.zeros((2, 3)))


def test_the_process_that_measures_needs_no_torch():
    code = "import sys, noctule.deploy.measured, noctule.deploy.targets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
