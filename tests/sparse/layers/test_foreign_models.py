"""`ToSparse` and `ToDense` on models that others wrote: torch's transformers, and Hugging Face's from small configurations."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from noctule.core.convert import convert_
from noctule.sparse.layers import SparseLinear, ToDense, ToSparse

KEEP_ALL = ToSparse(density=1.0, fresh=False)
MODES = ("train", "eval", "no_grad")
FUSED = "its parts are sparse; torch's fused path of evaluation, which reads dense weights, stays off"

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor")


def mode(model: nn.Module, name: str):
    """The model in a mode, and a context for its forward."""
    model.train(name == "train")
    return torch.no_grad() if name == "no_grad" else nullcontext()


def assert_back_to_dense_unchanged(model: nn.Module, original: nn.Module):
    convert_(model, ToDense())
    kinds = [[(name, type(m)) for name, m in each.named_modules()] for each in (model, original)]
    assert kinds[0] == kinds[1]
    ours, theirs = dict(model.named_parameters()), dict(original.named_parameters())
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert torch.equal(ours[name], parameter), name
        assert ours[name].stride() == parameter.stride(), name
    ours, theirs = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_parameters())
    tied = {name for name in ours if name not in theirs}
    assert tied == set(dict(original.named_parameters(remove_duplicate=False))) - set(dict(original.named_parameters()))


# -- torch's own ----------------------------------------------------------------------------------------------------


def encoder(**options) -> nn.TransformerEncoder:
    options = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True, **options}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, **options), 3)


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] + [True] * 4])


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "both"])
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}, {"batch_first": False}]
)
def test_an_encoder_computes_the_same_in_all_modes(name, masks, options):
    dense = encoder(**options)
    sparse = copy.deepcopy(dense)
    convert_(sparse, KEEP_ALL)
    x = torch.randn(3, 5, 12)
    x = x if options.get("batch_first", True) else x.transpose(0, 1)
    given = {}
    if masks in ("padding", "both"):
        given["src_key_padding_mask"] = PADDING
    if masks in ("causal", "both"):
        given["mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with mode(sparse, name), mode(dense, name):
        found, right = sparse(x, **given), dense(x, **given)
    if masks in ("padding", "both"):  # what is computed for places that hold nothing differs between torch's own paths
        there = ~PADDING if options.get("batch_first", True) else ~PADDING.t()
        found, right = found[there], right[there]
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)
    assert_back_to_dense_unchanged(sparse, dense)


@pytest.mark.parametrize(
    ("where", "changed"),
    [
        (lambda name, _: not name.startswith("layers.0"), 6),
        (lambda name, _: name == "layers.2.linear1", 1),
        (lambda name, _: name == "layers.0.linear2", 1),
        (lambda name, _: name in ("layers.1.self_attn", "layers.2.self_attn"), 2),
        (lambda name, _: "self_attn" not in name, 6),
    ],
)
def test_an_encoder_of_which_parts_stay_dense_is_right_with_torchs_nested_tensors_too(where, changed):
    dense = encoder().eval()
    sparse = copy.deepcopy(dense)
    assert len(convert_(sparse, KEEP_ALL, where=where).changed) == changed
    x = torch.randn(3, 5, 12)
    with torch.no_grad():
        found, right = (model(x, src_key_padding_mask=PADDING)[~PADDING] for model in (sparse, dense))
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)


def test_the_report_says_what_happened_to_the_fused_path():
    model = encoder()
    done = convert_(model, ToSparse(density=0.2))
    each = {"self_attn": "MultiheadAttention -> SparseAttention", "linear1": "SparseLinear(12, 24", "linear2": "24, 12"}
    assert set(done.changed) == {f"layers.{k}.{name}" for k in range(3) for name in each}
    assert all(text in done.changed[f"layers.1.{name}"] for name, text in each.items())
    assert done.left == {f"layers.{k}": FUSED for k in range(3)}
    total = sum(m.weights for m in model.modules() if isinstance(m, SparseLinear))
    assert total == round(0.2 * 3 * (4 * 12 * 12 + 2 * 12 * 24))


def test_an_encoder_of_copies_of_a_sparse_layer():
    layer = encoder().layers[0]
    convert_(layer, ToSparse(density=0.5))
    model, x = nn.TransformerEncoder(layer, 2), torch.randn(3, 5, 12)
    with torch.no_grad():
        right = model(x, src_key_padding_mask=PADDING)[~PADDING]
        found = model.eval()(x, src_key_padding_mask=PADDING)[~PADDING]
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)


def test_a_transformer_with_encoder_and_decoder():
    dense = nn.Transformer(12, 2, 2, 2, 24, dropout=0.0, batch_first=True)
    sparse = copy.deepcopy(dense)
    done = convert_(sparse, KEEP_ALL)
    assert sum("SparseAttention" in text for text in done.changed.values()) == 2 + 2 * 2
    source, target = torch.randn(3, 5, 12), torch.randn(3, 4, 12)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    masks = {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING, "tgt_mask": causal}
    for name in MODES:
        with mode(sparse, name), mode(dense, name):
            found, right = (model(source, target, tgt_is_causal=True, **masks) for model in (sparse, dense))
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)
    assert_back_to_dense_unchanged(sparse, dense)


def test_a_sparse_encoder_learns_and_its_state_is_loaded():
    torch.manual_seed(1)
    model = encoder()
    convert_(model, ToSparse(density=0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = torch.randn(3, 5, 12), torch.randn(3, 5, 12)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x, src_key_padding_mask=PADDING)[~PADDING], y[~PADDING])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    other = encoder()
    convert_(other, ToSparse(density=0.3))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model.eval()(x))


# -- Hugging Face -----------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def gpt2(hf):
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def bert(hf):
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, **NO_DROPOUT, max_position_embeddings=32))


def llama(hf):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=1, pad_token_id=0))


def llama_tied(hf):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=True, pad_token_id=0))


def t5(hf, **options):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = hf.T5Config(vocab_size=40, **sizes, **options, dropout_rate=0.0, decoder_start_token_id=0)
    return hf.T5ForConditionalGeneration(config)


def t5_gated(hf):
    return t5(hf, feed_forward_proj="gated-gelu")


def opt(hf):
    config = {name: size for name, size in SMALL.items() if name != "intermediate_size"}
    return hf.OPTForCausalLM(
        hf.OPTConfig(**config, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=8, dropout=0.0)
    )


def vit(hf):
    sizes = {name: size for name, size in SMALL.items() if name != "vocab_size"}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, **NO_DROPOUT, image_size=16, patch_size=4, num_labels=5))


TIED_HEAD = {
    gpt2: {"lm_head": "its weight is tied to transformer.wte"},
    bert: {"cls.predictions.decoder": "its bias is tied to cls.predictions"},
    llama: {},
    llama_tied: {"lm_head": "its weight is tied to model.embed_tokens"},
    t5: {"lm_head": "its weight is tied to shared"},
    t5_gated: {"lm_head": "its weight is tied to shared"},
    opt: {"lm_head": "its weight is tied to model.decoder.embed_tokens"},
    vit: {},
}


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


def inputs_of(make) -> dict[str, torch.Tensor]:
    if make is vit:
        return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([1, 3])}
    ids, there = torch.randint(3, 40, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    there[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": there, "labels": ids}


@pytest.mark.parametrize("make", TIED_HEAD)
def test_a_model_of_hugging_face_runs_in_all_modes_and_goes_back(make, hf):
    dense = make(hf)
    sparse = copy.deepcopy(dense)
    done = convert_(sparse, KEEP_ALL)
    heads = {
        name: why.split(" (")[0] for name, why in done.left.items() if name in ("lm_head", "cls.predictions.decoder")
    }
    assert heads == TIED_HEAD[make]
    assert all(
        why.startswith(("a lookup", "ViTEmbeddings reads its")) for name, why in done.left.items() if name not in heads
    )
    kinds = {type(m).__name__ for m in sparse.modules()}
    assert "Conv1D" not in kinds
    assert ("Linear" in kinds) == bool(heads)
    inputs = inputs_of(make)
    for name in MODES:
        with mode(sparse, name), mode(dense, name):
            found, right = sparse(**inputs), dense(**inputs)
        torch.testing.assert_close(found.logits, right.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.loss, right.loss, atol=1e-5, rtol=1e-4)
        if name == "train":
            found.loss.backward()
            assert all(p.grad is not None for p in sparse.parameters() if p.requires_grad)
            sparse.zero_grad()
    assert_back_to_dense_unchanged(sparse, dense)


@pytest.mark.parametrize("make", TIED_HEAD)
def test_a_sparse_model_of_hugging_face_learns(make, hf):
    model = make(hf)
    convert_(model, ToSparse(density=0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = inputs_of(make)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("make", [gpt2, llama, t5, opt])
def test_generate_says_the_same(make, hf):
    dense = make(hf).eval()
    sparse = copy.deepcopy(dense)
    convert_(sparse, KEEP_ALL)
    ids = torch.randint(3, 40, (2, 4))
    for options in ({"do_sample": False}, {"do_sample": False, "use_cache": False}, {"num_beams": 2}):
        told = []
        for model in (sparse, dense):
            torch.manual_seed(0)
            told.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **options))
        assert torch.equal(*told)


def test_conv1d_is_a_linear_layer_the_other_way_round(hf):
    conv = hf.pytorch_utils.Conv1D(6, 4)
    nn.init.normal_(conv.bias)
    conv.weight.requires_grad_(False)
    layer = convert_(copy.deepcopy(conv), ToSparse(density=0.5, fresh=False)).model
    assert isinstance(layer, SparseLinear)
    assert (layer.in_features, layer.out_features, layer.weights) == (4, 6, 12)
    assert not layer.values.requires_grad
    back = convert_(layer, ToDense()).model
    assert type(back) is type(conv)
    assert (back.nx, back.nf) == (4, 6)
    kept = back.weight != 0
    assert kept.sum() == 12
    assert torch.equal(back.weight[kept], conv.weight[kept])
    assert torch.equal(back.bias, conv.bias)
    assert not back.weight.requires_grad


def test_a_conv1d_of_another_library_is_none_of_ours():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.zeros(6))

    model = nn.ModuleList([Conv1D(), nn.Linear(4, 4)])
    done = convert_(model, ToSparse(density=0.5))
    assert set(done.changed) == {"1"}
    assert done.left["0"].startswith("Conv1D reads its weight (4, 6) in a forward of its own")
