"""What `noctule.runtime` computes from a file is what the model computes; what it cannot is refused by name."""

import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from noctule import StaticInt8, ToSparse, WeightOnly, convert_, runtime
from noctule.compress.factor import Share
from noctule.compress.quantize import calibrate, fold_batch_norms
from noctule.compress.shrink import shrink
from noctule.core.errors import CheckpointError, ExportError
from noctule.deploy.graph import graph_of
from noctule.deploy.noctule_file import write_model
from noctule.models import cnn, mlp, resnet
from noctule.models.mobilenet import mobilenet
from noctule.models.vit import ViT

SHAPE = (1, 12, 12)


def encoder() -> nn.Module:
    block = nn.TransformerEncoderLayer(16, 4, 24, activation="gelu", batch_first=True, dropout=0.0)
    layers = nn.TransformerEncoder(block, 1, enable_nested_tensor=False)
    return nn.Sequential(nn.Unflatten(1, (12, 12)), nn.Linear(12, 16), layers, nn.Flatten(), nn.Linear(192, 5))


MODELS = {
    "mlp": lambda: mlp(144, 60, 40, 5),
    "cnn": lambda: cnn(SHAPE, 5, channels=(8, 12)),
    "resnet": lambda: resnet(SHAPE, 5, depth=8, width=8),
    "vit": lambda: ViT(SHAPE, 5, patch=4, width=16, depth=1, heads=2),
    "mobilenet": lambda: mobilenet(SHAPE, 5, stages=((1, 8, 1, 1), (2, 8, 2, 2)), stem=8, last=16),
    "encoder": encoder,
}


def samples(count: int = 37) -> torch.Tensor:
    return torch.rand(count, 144, generator=torch.Generator().manual_seed(0))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    model.train()
    for _ in range(2):  # statistics of batch norms that are not those they begin with
        model(samples())
    return model.eval()


def check(model: nn.Module, path, *, atol: float = 1e-5) -> runtime.Model:
    x = samples()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    write_model(model, x[:3], path)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    shipped = runtime.load(path)
    with torch.no_grad():
        expected = model(x).numpy()
    for batch in (1, 3, 8, 37):
        found = shipped(x[:batch].numpy())
        np.testing.assert_allclose(found, expected[:batch], atol=atol * abs(expected).max())
    return shipped


