"""A converted model under Lightning."""

import pytest
import torch
from tools_cases import assert_same_state, build, samples
from torch.utils.data import DataLoader

from noctule import attach, set_

L = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(L.LightningModule):
    def __init__(self, name, seed=0, manual=False):
        super().__init__()
        self.model = build(name, seed).eval()
        self.automatic_optimization = not manual

    def training_step(self, batch, _):
        loss = self.model(**batch).loss
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Attached(L.Callback):
    def __init__(self):
        self.session, self.restored = None, None

    def on_train_start(self, trainer, module):
        self.session = attach(module, trainer.optimizers, set_(every=1))
        if self.restored is not None:
            self.session.load_state_dict(self.restored)

    def on_train_end(self, trainer, module):
        self.session.close()

    def state_dict(self):
        return self.session.state_dict()

    def load_state_dict(self, state):
        self.restored = state


def fit(module, name, folder, steps, path=None, callbacks=(), **options):
    attached = Attached()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks, attached],
        **options,
    )
    trainer.fit(module, DataLoader(samples(name, 12), batch_size=4), ckpt_path=path)
    return attached.session


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_resumed_is_never_stopped(name, manual, tmp_path):
    # a checkpoint at the end of an epoch: within one, Lightning begins the data anew
    keep = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    whole, resumed = Module(name, manual=manual), Module(name, seed=1, manual=manual)
    assert fit(whole, name, tmp_path, 6, callbacks=[keep]).steps == 6
    session = fit(resumed, name, tmp_path, 6, path=tmp_path / "step=3.ckpt", enable_checkpointing=False)
    assert session.steps == 6
    assert_same_state(resumed, whole)
    loaded = Module.load_from_checkpoint(tmp_path / "step=6.ckpt", name=name, seed=2)
    assert_same_state(loaded, whole)


def test_micro_batches_are_no_steps(tmp_path):
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "enable_checkpointing": False}
    assert fit(Module("bert"), "bert", tmp_path, 4, **options).steps == 4


def test_bfloat16(tmp_path):
    assert fit(Module("bert"), "bert", tmp_path, 2, precision="bf16-mixed", enable_checkpointing=False).steps == 2


@pytest.mark.parametrize("kind", ["WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"])
def test_an_average_that_does_not_follow_stops_with_the_remedy(kind, tmp_path):
    make = getattr(L.pytorch.callbacks, kind, None)
    if make is None:
        pytest.skip(f"this Lightning has no {kind}")
    callback = make(swa_lrs=0.01, swa_epoch_start=1) if kind.startswith("Stoch") else make()
    with pytest.raises(RuntimeError, match="Attach ExponentialAverage"):
        fit(Module("bert"), "bert", tmp_path, 40, callbacks=[callback], max_epochs=5, enable_checkpointing=False)
