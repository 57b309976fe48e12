import signal
import threading
import time

import pytest
import torch
from torch import nn

from exchange_cases import together
from noctule import FuseEpilogue, RunFolder, SparseLinear, ToSparse, convert_, evaluate, fit, gse, mlp, param_groups
from noctule.core.errors import CheckpointError, NonFiniteError
from noctule.core.exchange import Channel
from noctule.core.method import Method
from noctule.data import Batches, Dataset
from noctule.parallel import DiLoCo
from noctule.report import Journal
from noctule.train.interrupt import deferred_interrupt

DRAWING = threading.Lock()


@pytest.fixture(scope="module")
def toy() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 12, generator=generator)
    return Dataset(inputs, (inputs[:, 0] + inputs[:, 1] > 0).long(), name="toy", classes=2)


class StopAt(Method):
    """Ctrl-C at a step, as a person would: a signal, not an exception of ours."""

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def after_step(self) -> None:
        self.seen += 1
        if self.seen == self.step:
            signal.raise_signal(signal.SIGINT)


class Stops(Method):
    """A second method in the same place, so that sessions have the same shape."""


def training(dropout: float = 0.2):
    torch.manual_seed(1)
    model = mlp(12, 32, 32, 2, dropout=dropout)
    convert_(model, ToSparse(density=0.3))
    convert_(model, FuseEpilogue())
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    return model, optimizer, scheduler


def run(toy, journal=None, *, stop=None, epochs=4, **options):
    model, optimizer, scheduler = training()
    extra = StopAt(stop) if stop else Stops()
    extra.__class__.__name__ = "Extra"
    fitted = fit(
        model,
        optimizer,
        Batches(toy, 32, seed=3),
        validation=toy,
        epochs=epochs,
        methods=[gse(every=5), extra],
        scheduler=scheduler,
        journal=journal,
        **options,
    )
    return model, fitted


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def journal(path) -> Journal:
    path = path / "run"
    folder = RunFolder(path) if path.exists() else RunFolder.create(path, recipe="test", options={}, seed=0)
    return Journal(folder, "sparse")


def test_it_learns_and_reports(toy, tmp_path):
    kept = journal(tmp_path)
    model, fitted = run(toy, kept)
    assert fitted.epoch == 4
    assert fitted.step == 4 * 7
    assert evaluate(model, toy)[1] > 0.7
    records = kept.run.metrics()
    assert [r["epoch"] for r in records] == [1, 2, 3, 4]
    assert records[-1]["validation_accuracy"] == evaluate(model, toy)[1]
    for record in records:
        layers = record["layers"]
        assert all(0 < layer["weights"] <= layer["places"] for layer in layers.values())
    moved = sum(layer["moved"] for r in records for layer in r["layers"].values())
    assert moved > 0
    assert fitted.best_accuracy == max(r["validation_accuracy"] for r in records)


@pytest.mark.parametrize("stop", [1, 7, 10, 27])
def test_resumed_is_never_stopped(toy, tmp_path, stop):
    whole, fitted = run(toy)
    kept = journal(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(toy, kept, stop=stop)
    resumed, again = run(toy, kept)
    assert same(whole, resumed)
    assert (again.best_accuracy, again.best_epoch, again.step) == (fitted.best_accuracy, fitted.best_epoch, fitted.step)
    assert [r["epoch"] for r in kept.run.metrics()] == [1, 2, 3, 4]


def test_a_record_whose_checkpoint_was_not_written_is_made_once(toy, tmp_path):
    kept = journal(tmp_path)
    run(toy, kept, epochs=2, checkpoint_seconds=0.0)
    first = kept.run.metrics()
    state = kept.checkpoints.latest()[
        1
    ]  # as if killed after the record of epoch 2: its last batch is done, the epoch is not
    state["progress"] |= {"epoch": 1, "batch": 7, "samples": len(toy)}
    kept.checkpoints.save(14, state)
    run(toy, kept, epochs=2)
    assert [r["epoch"] for r in kept.run.metrics()] == [r["epoch"] for r in first] == [1, 2]


def test_frequent_checkpoints_change_nothing(toy, tmp_path):
    whole, _ = run(toy)
    often, _ = run(toy, journal(tmp_path), checkpoint_seconds=0.0)
    assert same(whole, often)


def test_more_epochs_go_on_from_a_finished_training(toy, tmp_path):
    whole, _ = run(toy, epochs=4)
    kept = journal(tmp_path)
    run(toy, kept, epochs=2)
    assert same(whole, run(toy, kept, epochs=4)[0])


def test_a_checkpoint_of_another_training_is_refused(toy, tmp_path):
    kept = journal(tmp_path)
    run(toy, kept, epochs=1)
    model = mlp(12, 5, 2)
    with pytest.raises(CheckpointError, match="another training"):
        fit(
            model, torch.optim.SGD(model.parameters()), Batches(toy, 32, seed=3), validation=toy, epochs=2, journal=kept
        )


def test_a_torn_checkpoint_is_passed_over(toy, tmp_path):
    whole, _ = run(toy)
    kept = journal(tmp_path)
    run(toy, kept, epochs=3)
    newest = kept.checkpoints.path(kept.checkpoints.steps()[-1])
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="passed over"):
        resumed, _ = run(toy, kept)
    assert same(whole, resumed)


