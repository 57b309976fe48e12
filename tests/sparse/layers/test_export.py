"""Programs made of sparse layers: they hold their places, and open where Noctule was only imported, or is not there at all."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from noctule.core.convert import convert_
from noctule.core.remap import exchange
from noctule.sparse.layers import (
    AllReLU,
    FuseEpilogue,
    KeepLayout,
    SparseAttention,
    SparseConv2d,
    SparseLinear,
    ToDense,
)


def linear() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(
        SparseLinear(10, 20, density=0.3),
        nn.ReLU(),
        nn.Dropout(0.2),
        SparseLinear(20, 20, density=0.5, bias=False),
        AllReLU(0.3, layer=1),
        SparseLinear(20, 4, density=0.5),
    )
    return convert_(model, FuseEpilogue()).model.eval(), torch.randn(2, 3, 10)


def images() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(
        SparseConv2d(3, 4, 3, padding="same", density=0.5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        SparseConv2d(4, 4, 3, stride=2, padding=1, groups=2, density=0.5),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        SparseLinear(16, 3, density=0.5),
    )
    model = convert_(convert_(model, FuseEpilogue()).model, KeepLayout()).model
    return model.eval(), torch.randn(2, 3, 8, 8)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = (SparseLinear(8, 8, density=0.4) for _ in range(4))
        self.attention = SparseAttention(*layers, num_heads=2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


KINDS = {"linear": linear, "images": images, "attention": lambda: (Attending().eval(), torch.randn(2, 3, 8))}


@pytest.fixture(params=KINDS)
def case(request):
    return KINDS[request.param]()


def check(program, model: nn.Module, x: torch.Tensor) -> None:
    """The program has the model's function, for this batch and for a larger one."""
    for inputs in (x, torch.cat([x, x, x])):
        torch.testing.assert_close(program(inputs), model(inputs), atol=1e-5, rtol=1e-4)


def exported(model: nn.Module, x: torch.Tensor, **options):
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=4096)},), **options)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program(case, strict):
    model, x = case
    program = exported(model, x, strict=strict)
    check(program.module(), model, x)
    check(program.run_decompositions().module(), model, x)


def test_an_exported_program_can_be_trained(case):
    model, x = case
    opened = exported(model, x).module()
    for m in (opened, model):
        for _ in range(2):
            m(x).square().sum().backward()
    for p, q in zip(opened.parameters(), copy.deepcopy(model).parameters(), strict=True):
        assert p.shape == q.shape
    wanted = {n: p.grad for n, p in model.named_parameters()}
    for n, p in opened.named_parameters():
        torch.testing.assert_close(p.grad, wanted[n], atol=1e-5, rtol=1e-4)


def test_an_exported_program_keeps_the_places_that_it_was_made_with():
    model, x = linear()
    program = exported(model, x)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    before = model(x)
    for layer in (model[0], model[3]):
        layer.remap_(*exchange(layer.topology, torch.arange(9), layer.topology.missing(9)), new=0.5)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x), before)


@pytest.mark.parametrize(
    "imports", ["import noctule, torch", pytest.param("import torch, noctule", marks=pytest.mark.slow)]
)
def test_it_opens_in_a_process_that_has_only_imported_noctule(tmp_path, imports):
    for name, make in KINDS.items():
        model, x = make()
        torch.export.save(exported(model, x), tmp_path / f"{name}.pt2")
        torch.save((x, model(x).detach()), tmp_path / f"{name}.pt")
    code = f"""
{imports}
import sys
assert not any(name.startswith("noctule.sparse.layers") for name in sys.modules)
for name in {[*KINDS]}:
    x, y = torch.load(name + ".pt")
    program = torch.export.load(name + ".pt2").module()
    torch.testing.assert_close(program(x), y, atol=1e-5, rtol=1e-4)
    program(torch.cat([x, x])).sum().backward()
    assert all(p.grad is not None for p in program.parameters())
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)


def test_a_saved_trace_needs_no_noctule(tmp_path):
    for kind, make in KINDS.items():
        model, x = make()
        torch.jit.trace(model, x).save(tmp_path / f"{kind}-traced.pt")
        torch.jit.script(model).save(tmp_path / f"{kind}-scripted.pt")
        torch.save((x, model(x).detach()), tmp_path / f"{kind}.pt")
        for name in ("traced", "scripted"):
            check(torch.jit.load(tmp_path / f"{kind}-{name}.pt"), model, x)
    code = f"""
