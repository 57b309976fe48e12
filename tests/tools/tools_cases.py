"""Small converted models for the tools that train them; a test of a tool that is not installed is skipped."""

import pytest
import torch
from torch import nn

from noctule import ToSparse, convert_

VOCABULARY, LENGTH = 30, 6


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


MODELS = {"bert": bert, "gpt2": gpt2}


def build(name: str, seed: int = 0) -> nn.Module:
    """A converted model; another seed has other weights at other places."""
    torch.manual_seed(seed)
    return convert_(MODELS[name](), ToSparse(density=0.3)).model


def samples(name: str, count: int = 32) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row if name == "gpt2" else row[0] % 2} for row in ids]


def function(model: nn.Module) -> torch.Tensor:
    """What it says to the first samples, in evaluation."""
    training = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.stack([sample["input_ids"] for sample in samples("bert", 4)])).logits
    model.train(training)
    return logits


def assert_same_state(a: nn.Module, b: nn.Module):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
