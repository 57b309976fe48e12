import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noctule.core.convert import convert_
from noctule.sparse.layers import SparseLinear, ToDense, ToSparse
from noctule.sparse.layers.attention import SparseAttention

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

KEEP_ALL = ToSparse(density=1.0, fresh=False)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def pair(**options) -> tuple[nn.MultiheadAttention, SparseAttention]:
    """A dense attention with biases that are not zero, and the same with all its places stored."""
    dense = nn.MultiheadAttention(options.pop("embed_dim", 12), options.pop("num_heads", 3), **options)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.3)
    return dense, convert_(copy.deepcopy(dense), KEEP_ALL).model


def padding(batch: int, length: int) -> torch.Tensor:
    """The last of each sequence are none, at least one is there."""
    return torch.arange(length) >= torch.randint(1, length + 1, (batch, 1))


def assert_same(found, right):
    for a, b in zip(found, right, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, **CLOSE)


# -- it is nn.MultiheadAttention ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_outputs_weights_and_gradients_are_those_of_the_dense_attention(data):
    def draw(*choices):
        return data.draw(st.sampled_from(choices))

    batch_first, kind = draw(True, False), draw("self", "cross", "widths")
    widths = {"kdim": 5, "vdim": 7} if kind == "widths" else {}
    dense, sparse = pair(bias=draw(True, False), batch_first=batch_first, **widths)
    B, L, S = 4, 5, 5 if kind == "self" else draw(3, 8)
    query = torch.randn(B, L, 12)
    key, value = torch.randn(B, S, widths.get("kdim", 12)), torch.randn(B, S, widths.get("vdim", 12))
    if kind == "self":
        key = value = query
    elif kind == "cross" and draw(True, False):
        value = key
    shape = draw(None, (L, S), (B * 3, L, S))
    attn_mask = None if shape is None else torch.rand(shape) < 0.4
    key_padding_mask = draw(None, padding(B, S))
    if attn_mask is not None:
        attn_mask[..., 0] = False  # a query that may look nowhere is not a number
    options = {"need_weights": draw(True, False), "average_attn_weights": draw(True, False)}
    if draw(True, False):  # masks of numbers
        attn_mask, key_padding_mask = (
            None if m is None else torch.zeros(m.shape).masked_fill(m, -torch.inf)
            for m in (attn_mask, key_padding_mask)
        )
    results = []
    for module in (sparse, dense):
        leaves = {id(x): x.clone().requires_grad_() for x in (query, key, value)}
        inputs = [leaves[id(x)] for x in (query, key, value)]
        laid = {id(x): x if batch_first else x.transpose(0, 1) for x in inputs}
        y, weights = module(
            *(laid[id(x)] for x in inputs), attn_mask=attn_mask, key_padding_mask=key_padding_mask, **options
        )
        gradients = torch.autograd.grad(y.sin().sum(), [*leaves.values(), *_projections(module)])
        results.append([y, weights, *gradients[: len(leaves)], *_joined(module, gradients[len(leaves) :])])
    assert_same(*results)


def _projections(module: nn.Module) -> list[nn.Parameter]:
    if isinstance(module, nn.MultiheadAttention):
        return list(module.parameters())
    layers = (module.q_proj, module.k_proj, module.v_proj, module.out_proj)
    return [p for layer in layers for p in (layer.values, layer.bias) if p is not None]