@pytest.mark.parametrize("name", MODELS)
def test_dense(name, tmp_path):
    check(made(name), tmp_path / "model.noctule")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_sparse(name, density, tmp_path):
    model = convert_(made(name), ToSparse(density=density)).model
    shipped = check(model, tmp_path / "model.noctule")
    assert any(
        step.operator.weight.places is not None for step in shipped.graph.steps if hasattr(step.operator, "weight")
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("density", [None, 0.2])
def test_integers_are_within_one_code_of_the_model(name, density, tmp_path):
    model = made(name) if density is None else convert_(made(name), ToSparse(density=density)).model
    fold_batch_norms(model)
    model = convert_(model, StaticInt8(ranges=calibrate(model, [samples()]), narrowest=1)).model
    shipped = check(model, tmp_path / "model.noctule", atol=0.02)
    assert {"Quantize", "Linear"} <= {type(s.operator).__name__ for s in shipped.graph.steps}
    np.testing.assert_allclose(shipped(samples().numpy()), shipped.graph.reference(samples().numpy())[-1], atol=2e-3)


@pytest.mark.parametrize("shape", [(12, 12), (1, 12, 12), (12,)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_attention_with_a_mask_that_the_input_does_not_change(shape, dtype, tmp_path):
    mask = torch.rand(shape) < 0.5
    mask[..., 0] = True
    added = torch.randn(shape).masked_fill(~mask, -torch.inf)
    attention = Masked(mask if dtype is torch.bool else added)
    check(nn.Sequential(nn.Unflatten(1, (12, 12)), attention, nn.Flatten()), tmp_path / "model.noctule")


@pytest.mark.parametrize("bits", [8, 4, 1])
@pytest.mark.parametrize("density", [None, 0.2])
def test_weights_of_few_bits(bits, density, tmp_path):
    model = made("mlp") if density is None else convert_(made("mlp"), ToSparse(density=density)).model
    check(convert_(model, WeightOnly(bits=bits)).model, tmp_path / "model.noctule")


def test_shrunk(tmp_path):
    model = made("resnet")
    shrink(model, 0.5, example=samples(2))
    check(model, tmp_path / "model.noctule")


def test_shared_weights_are_a_book_and_its_indices(tmp_path):
    dense, shared = tmp_path / "dense.noctule", tmp_path / "shared.noctule"
    check(made("mlp"), dense)
    shipped = check(convert_(made("mlp"), Share(codes=16)).model, shared)
    assert all(len(step.operator.weight.book) <= 17 for step in shipped.graph.steps)
    assert shared.stat().st_size < dense.stat().st_size / 3


def test_zeros_of_dense_weights_are_left_out_in_blocks_of_four(tmp_path):
    model = mlp(144, 64, 5)
    with torch.no_grad():
        model[0].weight.view(64, 36, 4)[torch.rand(64, 36) < 0.8] = 0.0
    shipped = check(model, tmp_path / "model.noctule")
    assert [step.operator.weight.block for step in shipped.graph.steps] == [4, 1]
    assert (tmp_path / "model.noctule").stat().st_size < 12_000


def test_activations_go_into_the_layer_before_them():
    graph = graph_of(made("resnet"), samples(2))
    assert [type(step.operator).__name__ for step in graph.steps].count("Clamp") == 0


def test_a_fresh_process_gives_the_same_bits(tmp_path):
    model = convert_(made("cnn"), ToSparse(density=0.2)).model
    fold_batch_norms(model)
    model = convert_(model, StaticInt8(ranges=calibrate(model, [samples()]), narrowest=1)).model
    shipped = check(model, tmp_path / "model.noctule", atol=0.02)
    np.save(tmp_path / "x.npy", samples().numpy())
    command = [
        sys.executable,
        "-m",
        "noctule.runtime",
        *(str(tmp_path / n) for n in ("model.noctule", "x.npy", "y.npy")),
    ]
    subprocess.run(command, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), shipped(samples().numpy()))


class Sorted(nn.Module):
    def forward(self, x):
        return x.sort(-1).values


class Masked(nn.Module):
    """Attention with a mask that does not depend on the input, or with the input's own."""

    def __init__(self, mask=None):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        mask = self.mask if self.mask is not None else x @ x.mT
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


@pytest.mark.parametrize(
    ("model", "example", "text"),
    [
        (
            nn.Sequential(nn.Linear(4, 4), Sorted()),
            torch.rand(3, 4),
            "^1 cannot be shipped to noctule.runtime: .*aten.sort",
        ),
        (nn.Sequential(nn.Linear(4, 4), Masked()), torch.rand(2, 3, 4), "^1 cannot be shipped .*depends on the input"),
        (Masked(torch.eye(3, dtype=torch.bool) & (torch.arange(3) < 2)), torch.rand(2, 3, 4), "hides all keys"),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 4))), torch.rand(2, 4), "merges the batch"),
        (nn.LSTM(4, 4, batch_first=True), torch.rand(2, 3, 4), "cannot"),
        (nn.Softmax(0), torch.rand(2, 4), "which is the batch"),
        (nn.MaxPool2d(2, ceil_mode=True), torch.rand(2, 1, 5, 5), "ceil_mode"),
        (nn.Linear(4, 4), "x", "give a tensor"),
        (nn.Linear(4, 4), torch.rand(3, 5), "torch.export cannot follow"),
        (nn.Identity(), torch.rand(3, 5), "returns its input"),
    ],
)
def test_what_the_runtime_cannot_do_is_refused_by_name(model, example, text, tmp_path):
    with pytest.raises(ExportError, match=text):
        write_model(model, example, tmp_path / "model.noctule")
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    model, path = made("mlp"), tmp_path / "model.noctule"
    write_model(model, samples(2), path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="what was saved before is as it was"):
            write_model(model, samples(2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.slow
def test_two_processes_write_one_file(tmp_path):
    path = tmp_path / "model.noctule"
    code = (
        "import sys, torch; from pathlib import Path; from noctule.models import mlp;"
        "from noctule.deploy.noctule_file import write_model; model = mlp(64, 50, 5)\n"
        "for _ in range(5): write_model(model, torch.rand(2, 64), Path(sys.argv[1]))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert runtime.load(path).input_shape == (64,)
    assert [*tmp_path.iterdir()] == [path]