import sys, torch
for kind in {[*KINDS]}:
    x, y = torch.load(kind + ".pt")
    for name in ("-traced.pt", "-scripted.pt"):
        torch.testing.assert_close(torch.jit.load(kind + name)(x), y, atol=1e-5, rtol=1e-4)
assert "noctule" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("make", [linear, images])
def test_a_symbolic_trace(make):
    model, x = make()
    check(torch.fx.symbolic_trace(model), model, x)


def test_attention_in_a_symbolic_trace_names_the_way_out():
    model, x = Attending().eval(), torch.randn(2, 3, 8)
    with pytest.raises(RuntimeError, match=r"convert_\(model, ToDense\(\)\)"):
        torch.fx.symbolic_trace(model)
    check(torch.fx.symbolic_trace(convert_(copy.deepcopy(model), ToDense()).model), model, x)


def test_programs_that_train_with_dropout():
    model, x = linear()
    model.train()
    for program in (torch.jit.script(model), torch.fx.symbolic_trace(model), torch.export.export(model, (x,)).module()):
        torch.manual_seed(3)
        first, second = program(x), program(x)
        assert not torch.equal(first, second)
        torch.manual_seed(3)
        assert torch.equal(program(x), first)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(tmp_path, case, dynamo):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = case
    batch = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch", max=4096)},)}
        if dynamo
        else {"dynamic_axes": {"x": {0: "batch"}}, "input_names": ["x"]}
    )
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=dynamo, **batch)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    name = session.get_inputs()[0].name
    check(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), model, x)


# -- counting operations ----------------------------------------------------------------------------------------------


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_a_flop_counter_counts_what_is_multiplied():
    layers = SparseLinear(10, 20, density=0.3), SparseLinear(20, 4, density=0.5)
    model, x = nn.Sequential(layers[0], nn.ReLU(), layers[1]), torch.randn(7, 10)
    first, second = (2 * 7 * layer.weights for layer in layers)
    assert flops(lambda: model(x)) == first + second
    y = model(x).sum()
    assert flops(y.backward) == first + 2 * second  # no gradient of the input, as in a dense network
    layers[0].watch = lambda dz, x: None
    assert flops(lambda: model(x).sum().backward()) == 2 * first + 3 * second
    with FlopCounterMode(model, display=False) as counter:
        model(x)
    assert sum(counter.get_flop_counts()["Sequential.0"].values()) == first


def test_a_flop_counter_of_convolutions_and_compiled_layers():
    layer, x = SparseConv2d(3, 4, 3, density=0.5), torch.randn(2, 3, 8, 8, requires_grad=True)
    once = 2 * layer.weights * 2 * 6 * 6
    back = 2 * layer.weights * 2 * 8 * 8  # the gradient of the input is multiplied at each of its pixels
    assert flops(lambda: layer(x).sum().backward()) == 2 * once + back
    assert flops(lambda: layer(x.detach()).sum().backward()) == 2 * once
    torch.compiler.reset()
    model, x = linear()
    run = torch.compile(model, backend="aot_eager")
    assert flops(lambda: run(x).sum().backward()) == flops(lambda: model(x).sum().backward())
    torch.compiler.reset()


def test_a_sparse_layer_counts_as_its_dense_twin_at_full_density():
    layer, x = SparseLinear(6, 5, density=1.0), torch.randn(3, 6, requires_grad=True)
    twin = convert_(nn.Sequential(layer), ToDense()).model
    assert flops(lambda: layer(x).sum().backward()) == flops(lambda: twin(x).sum().backward())