def _joined(module: nn.Module, gradients) -> list[torch.Tensor]:
    """Gradients of weights and biases, each in one row."""
    if isinstance(module, nn.MultiheadAttention):
        named = dict(zip([name for name, _ in module.named_parameters()], gradients, strict=True))
        weights = [g.flatten() for name, g in named.items() if "weight" in name and "out" not in name]
        rest = [named[n] for n in ("out_proj.weight", "in_proj_bias", "out_proj.bias") if n in named]
        return [torch.cat(weights), *(g.flatten() for g in rest)]
    step = 2 if module.q_proj.bias is not None else 1
    values, biases = gradients[::step], gradients[1::2] if step == 2 else []
    found = [torch.cat(values[:3]), values[3]]
    return [*found, torch.cat(biases[:3]), biases[3]] if biases else found


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_sequence_without_a_batch(batch_first, need_weights):
    dense, sparse = pair(batch_first=batch_first)
    x, pad = torch.randn(5, 12), torch.tensor([False, False, False, True, True])
    for options in ({}, {"key_padding_mask": pad}, {"attn_mask": torch.rand(3, 5, 5)}):
        assert_same(
            sparse(x, x, x, need_weights=need_weights, **options), dense(x, x, x, need_weights=need_weights, **options)
        )


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_the_causal_hint(need_weights, padded):
    dense, sparse = pair(batch_first=True)
    x = torch.randn(4, 5, 12)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    options = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    if padded:
        options["key_padding_mask"] = torch.zeros(4, 5).masked_fill(padding(4, 5), -torch.inf)
    assert_same(sparse(x, x, x, **options), dense(x, x, x, **options))
    with pytest.raises(ValueError, match="give that mask too"):
        sparse(x, x, x, is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_what_the_dense_attention_draws_and_only_in_training(need_weights):
    dense, sparse = pair(dropout=0.5, batch_first=True)
    x = torch.randn(4, 5, 12)
    results = []
    for module in (sparse, dense):
        torch.manual_seed(3)
        results.append(module(x, x, x, need_weights=need_weights))
    assert_same(*results)
    first, second = sparse(x, x, x)[0], sparse(x, x, x)[0]
    assert not torch.equal(first, second)
    sparse.eval(), dense.eval()
    assert_same(sparse(x, x, x, need_weights=need_weights), dense(x, x, x, need_weights=need_weights))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_sequences_of_their_own_lengths(layout):
    dense, sparse = pair(batch_first=True)
    parts = [torch.randn(n, 12) for n in (5, 1, 3)]
    x = torch.nested.as_nested_tensor(parts, layout=layout)
    y, weights = sparse.eval()(x, x, x, need_weights=False)
    assert y.is_nested
    assert y.layout == layout
    assert weights is None
    for found, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(found, dense(part, part, part)[0], **CLOSE)
    with pytest.raises(ValueError, match="need_weights=False"):
        sparse(x, x, x)


def test_masks_of_another_shape_are_refused():
    _, sparse = pair(batch_first=True)
    x = torch.randn(4, 5, 12)
    with pytest.raises(ValueError, match=r"\(5, 4\), expected \(5, 5\) or \(12, 5, 5\)"):
        sparse(x, x, x, attn_mask=torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"\(5, 4\), expected \(4, 5\)"):
        sparse(x, x, x, key_padding_mask=torch.zeros(5, 4))
    with pytest.raises(ValueError, match="two or three dimensions"):
        sparse(x[0, 0], x[0, 0], x[0, 0])


def test_layers_that_do_not_fit_are_refused():
    layers = [SparseLinear(12, 12, density=0.5) for _ in range(3)]
    with pytest.raises(ValueError, match="so all projections must come to as many"):
        SparseAttention(*layers, SparseLinear(12, 8, density=0.5), num_heads=3)
    with pytest.raises(ValueError, match="shared out to 5 heads"):
        SparseAttention(*layers, layers[0], num_heads=5)


# -- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["in_proj_weight k_proj_weight", "in_proj_bias out_proj.weight", "out_proj.bias"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5, "vdim": 7}, {"kdim": 5, "batch_first": True}])
def test_there_and_back_is_the_identity(options, trained):
    dense = nn.MultiheadAttention(12, 3, dropout=0.1, **options).eval()
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name in trained)
    back = convert_(convert_(copy.deepcopy(dense), KEEP_ALL).model, ToDense()).model
    assert type(back) is nn.MultiheadAttention
    assert vars(back).keys() == vars(dense).keys()
    ours, theirs = dict(back.named_parameters()), dict(dense.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert torch.equal(ours[name], parameter), name
        assert ours[name].requires_grad == parameter.requires_grad, name
    for name in ("dropout", "batch_first", "num_heads", "kdim", "vdim", "training", "_qkv_same_embed_dim"):
        assert getattr(back, name) == getattr(dense, name), name


def test_the_four_projections_share_the_budget():
    done = convert_(nn.MultiheadAttention(40, 4, kdim=8), ToSparse(density=0.1))
    attention = done.model
    assert done.changed == {"": "MultiheadAttention -> SparseAttention"}
    layers = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    assert sum(layer.weights for layer in layers) == round(0.1 * (3 * 40 * 40 + 40 * 8))
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(40, 40), (8, 40), (40, 40), (40, 40)]
    assert "num_heads=4, dropout=0, batch_first=False" in repr(attention)


