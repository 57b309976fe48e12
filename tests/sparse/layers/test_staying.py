"""What stays dense is named: nothing large goes unsaid, and nothing is silently replaced by another function."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from noctule.core.convert import convert_
from noctule.sparse.layers import SparseLinear, ToDense, ToSparse
from noctule.sparse.layers.sparse_layer import SparseLayer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning"),
]

REMADE = {
    "old weight_norm": (nn.utils.weight_norm, "torch.nn.utils.remove_weight_norm(layer, 'weight') first"),
    "old spectral_norm": (nn.utils.spectral_norm, "torch.nn.utils.remove_spectral_norm(layer, 'weight') first"),
    "weight_norm": (parametrizations.weight_norm, "remove_parametrizations(layer, 'weight') first"),
    "spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations(layer, 'weight') first"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations(layer, 'weight') first"),
    "prune": (lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5), "prune.remove(layer, 'weight') first"),
    "prune bias": (lambda layer: prune.l1_unstructured(layer, "bias", amount=0.5), "prune.remove(layer, 'bias') first"),
    "prune twice": (
        lambda layer: [prune.random_unstructured(layer, "weight", amount=0.2) for _ in range(2)],
        "prune.remove(layer, 'weight') first",
    ),
}


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize("name", REMADE)
def test_a_layer_whose_weight_is_computed_stays_with_the_remedy(name, kind):
    torch.manual_seed(0)
    change, remedy = REMADE[name]
    shape = {nn.Linear: (3, 8), nn.Conv1d: (3, 8, 9), nn.Conv2d: (3, 8, 9, 9)}[kind]
    model = nn.Sequential(kind(*((8, 12) if kind is nn.Linear else (8, 12, 3))), nn.Tanh())
    change(model[0])
    model.append(nn.Linear(12 if kind is nn.Linear else 7, 2))
    x = torch.randn(shape)
    expected = model[0].eval()(x)
    done = convert_(model, ToSparse(density=0.2))
    assert set(done.changed) == {"2"}
    assert list(done.left) == ["0"]
    assert remedy in done.left["0"]
    assert "% of the model" in done.left["0"]
    assert torch.equal(model[0](x), expected)
    model(x).sum().backward()


def test_the_remedies_are_right():
    torch.manual_seed(0)
    for change, undo in (
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
        (parametrizations.weight_norm, lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight")),
        (REMADE["prune"][0], lambda m: prune.remove(m, "weight")),
    ):
        layer = nn.Linear(8, 12)
        change(layer)
        undo(layer)
        assert set(convert_(nn.ModuleList([layer]), ToSparse(density=0.5)).changed) == {"0"}
    pruned = SparseLinear.from_dense(layer)
    assert pruned.weights == 48
    torch.testing.assert_close(pruned(x := torch.randn(3, 8)), layer(x))


def test_an_attention_with_another_projection_stays():
    class LowRank(nn.Linear):
        pass

    attention = [nn.MultiheadAttention(12, 3) for _ in range(4)]
    attention[0].out_proj = LowRank(12, 12)
    parametrizations.weight_norm(attention[1].out_proj)
    parametrizations.weight_norm(attention[2], "in_proj_weight")
    done = convert_(nn.ModuleList(attention), ToSparse(density=0.5))
    assert set(done.changed) == {"3"}
    assert "LowRank" in done.left["0"]
    assert "parametrized" in done.left["1"] or "computed by WeightNorm" in done.left["1"]
    assert "in_proj_weight is computed by WeightNorm" in done.left["2"]


def test_layers_without_a_shape_or_with_other_numbers_stay():
    class Quantised(torch.Tensor):
        pass

    integers, wrapped = nn.Linear(8, 8), nn.Linear(8, 8)
    integers.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    wrapped.weight = nn.Parameter(torch.randn(8, 8).as_subclass(Quantised), requires_grad=False)
    packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})[0]
    model = nn.ModuleList([integers, wrapped, packed, nn.LazyLinear(8), nn.Linear(8, 8)])
    done = convert_(model[:3].append(model[4]), ToSparse(density=0.5))
    assert set(done.changed) == {"3"}
    assert "its weight is torch.int8" in done.left["0"]
    assert "its weight is Quantised" in done.left["1"]
    assert "is quantised (torch.ao)" in done.left["2"]
    with pytest.warns(UserWarning, match="run a batch through the model first"):
        convert_(model[3], ToSparse(density=0.5))


def test_every_large_kind_of_torch_is_named_largest_first():
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(300, 8),
            "bag": nn.EmbeddingBag(200, 8),
            "lstm": nn.LSTM(8, 10),
            "cell": nn.GRUCell(8, 10),
            "up": nn.ConvTranspose1d(8, 10, 3),
            "volume": nn.Conv3d(4, 8, 2),
            "pair": nn.Bilinear(6, 6, 6),
            "norm": nn.LayerNorm(500),
            "linear": nn.Linear(20, 10),
        }
    )
    done = convert_(model, ToSparse(density=0.1))
    assert set(done.changed) == {"linear"}
    assert list(done.left) == ["table", "bag", "lstm", "cell", "volume", "up", "pair"]
    for name, word in (("table", "lookup"), ("lstm", "LSTM"), ("cell", "GRUCell"), ("up", "ConvTranspose1d")):
        assert word in done.left[name]
    total = sum(p.numel() for p in model.parameters())
    assert done.left["table"].endswith(f"(2,400 numbers, {2400 / total:.1%} of the model)")
    assert repr(done) == str(done)
    assert [line.split()[0] for line in str(done).splitlines()] == ["changed"] + ["left"] * 7


def test_many_small_ones_are_named_too_and_the_text_is_cut():
    class Own(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.table = nn.Parameter(torch.randn(size, 4))

    model = nn.ModuleList([*(Own(10 + n // 50) for n in range(300)), nn.Linear(40, 40)])
    done = convert_(model, ToSparse(density=0.1))
    named = sum(p.numel() for name in done.left for p in model.get_submodule(name).parameters())
    dense = sum(m.table.numel() for m in model if isinstance(m, Own))
    assert (dense - named) < 0.01 * sum(p.numel() for p in model.parameters())
    lines = str(done).splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == f"left {len(done.left) - 20} more, which are smaller: see .left"


def test_nothing_is_named_where_nothing_large_stays():
    model = nn.Sequential(nn.Linear(100, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 10))
    done = convert_(model, ToSparse(density=0.1))
    assert done.left == {}
    assert convert_(model, ToDense()).left == {}


# -- Hugging Face -----------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SIZES, "vocab_size": 100}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4}
SIDES = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
HEARD = {"d_model": 32, "num_mel_bins": 20, "max_source_positions": 50, "pad_token_id": 0, "vocab_size": 100}
WAVES = {"conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
POSITIONS = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
MODELS = {
    "BertForSequenceClassification": ("BertConfig", TEXT),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 100, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "LlamaForCausalLM": ("LlamaConfig", {**TEXT, "num_key_value_heads": 2}),
    "MixtralForCausalLM": ("MixtralConfig", {**TEXT, "num_key_value_heads": 2, "num_local_experts": 4}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {**HEARD, **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIDES.items()}},
    ),
    "ViTForImageClassification": ("ViTConfig", IMAGE),
    "CLIPModel": ("CLIPConfig", {"text_config": TEXT, "vision_config": IMAGE}),
    "MambaForCausalLM": ("MambaConfig", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2}),
    "Wav2Vec2ForCTC": ("Wav2Vec2Config", {**TEXT, **WAVES, **POSITIONS}),
}


@pytest.mark.parametrize("name", MODELS)
def test_less_than_a_hundredth_of_a_model_stays_dense_unnamed(name):
    hf = pytest.importorskip("transformers")
    hf.logging.set_verbosity_error()
    config, sizes = MODELS[name]
    model = getattr(hf, name)(getattr(hf, config)(**sizes))
    before = sum(p.numel() for p in model.parameters())
    done = convert_(model, ToSparse(density=0.1))
    after = sum(p.numel() for p in model.parameters())
    assert after < 0.7 * before
    sparse = {p for m in model.modules() if isinstance(m, SparseLayer) for p in m.parameters()}
    named = {p for path in done.left for p in model.get_submodule(path).parameters()}
    unnamed = {
        n: p.numel() for n, p in model.named_parameters() if p not in sparse | named and sum(s > 1 for s in p.shape) > 1
    }
    assert sum(unnamed.values()) < 0.01 * after, unnamed
    assert all("% of the model" in why or "tied" in why for why in done.left.values())


def test_whisper_hears_the_same():
    hf = pytest.importorskip("transformers")
    config, sizes = MODELS["WhisperForConditionalGeneration"]
    dense = hf.WhisperForConditionalGeneration(getattr(hf, config)(**sizes)).eval()
    sparse = copy.deepcopy(dense)
    done = convert_(sparse, ToSparse(density=1.0, fresh=False))
    assert {"model.encoder.conv1", "model.encoder.conv2"} <= done.changed.keys()
    inputs = {"input_features": torch.randn(2, 20, 100), "decoder_input_ids": torch.randint(3, 100, (2, 5))}
    torch.testing.assert_close(sparse(**inputs).logits, dense(**inputs).logits, atol=1e-5, rtol=1e-4)
