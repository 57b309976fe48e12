"""Converted models in torch's distributed checkpoints."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tools_cases import assert_same_state, build, samples
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from noctule import attach, set_

pytestmark = pytest.mark.filterwarnings("ignore")


def train(model, optimizer, batches):
    for sample in batches:
        optimizer.zero_grad()
        model(**{name: x[None] for name, x in sample.items()}).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_resumed_is_never_stopped(name, tmp_path):
    model, other = build(name).eval(), build(name, seed=1).eval()
    optimizer, other_optimizer = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, other))
    data = samples(name)
    with attach(model, optimizer, set_(every=1)) as session:
        train(model, optimizer, data[:4])
        state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
        kept = session.state_dict()
        train(model, optimizer, data[4:8])
    with attach(other, other_optimizer, set_(every=1)) as session:
        state, optimizer_state = get_state_dict(other, other_optimizer)
        dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
        set_state_dict(other, other_optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
        session.load_state_dict(kept)
        train(other, other_optimizer, data[4:8])
    assert_same_state(other, model)


@pytest.mark.parametrize("way", ["plain", "async"])
def test_the_model_alone(way, tmp_path):
    model, other = build("bert"), build("bert", seed=1)
    if way == "plain":
        dcp.save(model.state_dict(), checkpoint_id=tmp_path)
    else:
        dcp.async_save(model.state_dict(), checkpoint_id=tmp_path).result()
    state = other.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    other.load_state_dict(state)
    assert_same_state(other, model)
