"""A Hugging Face model with sparse layers comes back from its folder as the same function, sparse."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from noctule import FuseEpilogue, SparseConv2d, SparseLinear, ToDense, ToSparse, convert_, set_, shrink
from noctule.core.method import attach
from noctule.core.remap import Remap
from noctule.core.topology import Topology
from noctule.kernels import IDENTITY
from noctule.sparse.layers import SparseLayer
from noctule.sparse.layers.hugging_face import note_sparse_layers

IDS = torch.arange(16).view(2, 8)
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def bert(kind="BertForSequenceClassification") -> nn.Module:
    return getattr(transformers, kind)(transformers.BertConfig(**SIZES))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
        )
    )


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(**{**SIZES, "image_size": 8, "patch_size": 4})
    return transformers.ViTForImageClassification(config)


def whisper() -> nn.Module:
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in WHISPER.items()}
    config = transformers.WhisperConfig(
        vocab_size=40, d_model=16, num_mel_bins=8, max_source_positions=10, max_target_positions=20, **sizes, **TOKENS
    )
    return transformers.WhisperForConditionalGeneration(config)


WHISPER = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
MODELS = {
    "bert": (bert, {"input_ids": IDS}),
    "distilbert": (
        lambda: transformers.DistilBertForMaskedLM(
            transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
        ),
        {"input_ids": IDS},
    ),
    "gpt2": (gpt2, {"input_ids": IDS}),
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1)),
        {"input_ids": IDS},
    ),
    "mixtral": (
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=2)
        ),
        {"input_ids": IDS},
    ),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS}),
    "vit": (vit, {"pixel_values": torch.randn(2, 3, 8, 8)}),
    "whisper": (whisper, {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": IDS}),
}


def logits(model: nn.Module, **inputs) -> torch.Tensor:
    return model(**(inputs or {"input_ids": IDS})).logits


def sparse(model: nn.Module, **rule) -> nn.Module:
    convert_(model, ToSparse(**(rule or {"density": 0.2})))
    return model.eval()


def assert_same_state(a: nn.Module, b: nn.Module):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_holds_the_function(name, tmp_path):
    make, inputs = MODELS[name]
    model = sparse(make())
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded, **inputs), logits(model, **inputs))
    assert_same_state(loaded, model)
    loaded.train()(**inputs).logits.square().sum().backward()
    assert all(m.values.grad is not None for m in loaded.modules() if isinstance(m, SparseLayer))
    loaded.eval().save_pretrained(tmp_path / "again")
    assert_same_state(type(model).from_pretrained(tmp_path / "again"), model)


def test_what_comes_back_is_a_plain_model(tmp_path):
    sparse(bert()).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not hasattr(loaded, "hf_quantizer")
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded.config, "_is_quantized")
    assert not loaded.training
    assert_same_state(pickle.loads(pickle.dumps(loaded)), loaded)
    assert_same_state(copy.deepcopy(loaded), loaded)


@pytest.mark.parametrize("part", ["whole", "inside"])
def test_with_another_head_and_without_one(part, tmp_path):
    model = bert("BertForMaskedLM")
    convert_(model if part == "whole" else model.bert, ToSparse(density=0.2))
    model.save_pretrained(tmp_path)
    assert_same_state(transformers.BertForMaskedLM.from_pretrained(tmp_path), model)
    base = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert_same_state(base, model.bert)
    base.save_pretrained(tmp_path / "base")
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "base")
    assert_same_state(again.bert, model.bert)


def test_places_come_from_the_file_and_not_from_the_config(tmp_path):
    model = sparse(bert())
    layer = model.bert.encoder.layer[0].output.dense
    fewer = Topology.random(layer.topology.shape, layer.weights - 7)
    layer.remap_(fewer, Remap.between(layer.topology, fewer), new=0.5)
    other = model.bert.encoder.layer[1].output.dense
    more = Topology.random(other.topology.shape, other.weights + 3)
    other.remap_(more, Remap.between(other.topology, more), new=0.5)
    model.save_pretrained(tmp_path)
    assert_same_state(type(model).from_pretrained(tmp_path), model)


def test_connections_that_moved_in_training(tmp_path):
    model = sparse(bert()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with attach(model, optimizer, set_(every=1)):
        for _ in range(3):
            optimizer.zero_grad()
            logits(model).square().sum().backward()
            optimizer.step()
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_neurons_that_were_removed(tmp_path):
    model = sparse(bert())
    name = "bert.encoder.layer.1.{}.dense"
    inner, outer = name.format("intermediate"), name.format("output")
    shrink(model, {inner: torch.arange(10)}, paths={inner: [nn.GELU(), outer]})
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.get_submodule(inner).out_features == 10 == loaded.get_submodule(outer).in_features
    assert torch.equal(logits(loaded), logits(model))


class ConvConfig(transformers.PreTrainedConfig):
    model_type = "folded"


class Convolutions(transformers.PreTrainedModel):
    config_class = ConvConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 6), nn.LeakyReLU(0.1), nn.Dropout(0.2)]
        self.layers, self.attention = nn.Sequential(*layers), nn.MultiheadAttention(6, 2)
        self.post_init()

    def forward(self, x):
        y = self.layers(x)
        return self.attention(y, y, y)[0]


def test_convolutions_attention_and_what_was_folded_into_a_layer(tmp_path):
    model, x = sparse(Convolutions(ConvConfig())), torch.randn(2, 3, 8, 8)
    convert_(model, FuseEpilogue())
    assert isinstance(model.layers[0], SparseConv2d)
    assert model.layers[3].epilogue != IDENTITY
    model.save_pretrained(tmp_path)
    loaded = Convolutions.from_pretrained(tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert loaded.layers[3].epilogue == model.layers[3].epilogue
    assert str(loaded) == str(model)


def test_a_model_that_is_dense_again_loads_as_one(tmp_path):
    model = sparse(bert())
    convert_(model, ToDense(), where=lambda name, module: not name.endswith("query"))
    model.save_pretrained(tmp_path / "some")
    assert_same_state(type(model).from_pretrained(tmp_path / "some"), model)
    convert_(model, ToDense())
    model.save_pretrained(tmp_path / "none")
    assert "quantization_config" not in json.loads((tmp_path / "none" / "config.json").read_text())
    assert_same_state(type(model).from_pretrained(tmp_path / "none"), model)


def test_other_types_and_devices(tmp_path):
    model = sparse(bert())
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.classifier.values.dtype == torch.bfloat16
    assert torch.equal(half.classifier.values, model.classifier.values.bfloat16())
    assert half.classifier.topology == model.classifier.topology
    assert type(model).from_pretrained(tmp_path, dtype="auto").classifier.values.dtype == torch.float32


def test_given_weights_are_the_ones_that_are_saved(tmp_path):
    model = sparse(bert())
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first")
    mean = {name: x / 2 if name.endswith("values") else x for name, x in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path / "mean", state_dict=mean)
    again = type(model).from_pretrained(tmp_path / "mean")
    assert torch.equal(again.classifier.values, model.classifier.values / 2)
    again = type(model).from_pretrained(None, config=loaded.config, state_dict=mean)
    assert torch.equal(again.classifier.values, model.classifier.values / 2)


def test_a_file_without_places_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = sparse(bert())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {name: x for name, x in load_file(file).items() if name != "classifier._extra_state"}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="places"):
        type(model).from_pretrained(tmp_path)


def test_a_layer_put_in_by_hand_is_known_after_it_was_noted(tmp_path):
    model = sparse(bert())
    model.bert.pooler.dense = SparseLinear(16, 16, density=0.3)
    note_sparse_layers(model)
    model.save_pretrained(tmp_path)
    assert_same_state(type(model).from_pretrained(tmp_path), model)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"]["bert.nowhere"] = [[1, 1, 1]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not have: bert\.nowhere"):
        type(model).from_pretrained(tmp_path)


def test_a_process_that_only_imported_noctule_loads_it(tmp_path):
    sparse(gpt2()).save_pretrained(tmp_path)
    code = """
import sys, noctule
assert not {"torch", "transformers", "noctule.sparse.layers"} & set(sys.modules)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert isinstance(model.transformer.h[1].mlp.c_fc, noctule.SparseLinear)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=Path.cwd())
    assert not done.returncode, done.stderr


class Converted(transformers.BertForMaskedLM):
    """A user's class that is sparse from the start."""

    def __init__(self, config):
        super().__init__(config)
        convert_(self, ToSparse(density=0.3))


def test_a_class_that_converts_itself_comes_back_with_its_places(tmp_path):
    model = Converted(transformers.BertConfig(**SIZES)).eval()
    layer = next(m for m in model.modules() if isinstance(m, SparseLayer))
    other = Topology.random(layer.topology.shape, layer.weights - 3)
    layer.remap_(other, Remap.between(layer.topology, other))
    model.save_pretrained(tmp_path)
    again = Converted.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