def test_a_nan_in_the_data_stops_before_the_weights(toy):
    class Poisoned:
        dataset, batch_size, drop_last = toy, 32, False

        def __len__(self):
            return 2

        def epoch(self, epoch, start=0):
            good = (toy.inputs[:32], toy.targets[:32])
            bad = good[0].clone()
            bad[3, 4] = float("nan")
            yield good
            yield bad, good[1]

    model, optimizer, _ = training()
    with pytest.raises(NonFiniteError, match=r"step 2: the input is NaN or infinite at \(3, 4\)"):
        fit(model, optimizer, Poisoned(), validation=toy, epochs=1)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_an_exploding_training_names_what_broke_and_keeps_the_last_good_checkpoint(toy, tmp_path):
    kept = journal(tmp_path)
    run(toy, kept, epochs=1)
    before = kept.checkpoints.latest()
    model, *_ = training()

    class Explode(Method):
        def before_step(self):
            for p in model.parameters():
                p.grad.fill_(1e38)

    with pytest.raises(NonFiniteError, match="step"):
        fit(
            model,
            torch.optim.SGD(model.parameters(), lr=1e38),
            Batches(toy, 32, seed=3),
            validation=toy,
            epochs=3,
            methods=[Explode()],
        )
    assert kept.checkpoints.latest()[0] == before[0]


def test_the_layer_whose_output_overflows_is_named(toy):
    model = nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match="the output of layer 0"):
        fit(model, torch.optim.SGD(model.parameters()), Batches(toy, 32, seed=0), validation=toy, epochs=1)


def test_evaluate_puts_the_mode_back_and_weighs_the_last_batch(toy):
    model = mlp(12, 8, 2, dropout=0.5)
    model.train()
    loss, accuracy = evaluate(model, toy, batch_size=64)
    assert model.training
    assert evaluate(model, toy, batch_size=200) == pytest.approx((loss, accuracy), rel=1e-5)


class Accuracies(nn.Module):
    """Any scores wanted: at each validation, the next fraction of the samples is right; one weight counts the steps."""

    def __init__(self, toy: Dataset, *right: float) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.zeros(1))
        self.toy, self.right = toy, list(right)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self.steps.expand(len(inputs), 2) * torch.tensor([1.0, 0.0])
        outputs = torch.zeros(len(inputs), 2) + self.steps
        right = torch.arange(len(inputs)) < self.right.pop(0) * len(inputs)
        outputs[torch.arange(len(inputs)), torch.where(right, self.toy.targets, 1 - self.toy.targets)] += 1
        return outputs


@pytest.mark.parametrize(
    ("right", "best"), [((0.9, 0.5, 0.7), 1), ((0.5, 0.9, 0.9), 2), ((0.5, 0.5, 0.5), 1), ((0.2, 0.4, 0.6), 3)]
)
def test_the_best_epoch_is_the_first_of_the_best_and_keeps_its_weights(toy, right, best):
    model, weights = Accuracies(toy, *right), []

    class Recorded(Batches):
        def epoch(self, epoch, start=0):
            yield from super().epoch(epoch, start)
            weights.append(model.steps.item())

    fitted = fit(
        model, torch.optim.SGD(model.parameters(), lr=0.1), Recorded(toy, 50, seed=0), validation=toy, epochs=3
    )
    assert fitted.best_epoch == best
    assert fitted.best_accuracy == pytest.approx(max(right))
    assert len(set(weights)) == 3
    assert fitted.best_state["steps"].item() == weights[best - 1]


def test_best_state_is_the_model_that_had_the_best_accuracy(toy):
    model, _, _ = training(dropout=0.0)
    fit(model, torch.optim.Adam(model.parameters(), 0.01), Batches(toy, 32, seed=3), validation=toy, epochs=5)
    worse = torch.optim.SGD(model.parameters(), lr=0.05, maximize=True)  # gets worse from epoch to epoch
    fitted = fit(model, worse, Batches(toy, 32, seed=3), validation=toy, epochs=4)
    assert fitted.best_accuracy > evaluate(model, toy)[1]
    model.load_state_dict(fitted.best_state)
    assert evaluate(model, toy)[1] == fitted.best_accuracy


def test_workers_that_meet_rarely_are_together_whenever_they_are_judged(toy):
    def work(path):
        with DRAWING:
            torch.manual_seed(0)
            model = mlp(12, 8, 2)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []

        class Judged(Method):
            def observe(self, **scores):
                losses.append(scores["validation_loss"])

        method = DiLoCo(Channel(path=path), every=7)  # ten steps an epoch
        fit(
            model,
            optimizer,
            Batches(toy, 20, seed=path.rank),
            validation=toy,
            epochs=3,
            methods=[method, Judged()],
        )
        return losses, [p.detach().clone() for p in model.parameters()]

    (losses, weights), (other_losses, other_weights) = together(2, work)
    assert len(set(losses)) == 3
    assert losses == other_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


def test_fit_works_outside_the_main_thread(toy):
    errors = []

    def work():
        try:
            run(toy, epochs=1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_a_second_interrupt_is_not_deferred_and_the_handler_comes_back():
    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupt() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGINT)
        assert asked()
        time.sleep(0.3)  # what comes sooner is an echo
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_is_left_on_the_model(toy):
    model, optimizer, _ = training()
    fit(model, optimizer, Batches(toy, 32, seed=0), validation=toy, epochs=1, methods=[gse(every=2)])
    for layer in model:
        if isinstance(layer, SparseLinear):
            assert layer.watch is None
            assert not layer._remap_checks
            assert not layer._remap_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
