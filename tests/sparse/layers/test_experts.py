"""Fused experts of Hugging Face's mixtures as sparse layers: laws against the dense module that is masked to the same places."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from noctule.core.convert import convert_
from noctule.core.method import attach
from noctule.sparse.layers import SparseExperts, SparseLinear, ToDense, ToSparse
from noctule.sparse.rewire import gse, rigl, set_

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
MIXTURE = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


def mixtral(hf, **options):
    return hf.MixtralForCausalLM(hf.MixtralConfig(**MIXTURE, num_local_experts=4, num_experts_per_tok=2, **options))


def qwen(hf):
    sizes = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**MIXTURE, **sizes, num_experts=5, num_experts_per_tok=3))


def gpt_oss(hf):  # transposed, with biases, a gate of its own
    config = hf.GptOssConfig(**MIXTURE, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    model = hf.GptOssForCausalLM(config)
    for layer in model.model.layers:
        nn.init.normal_(layer.mlp.experts.gate_up_proj_bias)
        nn.init.normal_(layer.mlp.experts.down_proj_bias)
    return model


def deepseek(hf):
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4}
    groups = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**MIXTURE, **ranks, **groups, moe_intermediate_size=12))


def nemotron(hf):  # without a gate
    module = hf.models.nemotron_h.modeling_nemotron_h.NemotronHExperts
    config = hf.NemotronHConfig(**SIZES, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
    config._experts_implementation = "eager"
    experts = module(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


def pairs(sparse: nn.Module, dense: nn.Module):
    """Each sparse module of experts beside the dense one in its place."""
    places = dict(dense.named_modules())
    return [(m, places[name]) for name, m in sparse.named_modules() if isinstance(m, SparseExperts)]


def assert_gradients_are_those_of(sparse: SparseExperts, dense: nn.Module):
    up = "gate_up_proj" if sparse.has_gate else "up_proj"
    for name, layers in ((up, sparse.up), ("down_proj", sparse.down)):
        for expert, layer in enumerate(layers):
            right = dense.get_parameter(name).grad[expert]
            right = right.t() if sparse.is_transposed else right
            torch.testing.assert_close(layer.values.grad, right.flatten()[layer.topology.keys()], atol=1e-5, rtol=1e-4)
            if sparse.has_bias:
                right = dense.get_parameter(f"{name}_bias").grad[expert]
                torch.testing.assert_close(layer.bias.grad, right, atol=1e-5, rtol=1e-4)


MODELS = [mixtral, qwen, gpt_oss, deepseek]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("make", MODELS)
def test_a_mixture_is_the_dense_one_masked_to_the_same_places(make, implementation, hf):
    torch.manual_seed(0)
    sparse = make(hf)
    done = convert_(sparse, ToSparse(density=0.4, fresh=False))
    assert any(text.endswith("-> SparseExperts") for text in done.changed.values())
    assert not any("experts" in name for name in done.left)
    dense = copy.deepcopy(sparse)
    convert_(dense, ToDense())
    dense.set_experts_implementation(implementation)
    ids = torch.randint(3, 40, (2, 9))
    outputs = [model(input_ids=ids, labels=ids) for model in (sparse, dense)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=1e-4)
    for output in outputs:
        output.loss.backward()
    found = pairs(sparse, dense)
    assert found
    for pair in found:
        assert_gradients_are_those_of(*pair)
    theirs = dict(dense.named_parameters())
    same = [name for name, p in sparse.named_parameters() if name in theirs and p.shape == theirs[name].shape]
    assert any("gate" in name or "router" in name for name in same)
    for name in same:
        if theirs[name].grad is not None:
            torch.testing.assert_close(sparse.get_parameter(name).grad, theirs[name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", MODELS)
def test_there_and_back_is_the_identity(make, hf):
    dense = make(hf)
    sparse = copy.deepcopy(dense)
    convert_(sparse, ToSparse(density=1.0, fresh=False))
    convert_(sparse, ToDense())
    assert [(n, type(m)) for n, m in sparse.named_modules()] == [(n, type(m)) for n, m in dense.named_modules()]
    ours, theirs = dict(sparse.named_parameters()), dict(dense.named_parameters())
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert torch.equal(ours[name], parameter), name
        assert ours[name].stride() == parameter.stride(), name
    ids = torch.randint(3, 40, (2, 9))
    assert torch.equal(sparse.eval()(ids).logits, dense.eval()(ids).logits)


def test_experts_without_a_gate_and_without_tokens(hf):
    dense = nemotron(hf)
    sparse = convert_(copy.deepcopy(dense), ToSparse(density=0.5, fresh=False)).model
    assert isinstance(sparse, SparseExperts)
    twin = convert_(copy.deepcopy(sparse), ToDense()).model
    assert type(twin) is type(dense)
    x, index = torch.randn(6, dense.hidden_dim if hasattr(dense, "hidden_dim") else 16), torch.tensor([[0, 3]] * 6)
    weights = torch.rand(6, 2)
    inputs = [(x.clone().requires_grad_(), weights.clone().requires_grad_()) for _ in range(2)]
    results = [model(a, index, w) for model, (a, w) in zip((sparse, twin), inputs)]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
    for result in results:
        result.square().sum().backward()
    for ours, theirs in zip(*inputs):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    assert_gradients_are_those_of(sparse, twin)
    assert all(not layer.values.grad.any() for layer in (sparse.up[1], sparse.down[2]))
    with torch.no_grad():
        torch.testing.assert_close(sparse(x, index, weights), results[0])
        nobody = torch.tensor([[0, 4]] * 6)  # an expert that is not here
        torch.testing.assert_close(sparse(x, nobody, weights), sparse(x, nobody[:, :1], weights[:, :1]))


def test_a_budget_spans_experts_and_other_layers(hf):
    model = mixtral(hf)
    convert_(model, ToSparse(weights=5000))
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert sum(layer.weights for layer in layers) == 5000
    experts = [m for m in model.modules() if isinstance(m, SparseExperts)]
    assert sum(isinstance(m, SparseLinear) for each in experts for m in each.modules()) == 2 * 4 * 2


@pytest.mark.parametrize("method", [set_, partial(rigl, until=20), gse], ids=["set", "rigl", "gse"])
def test_a_sparse_mixture_learns_while_its_connections_move(method, hf):
    torch.manual_seed(0)
    model = mixtral(hf)
    convert_(model, ToSparse(density=0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(3, 40, (2, 9))
    before = {n: m.topology for n, m in model.named_modules() if isinstance(m, SparseLinear) and ".experts." in n}
    losses = []
    with attach(model, optimizer, method(every=2)):
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert any(model.get_submodule(name).topology != topology for name, topology in before.items())


def test_copies_pickles_and_states(hf):
    torch.manual_seed(0)
    model, other = mixtral(hf).eval(), mixtral(hf).eval()
    for each in (model, other):
        convert_(each, ToSparse(density=0.3))
    ids = torch.randint(3, 40, (2, 9))
    expected = model(ids).logits
    other.load_state_dict(model.state_dict())
    for again in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model.model.layers[0].mlp)) and other):
        assert torch.equal(again(ids).logits, expected)
    assert model.double()(ids).logits.dtype is torch.float64


def test_what_is_listened_to_or_shared_out_stays(hf):
    experts = mixtral(hf).model.layers[0].mlp.experts
    model = nn.ModuleList([experts, nn.Linear(4, 4)])
    experts.act_fn.register_forward_hook(lambda *_: None)
    assert "hooks" in convert_(model, ToSparse(density=0.5)).left["0"]
    experts = mixtral(hf).model.layers[0].mlp.experts
    experts._is_expert_parallel = True
    assert "several processes" in convert_(nn.ModuleList([experts, nn.Linear(4, 4)]), ToSparse(density=0.5)).left["0"]


def test_experts_of_an_unknown_kind_are_named():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Parameter(torch.randn(4, 16, 8)), nn.Linear(8, 2)

    left = convert_(Own(), ToSparse(density=0.5)).left
    reason = "Own reads its first (4, 16, 8) in a forward of its own, which knows dense weights only"
    assert left == {"": f"{reason} (512 numbers, 98.1% of the model)"}
