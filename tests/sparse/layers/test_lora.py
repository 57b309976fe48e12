"""LoRA of `peft` on sparse layers: only the adapters train, and the base is what it was."""

import copy

import pytest
import torch
from torch import nn

from noctule.core.convert import convert_
from noctule.sparse.layers import FuseEpilogue, SparseConv2d, SparseLinear, ToDense, ToSparse

peft = pytest.importorskip("peft")

import noctule  # noqa: E402, F401
from noctule.sparse.layers.lora import LoraSparseLinear  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Failed to load", "ignore:Could not find a config file")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.head = nn.Linear(12, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.v_proj(torch.relu(self.q_proj(x)))))


def sparse_model() -> Model:
    torch.manual_seed(0)
    return convert_(Model(), ToSparse(density=0.3)).model  # type: ignore[return-value]


def config(**options):
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=3, **options)


def trained(model: nn.Module, steps: int = 5) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    return model


X = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))


def layer_of(model: nn.Module, name: str = "q_proj") -> LoraSparseLinear:
    layer = model.base_model.model.get_submodule(name)
    assert isinstance(layer, LoraSparseLinear)
    return layer


@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.1}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}]
)
def test_adapters_train_on_a_frozen_base(options):
    base = sparse_model()
    model = peft.get_peft_model(copy.deepcopy(base), config(**options))
    assert torch.equal(model(X), base(X))
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    trained(model)
    assert not torch.allclose(model.eval()(X), base(X))
    for name in ("q_proj", "v_proj"):
        ours, theirs = layer_of(model, name).base_layer, base.get_submodule(name)
        assert ours.topology == theirs.topology
        assert torch.equal(ours.values, theirs.values)
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))
    unloaded = model.unload()
    assert isinstance(unloaded.q_proj, SparseLinear)
    assert torch.equal(unloaded(X), base(X))


def test_an_adapted_layer_is_the_adapted_dense_one():
    base = sparse_model()
    sparse = peft.get_peft_model(copy.deepcopy(base), config(init_lora_weights=False))
    dense = peft.get_peft_model(convert_(copy.deepcopy(base), ToDense()).model, config(init_lora_weights=False))
    adapters = {n: p for n, p in sparse.state_dict().items() if "lora_" in n}
    dense.load_state_dict(adapters, strict=False)
    torch.testing.assert_close(sparse(X), dense(X))
    for model in (sparse, dense):
        model(X).square().sum().backward()
    theirs = dict(dense.named_parameters())
    for name in adapters:
        torch.testing.assert_close(sparse.get_parameter(name).grad, theirs[name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:a merged adapter fills every place")
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}])
@pytest.mark.parametrize("safe", [False, True])
def test_a_merged_layer_is_dense_and_an_unmerged_one_is_as_before(safe, options):
    options = {**options, "target_modules": ["q_proj"]}
    model = peft.get_peft_model(sparse_model(), peft.LoraConfig(r=3, **options))
    trained(model)
    expected = model(X).detach()
    model.merge_adapter(safe_merge=safe)
    assert type(layer_of(model).base_layer) is nn.Linear
    torch.testing.assert_close(model(X), expected)
    model.unmerge_adapter()
    assert isinstance(layer_of(model).base_layer, SparseLinear)
    assert torch.equal(model(X), expected)
    model.merge_adapter(safe_merge=safe)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), sparse_model()(X))
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged.q_proj) is nn.Linear
    assert isinstance(merged.v_proj, SparseLinear)
    torch.testing.assert_close(merged(X), expected)


def test_merging_says_that_the_layer_is_dense_then_and_refuses_what_is_not_finite():
    model = trained(peft.get_peft_model(sparse_model(), config()))
    with pytest.warns(UserWarning, match="merged layers are dense"):
        copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        layer_of(model).lora_B["default"].weight.fill_(torch.nan)
    with pytest.warns(UserWarning, match="dense"), pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert isinstance(layer_of(model).base_layer, SparseLinear)


@pytest.mark.filterwarnings("ignore:a merged adapter fills every place")
def test_several_adapters():
    model = peft.get_peft_model(sparse_model(), config(), adapter_name="first")
    trained(model)
    first = model(X).detach()
    model.add_adapter("second", config())
    model.set_adapter("second")
    trained(model, steps=9)
    second = model(X).detach()
    model.set_adapter("first")
    assert torch.equal(model(X), first)
    assert not torch.allclose(first, second)
    model.merge_adapter(["second"])
    torch.testing.assert_close(model(X), second)
    model.unmerge_adapter()
    model.delete_adapter("second")
    assert torch.equal(model(X), first)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["head"]}])
def test_adapters_are_saved_and_loaded(options, tmp_path):
    model = trained(peft.get_peft_model(sparse_model(), config(**options)))
    model.save_pretrained(tmp_path)
    again = peft.LoraConfig.from_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(sparse_model(), tmp_path, config=again)
    torch.testing.assert_close(loaded(X), model(X))
    assert not any(p.requires_grad for n, p in loaded.named_parameters())
    if options:
        assert isinstance(loaded.base_model.model.head.modules_to_save["default"], SparseLinear)


def test_what_cannot_be_is_refused_with_the_remedy():
    fused = convert_(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), ToSparse(density=0.5)).model
    convert_(fused, FuseEpilogue())
    with pytest.raises(ValueError, match="leave FuseEpilogue out"):
        peft.get_peft_model(fused, peft.LoraConfig(target_modules=["0"]))
    for options in ({"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}):
        with pytest.raises(ValueError, match="dense weight"):
            peft.get_peft_model(sparse_model(), config(**options))
    with pytest.raises(ValueError, match="variant"):
        peft.get_peft_model(sparse_model(), config(use_dora=True))
    images = nn.Sequential(SparseConv2d(2, 2, 3, density=0.5))
    with pytest.raises(ValueError, match="SparseLinear only"):
        peft.get_peft_model(images, peft.LoraConfig(target_modules=["0"]))


def test_a_model_with_adapters_is_converted_first():
    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["q_proj"], r=3))
    before = copy.deepcopy(model)
    done = convert_(model, ToSparse(density=0.3))
    assert all("q_proj" not in name for name in done.changed)
    inside = [why for name, why in done.left.items() if "q_proj" in name]
    assert len(inside) == 3
    assert all("convert the model first, then call get_peft_model" in why for why in inside)
    for name, parameter in before.base_model.model.q_proj.named_parameters():
        assert torch.equal(model.base_model.model.q_proj.get_parameter(name), parameter)


@pytest.mark.filterwarnings("ignore:a merged adapter fills every place")
def test_gpt2_is_adapted_and_comes_back():
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    base = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **quiet))
    convert_(base, ToSparse(density=0.4))
    ids = torch.randint(3, 40, (2, 8))
    expected = base(ids).logits
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True)  # targets are GPT-2's own
    model = peft.get_peft_model(base, lora)
    assert torch.equal(model(input_ids=ids).logits, expected)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    learnt = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    assert isinstance(merged.transformer.h[0].attn.c_attn, hf.pytorch_utils.Conv1D)
    torch.testing.assert_close(merged(input_ids=ids).logits, learnt, atol=1e-5, rtol=1e-4)
