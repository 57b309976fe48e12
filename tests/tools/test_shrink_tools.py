"""`shrink` on models of transformers, and beside Torch-Pruning where that works."""

import copy

import pytest
import torch
from torch import nn

from noctule import ToSparse, convert_
from noctule.compress.shrink import rebuild, shrink
from noctule.compress.shrink.following import Following
from noctule.models import ViT, mobilenet, resnet

transformers = pytest.importorskip("transformers")
Conv1D = transformers.pytorch_utils.Conv1D
IDS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **SIZES))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **SIZES))


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    sizes = {"image_size": 12, "patch_size": 4, "num_channels": 1}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **SIZES))


MODELS = {
    "bert": (bert, {"input_ids": IDS}),
    "gpt2": (gpt2, {"input_ids": IDS, "use_cache": False}),
    "llama": (llama, {"input_ids": IDS, "use_cache": False}),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS[:, :5], "use_cache": False}),
    "vit": (vit, {"pixel_values": torch.rand(2, 1, 12, 12)}),
}


@pytest.mark.parametrize("some_sparse", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_half_of_heads_and_widths_go_and_a_record_rebuilds_it(name, some_sparse):
    make, example = MODELS[name]

    def made() -> nn.Module:
        torch.manual_seed(0)
        model = make().eval()
        if some_sparse:
            layers = [
                n
                for n, m in model.named_modules()
                if isinstance(m, nn.Linear | Conv1D) and "attention" not in n.lower() and "head" not in n
            ]
            fifth = set(layers[:: max(1, len(layers) // 4)])
            model = convert_(model, ToSparse(density=0.5), where=lambda n, m: n in fifth).model if fifth else model
        return model

    model = made()
    before = sum(p.numel() for p in model.parameters())
    result = shrink(model, 0.5, example=example)
    assert len(result) >= 6
    assert sum(p.numel() for p in model.parameters()) < 0.9 * before
    logits = model(**example).logits
    assert bool(logits.isfinite().all())
    logits.sum().backward()
    again = made()
    rebuild(again, result.record)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(**example).logits, logits)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_a_head_whose_values_are_zero_can_go(name):
    make, example = MODELS[name]
    torch.manual_seed(0)
    model = make().double().eval()
    example = {
        k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in example.items()
    }
    part = {"bert": "value", "gpt2": "c_attn", "llama": "v_proj", "t5": "SelfAttention.v", "vit": "v_proj"}[name]
    layer = next(n for n, m in model.named_modules() if n.endswith(part))
    module = model.get_submodule(layer)
    with torch.no_grad():
        if name == "gpt2":  # (I, 3 O), of four heads
            module.weight[:, 64:72] = 0.0
            module.bias.uniform_(-1.0, 1.0)
            keep = torch.tensor([i for i in range(96) if i % 32 >= 8])
        else:
            heads = 2 if name == "llama" else 4
            each = module.weight.shape[0] // heads
            for n, m in model.named_modules():  # T5's position bias ties the heads of all blocks
                if n == layer or (name == "t5" and n.startswith("encoder") and n.endswith(part)):
                    m.weight[:each] = 0.0
            if module.bias is not None:
                module.bias.uniform_(-1.0, 1.0)
            keep = torch.arange(each, module.weight.shape[0])
    before = model(**example).logits
    result = shrink(model, {layer: keep}, example=example)
    assert not result.inexact
    torch.testing.assert_close(model(**example).logits, before, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vit"])
def test_as_many_parameters_stay_as_with_torch_pruning(name):
    pruning = pytest.importorskip("torch_pruning")
    make = {
        "resnet": lambda: resnet((1, 12, 12), 10, depth=8),
        "mobilenet": lambda: mobilenet((1, 12, 12), 10),
        "vit": lambda: ViT((1, 12, 12), 10, width=32, depth=2),
    }[name]
    torch.manual_seed(0)
    ours, x = make().eval(), torch.rand(2, 144)
    theirs = copy.deepcopy(ours)
    linears = [m for m in theirs.modules() if isinstance(m, nn.Linear)]
    attention = [m for n, m in theirs.named_modules() if n.endswith(("query", "key", "value"))]
    heads = {"num_heads": dict.fromkeys(attention, 4), "prune_num_heads": True, "prune_head_dims": False}
    pruner = pruning.pruner.BasePruner(
        theirs,
        x,
        importance=pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=linears[-1:],
        **({**heads, "head_pruning_ratio": 0.5} if attention else {}),
    )
    pruner.step()
    shrink(ours, 0.5, example=x)
    shapes = [[tuple(p.shape) for p in model.parameters()] for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18", "mobilenet", "vit"])
def test_the_same_lines_go_together_as_with_torch_pruning(name):
    pruning = pytest.importorskip("torch_pruning")
    make = {
        "mobilenet": lambda: mobilenet((1, 12, 12), 10),
        "vit": lambda: ViT((1, 12, 12), 10, width=32, depth=2),
    }.get(name, lambda: resnet((1, 12, 12), 10, depth=int(name[6:])))
    torch.manual_seed(0)
    model, x = make().eval(), torch.rand(2, 144)
    modules = dict(model.named_modules())
    names = {id(m): n for n, m in [*modules.items(), *model.named_parameters()]}
    following, theirs = Following(model, x), pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    assert len(following.groups) >= 5
    for number, group in enumerate(following.groups):
        unit = group.members[group.producers[0]][1].tolist()
        second = torch.tensor([u == 1 for u in range(group.units)])
        cut = following.removal({number: second}, {}).step["cut"]
        ours = {
            (
                tensor.rpartition(".")[0] or tensor,
                "out" if dimension == "0" else "in",
                tuple(i for i in range(c["of"]) if i not in c["kept"]),
            )
            for tensor, dimensions in cut.items()
            for dimension, c in dimensions.items()
            if tensor.endswith(".weight") or "." not in tensor
        }
        layer = modules[group.layers[0]]
        prune = theirs.get_pruner_of_module(layer).prune_out_channels
        expected = set()
        for dependency, lines in theirs.get_pruning_group(layer, prune, idxs=unit):
            target, there = dependency.target.module, names.get(id(dependency.target.module), "")
            if isinstance(target, nn.Parameter):
                expected.add((there, "in", tuple(sorted(lines))))
            elif there and list(target.parameters(recurse=False)):
                out = theirs.is_out_channel_pruning_fn(dependency.handler)
                expected.add((there, "out" if out else "in", tuple(sorted(lines))))
        assert ours == expected
