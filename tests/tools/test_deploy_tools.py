"""`export` to runtimes that are installed, and cards of their files."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from noctule import ToSparse, WeightOnly, convert_
from noctule.compress.quantize import Int8Layer, StaticInt8, calibrate, fold_batch_norms
from noctule.core.errors import ExportError
from noctule.deploy import card_of, export, precisions_of
from noctule.deploy.targets import named
from noctule.models import ViT, cnn, mlp, mobilenet, resnet

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SHAPE = (1, 12, 12)
MODELS = {
    "mlp": lambda: mlp(144, 40, 40, 10),
    "cnn": lambda: cnn(SHAPE, 10, channels=(16, 16), convolutions=1),
    "resnet": lambda: resnet(SHAPE, 10, depth=8),
    "mobilenet": lambda: mobilenet(SHAPE, 10),
    "vit": lambda: ViT(SHAPE, 10, width=16, depth=1),
}


def made(name: str, *, sparse: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return convert_(model, ToSparse(density=0.2)).model if sparse else model


def operators(path: Path, tmp_path: Path) -> Counter[str]:
    """Of the graph that ONNX Runtime makes of a file."""
    options = runtime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised"), 3
    runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimised").graph.node)


@pytest.mark.parametrize(
    ("name", "sparse"),
    [
        ("mlp", False),
        ("resnet", True),
        *(
            pytest.param(name, sparse, marks=pytest.mark.slow)
            for name in ("cnn", "mobilenet", "vit")
            for sparse in (False, True)
        ),
    ],
)
def test_float32_agrees_to_1e_5(name, sparse, tmp_path, capfd):
    exported = export(made(name, sparse=sparse), torch.rand(4, 144), tmp_path / "m.onnx")
    assert exported.agreement.relative < 1e-5
    assert exported.agreement.batches == (4, 3)
    assert not exported.fell_back
    assert capfd.readouterr().out == ""
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert not any(node.metadata_props or "site-packages" in node.doc_string for node in graph.node)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", {"QGemm": 3}),
        ("cnn", {"QLinearConv": 2, "QGemm": 1}),
        ("resnet", {"QLinearConv": 9, "QLinearAdd": 2, "QGemm": 1}),
        pytest.param("mobilenet", {"QLinearConv": 22, "QLinearAdd": 4, "QGemm": 1}, marks=pytest.mark.slow),
        pytest.param("vit", {"QLinearConv": 1, "MatMulIntegerToFloat": 6, "QGemm": 1}, marks=pytest.mark.slow),
    ],
)
def test_int8_runs_on_integer_kernels(name, expected, tmp_path):
    model, batch = made(name), torch.rand(32, 144)
    exported = export(model, batch[:4], tmp_path / "m.onnx", precision="int8", batches=[batch])
    assert exported.agreement.of_spread < 0.05
    assert not exported.fell_back
    found = operators(exported.path, tmp_path)
    assert {kind: found[kind] for kind in expected} == expected
    assert not {"Conv", "FusedConv", "Gemm", "ConvInteger", "MatMulInteger"} & found.keys()
    whole = onnx.load(exported.path).graph.initializer
    codes = {
        entry.name: entry for entry in whole if entry.data_type == onnx.TensorProto.INT8 and "zeros" not in entry.name
    }
    assert len(codes) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in model.modules())


def test_the_file_has_the_codes_scales_and_grids_of_the_quantised_model(tmp_path):
    model, batch = made("resnet").eval(), torch.rand(32, 144)
    fold_batch_norms(model)
    convert_(model, StaticInt8(ranges=calibrate(model, [batch])))
    export(model, batch[:4], tmp_path / "m.onnx", precision="int8", batches=[batch])
    stored = {
        entry.name: onnx.numpy_helper.to_array(entry) for entry in onnx.load(tmp_path / "m.onnx").graph.initializer
    }
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Int8Layer)}
    assert len(layers) == 8  # the first and the last are narrow: they stay in float32
    for name, layer in layers.items():
        assert np.array_equal(stored[f"{name}.weight"], layer.integers().numpy())
        assert np.array_equal(stored[f"{name}.weight.scales"], layer.scales.numpy())
    grids = {
        (float(stored[n]), int(stored[n.replace(".scale", ".zero")]))
        for n in stored
        if ".grid" in n and n.endswith("scale")
    }
    for layer in layers.values():
        assert (np.float32(layer.grid.scale), layer.grid.zero_point) in grids


def test_a_sparse_model_in_int8_and_weights_alone(tmp_path):
    batch = torch.rand(32, 144)
    exported = export(made("cnn", sparse=True), batch[:1], tmp_path / "a.onnx", precision="int8", batches=[batch])
    assert exported.agreement.batches == (1, 3)
    model = convert_(made("mlp"), WeightOnly(bits=4)).model
    alone = export(model, batch[:4], tmp_path / "b.onnx")
    assert alone.agreement.relative < 1e-5
    assert "0: weights of 4 bits are stored in 8" in alone.fell_back
    plain = export(made("mlp"), batch[:4], tmp_path / "c.onnx")
    assert alone.path.stat().st_size * 3 < plain.path.stat().st_size


def test_seven_bits_need_no_precise_mode_and_the_file_says_so(tmp_path):
    from noctule.deploy.targets.onnxruntime import _saturates

    batch = torch.rand(32, 144)
    for bits in (7, 8):
        path = tmp_path / f"{bits}.onnx"
        exported = export(made("resnet"), batch[:4], path, precision="int8", batches=[batch], activation_bits=bits)
        assert exported.agreement.of_spread < 0.05
        assert _saturates(str(path)) == (bits == 8)


class Fourier(nn.Module):
    def forward(self, x):
        return torch.linalg.matrix_exp(x.view(-1, 12, 12)).flatten(1)


class Hidden(nn.Module):
    """Computes something else while it is exported."""

    def forward(self, x):
        return x * (1.5 if torch.compiler.is_exporting() else 1.0)


class OfFour(nn.Module):
    def forward(self, x):
        return x.view(4, 2, 72).sum(1) + 1.0


def test_an_operator_that_onnx_lacks_is_named_with_its_module(tmp_path):
    model = nn.Sequential(nn.Linear(144, 144), Fourier())
    with pytest.raises(ExportError, match=r"matrix_exp.*1 \(Fourier\)"):
        export(model, torch.rand(4, 144), tmp_path / "m.onnx")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("to", ["onnxruntime", "openvino"])
def test_the_first_layer_that_differs_is_found_in_the_file(to, tmp_path):
    pytest.importorskip(to)
    model = nn.Sequential(nn.Linear(144, 20), nn.ReLU(), nn.Linear(20, 20), Hidden(), nn.Linear(20, 3))
    with pytest.raises(ExportError, match=r"first layer that differs is 3 \(Hidden\), which gives"):
        export(model, torch.rand(4, 144), tmp_path / f"m{named(to).suffix}", to=to)
    assert not [*tmp_path.iterdir()]


def test_a_batch_that_cannot_vary_is_said_to(tmp_path):
    exported = export(nn.Sequential(OfFour(), nn.Linear(72, 3)), torch.rand(4, 144), tmp_path / "m.onnx")
    assert exported.fell_back == ["the file takes batches of 4 and no others"]
    assert exported.agreement.batches == (4,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_models_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    if name == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes))
        ids = torch.randint(1, 50, (2, 9))
        example = {"attention_mask": torch.ones_like(ids), "input_ids": ids}
    else:
        config = transformers.ViTConfig(image_size=12, patch_size=4, num_channels=1, **sizes)
        model, example = transformers.ViTForImageClassification(config), {"pixel_values": torch.rand(2, 1, 12, 12)}
    exported = export(model, example, tmp_path / "m.onnx")
    assert exported.agreement.relative < 1e-5
    card = card_of(exported, {k: x.numpy() for k, x in example.items()}, source=model, batch_sizes=(2,), seconds=0.02)
    assert card.equal_predictions == 1.0
    assert export(model, example, tmp_path / "m.onnx", precision="int8", batches=[example]).agreement.of_spread < 0.1


def test_openvino_agrees_and_says_what_it_cannot(tmp_path):
    pytest.importorskip("openvino")
    batch = torch.rand(32, 144)
    exported = export(made("resnet"), batch[:4], tmp_path / "m.xml", to="openvino")
    assert exported.agreement.relative < 1e-5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.bin", "m.xml"]


@pytest.mark.slow
def test_precisions_of_openvino(tmp_path):
    pytest.importorskip("openvino")
    batch = torch.rand(32, 144)
    found = precisions_of(
        made("resnet"),
        batch[:4],
        tmp_path,
        to="openvino",
        batches=[batch],
        activation_bits=7,
        seconds=0.02,
        batch_sizes=(1,),
    )
    assert {*found.cards} | {*found.refused} == {"float32", "bfloat16", "int8"}
    assert all("no bfloat16 on this processor" in why for why in found.refused.values())
    assert not any(card.torch_loaded for card in found.cards.values())


def test_a_card_is_measured_without_torch(tmp_path):
    model, x = made("resnet"), torch.rand(70, 144)
    found = precisions_of(
        model, x[:4], tmp_path, inputs=x.numpy(), targets=model.eval()(x).argmax(1).numpy(), batches=[x], seconds=0.05
    )
    card = found.cards["int8"]
    assert {*found.cards} == {"float32", "int8"}
    assert found.fastest in str(card.fastest_precision)
    assert not card.torch_loaded
    assert card.bytes == (tmp_path / "int8.onnx").stat().st_size
    assert 0 < card.deflated_bytes < card.bytes < found.cards["float32"].bytes / 2
    assert found.cards["float32"].accuracy == found.cards["float32"].equal_predictions == 1.0
    assert card.accuracy == card.equal_predictions == card.accuracy_ratio
    for entry in card.batches:
        assert 0.0 < entry["p50_ms"] <= entry["p90_ms"] <= entry["p99_ms"]
        assert 0 < entry["memory_bytes"] < 150e6
        assert entry["joules"] > 0.0
    assert card.at(64)["memory_bytes"] >= card.at(1)["memory_bytes"]
    assert card.load_seconds > 0.0
    written = card.save()
    assert written == tmp_path / "int8.onnx.card.json"
    assert json.loads(written.read_text()) == json.loads(json.dumps(card.as_dict()))
    assert len(str(card).splitlines()) < 24


def test_a_file_that_cannot_be_run_is_an_error_and_nothing_hangs(tmp_path):
    exported = export(made("mlp"), torch.rand(4, 144), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"cannot be run with these inputs: .*dimensions"):
        card_of(exported, np.zeros((2, 5), np.float32), seconds=0.01)
    with pytest.raises(ExportError, match=r"cannot be run with these inputs: .*type"):
        card_of(exported, np.zeros((2, 144)), seconds=0.01)
    with pytest.raises(ExportError, match=r"took more than 0\.01 seconds"):
        card_of(exported, np.zeros((2, 144), np.float32), timeout=0.01)
    torn = tmp_path / "torn.onnx"
    torn.write_bytes(exported.path.read_bytes()[:1000])
    with pytest.raises(ExportError, match="the file cannot be run"):
        card_of(torn, np.zeros((2, 144), np.float32))


@pytest.mark.parametrize(
    ("to", "suffix", "module"), [("executorch", ".pte", "executorch"), ("litert", ".tflite", "litert_torch")]
)
def test_runtimes_for_devices(to, suffix, module, tmp_path):
    try:
        pytest.importorskip(module)
    except pytest.skip.Exception:
        with pytest.raises(ExportError, match="is not installed: pip install"):
            export(made("mlp"), torch.rand(4, 144), tmp_path / f"m{suffix}", to=to)
        raise
    for name in ("mlp", "resnet"):
        exported = export(made(name, sparse=True), torch.rand(4, 144), tmp_path / f"m{suffix}", to=to)
        assert exported.agreement.relative < 1e-5
        card = card_of(exported, np.zeros((4, 144), np.float32), batch_sizes=(4,), seconds=0.02)
        assert card.torch_loaded == (to == "executorch")


def test_a_model_of_which_xnnpack_takes_nothing_is_refused(tmp_path):
    pytest.importorskip("executorch")

    class Sums(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 1)

    with pytest.raises(ExportError, match=r"takes no part of the model.*cumsum"):
        export(Sums(), torch.rand(4, 144), tmp_path / "m.pte", to="executorch")
