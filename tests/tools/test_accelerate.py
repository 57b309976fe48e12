"""A converted model under accelerate."""

import pytest
import torch
from tools_cases import assert_same_state, build, function, samples

from noctule import attach, set_

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def forget_settings():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def prepared(name, seed=0, **options):
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = build(name, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(samples(name), batch_size=4)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def train(accelerator, model, optimizer, batches):
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_resumed_is_never_stopped(name, options, tmp_path):
    accelerator, model, optimizer, loader = prepared(name, **options)
    model.eval()  # no dropout: each run would draw its own
    batches = list(loader)
    with attach(model, optimizer, set_(every=1)) as session:
        train(accelerator, model, optimizer, batches[:4])
        accelerator.save_state(str(tmp_path / "state"))
        kept = session.state_dict()
        train(accelerator, model, optimizer, batches[4:])
    assert session.steps == 8 // options.get("gradient_accumulation_steps", 1)
    again, other, other_optimizer, _ = prepared(name, seed=1, **options)
    other.eval()
    with attach(other, other_optimizer, set_(every=1)) as session:
        session.load_state_dict(kept)
        again.load_state(str(tmp_path / "state"))
        train(again, other, other_optimizer, batches[4:])
    assert_same_state(again.unwrap_model(other), accelerator.unwrap_model(model))


@pytest.mark.filterwarnings("ignore:.* came without .*, their places")  # which are in a later file
@pytest.mark.parametrize("size", ["5GB", "5KB", "1KB"])
def test_weights_in_files(size, tmp_path):
    model = build("bert")
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path), max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or size == "5GB"
    other = build("bert", seed=1)
    accelerate.load_checkpoint_and_dispatch(other, str(tmp_path))
    assert torch.equal(function(other), function(model))
    assert_same_state(other, model)


def test_a_device_map_leads_through_from_pretrained(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="_extra_state"):
        accelerate.load_checkpoint_and_dispatch(build("bert", seed=1), str(tmp_path), device_map={"": "cpu"})
    for device_map in ("cpu", "auto", {"": "cpu"}):
        loaded = type(model).from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(function(loaded), function(model))


def test_a_part_on_disk_is_refused(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path)
    device_map = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    with pytest.raises(ValueError, match="load without an offload to disk"):
        type(model).from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "disk")
