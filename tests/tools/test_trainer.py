"""A converted model under transformers' Trainer: training stopped and resumed is training, and its folders hold the model."""

import copy

import pytest
import torch
from tools_cases import assert_same_state, build, function, samples

from noctule import attach, set_
from noctule.core.optim import sparse_layers

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
transformers = pytest.importorskip("transformers")


class Attached(transformers.TrainerCallback):
    """Opens a session round the training; it loads its own part of a checkpoint."""

    def __init__(self):
        self.session = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.session = attach(model, optimizer, set_(every=2, fraction=0.4))
        if args.resume_from_checkpoint:
            self.session.load_state_dict(torch.load(f"{args.resume_from_checkpoint}/session.pt"))

    def on_save(self, args, state, control, **kwargs):
        torch.save(self.session.state_dict(), f"{args.output_dir}/checkpoint-{state.global_step}/session.pt")

    def on_train_end(self, *args, **kwargs):
        self.session.close()


def train(name, model, folder, steps, resume=None, **options):
    callback = Attached()
    arguments = transformers.TrainingArguments(
        str(folder),
        **{
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "save_steps": 3,
            "lr_scheduler_type": "constant",
            "learning_rate": 1e-2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "resume_from_checkpoint": resume,
            **options,
        },
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=samples(name), eval_dataset=samples(name, 4), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return callback.session


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_resumed_is_never_stopped(name, tmp_path):
    whole, first = build(name), build(name)
    begun = copy.deepcopy(first)
    session = train(name, whole, tmp_path / "whole", 6)
    assert session.steps == 6
    assert any(a.topology != b.topology for a, b in zip(sparse_layers(whole).values(), sparse_layers(begun).values()))
    folder = str(tmp_path / "whole" / "checkpoint-3")
    resumed = build(name, seed=1)
    assert train(name, resumed, tmp_path / "resumed", 6, resume=folder).steps == 6
    assert_same_state(resumed, whole)
    loaded = type(whole).from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert_same_state(loaded, whole)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_micro_batches_are_no_steps(optimizer, tmp_path):
    model = build("bert")
    session = train("bert", model, tmp_path, 4, gradient_accumulation_steps=2, optim=optimizer, save_strategy="no")
    assert session.steps == 4


def test_the_best_model_comes_back_at_the_end(tmp_path):
    model = build("bert")
    train(
        "bert",
        model,
        tmp_path,
        6,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        eval_strategy="steps",
        eval_steps=3,
    )
    folders = [type(model).from_pretrained(tmp_path / f"checkpoint-{step}") for step in (3, 6)]
    assert any(torch.equal(function(folder), function(model)) for folder in folders)