def test_a_projection_may_be_dense():
    dense, sparse = pair(batch_first=True)
    convert_(sparse, ToDense(), where=lambda name, _: name in ("q_proj", "out_proj"))
    assert isinstance(sparse, SparseAttention)
    assert isinstance(sparse.q_proj, nn.Linear)
    x = torch.randn(2, 5, 12)
    assert_same(sparse(x, x, x), dense(x, x, x))
    back = convert_(sparse, ToDense(), where=lambda name, _: name == "").model
    assert torch.equal(back.in_proj_weight, dense.in_proj_weight)


def test_what_has_no_sparse_form_is_left_with_the_reason():
    class Special(nn.MultiheadAttention):
        pass

    hooked = nn.MultiheadAttention(12, 3)
    hooked.out_proj.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "bias_k": nn.MultiheadAttention(12, 3, add_bias_kv=True),
            "zero": nn.MultiheadAttention(12, 3, add_zero_attn=True),
            "special": Special(12, 3),
            "hooked": hooked,
            "fine": nn.MultiheadAttention(12, 3),
        }
    )
    done = convert_(model, ToSparse(density=0.5))
    assert set(done.changed) == {"fine"}
    assert {name: why.split(" (")[0] for name, why in done.left.items()} == {
        "bias_k": "it has bias_k and bias_v",
        "zero": "it has add_zero_attn",
        "special": "Special is not a plain nn.MultiheadAttention",
        "hooked": "it has hooks, which would be lost",
    }
    assert "(648 numbers" in done.left["bias_k"]
    x = torch.randn(2, 5, 12)
    for module in model.eval().values():
        with torch.no_grad():
            assert module(x, x, x)[0].shape == x.shape


def test_an_output_projection_alone_is_left_since_the_attention_reads_its_weight():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 3), "linear": nn.Linear(12, 12)})
    done = convert_(model, ToSparse(density=0.5), where=lambda name, _: name in ("attention.out_proj", "linear"))
    assert set(done.changed) == {"linear"}
    assert done.left["attention.out_proj"].startswith("nn.MultiheadAttention reads its weight itself")
    assert done.left["attention"].startswith("where= leaves it out")


def test_tied_projections_are_left_so_that_the_tie_holds():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 3), "linear": nn.Linear(12, 12)})
    model["linear"].weight = model["attention"].out_proj.weight
    model["other"] = nn.Linear(12, 12)
    done = convert_(model, ToSparse(density=0.5))
    assert set(done.changed) == {"other"}
    assert done.left["attention"].startswith("its weight is tied to linear")
    assert model["linear"].weight is model["attention"].out_proj.weight


def test_measure_first_leaves_a_tiny_attention_dense():
    with pytest.warns(UserWarning, match="changed nothing"):
        done = convert_(
            nn.ModuleList([nn.MultiheadAttention(4, 2)]), ToSparse(density=1.0, measure_first=True, batch=2)
        )
    assert done.left["0"].startswith("dense is faster: ")


def test_hooks_are_not_lost_on_the_way_back():
    model = nn.ModuleList([convert_(nn.MultiheadAttention(12, 3), ToSparse(density=0.5)).model])
    model[0].k_proj.register_forward_hook(lambda *_: None)
    done = convert_(model, ToDense())
    assert set(done.left) == {"0", "0.k_proj"}
    assert isinstance(model[0], SparseAttention)
