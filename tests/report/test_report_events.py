"""TensorBoard sees the scalars of the metrics, series by series, and forgets what a resumed run does again."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st
from made_up import law
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from noctule.report import RunFolder, events


def read(run: RunFolder, series: str) -> EventAccumulator:
    return EventAccumulator(str(run.path / "tensorboard" / series)).Reload()


def test_every_number_is_a_tag_of_its_series(make_run):
    layers = {"0": {"weights": 10, "places": 100, "moved": 3}}
    run = make_run(
        records=[
            {"series": "sparse", "epoch": 1, "step": 40, "train_loss": 0.5, "layers": layers, "note": "x", "ok": True},
            {"series": "sparse", "epoch": 2, "step": 80, "train_loss": float("nan")},
            {"series": "dense", "epoch": 3, "train_loss": 0.25},
        ]
    )
    sparse, dense = read(run, "sparse"), read(run, "dense")
    assert set(sparse.Tags()["scalars"]) == {"train_loss", "layers/0/weights", "layers/0/places", "layers/0/moved"}
    assert [(event.step, event.value) for event in sparse.Scalars("train_loss")] == [(40, 0.5)]
    assert [(event.step, event.value) for event in dense.Scalars("train_loss")] == [(3, 0.25)]


def test_events_are_readable_before_the_run_is_closed(make_run):
    run = make_run(records=[])
    assert not (run.path / "tensorboard").exists()
    run.log({"series": "sparse", "step": 1, "train_loss": 0.5})
    assert read(run, "sparse").Scalars("train_loss")[0].value == 0.5
    run.close()


def test_a_resumed_run_hides_what_it_does_again(make_run):
    run = make_run(records=[{"series": "sparse", "step": step, "loss": 1.0} for step in (1, 2, 3, 4)])
    with RunFolder(run.path) as again:
        again.truncate_metrics(lambda record: record["step"] <= 2)
        for step in (3, 4, 5):
            again.log({"series": "sparse", "step": step, "loss": 2.0})
    events_ = read(run, "sparse").Scalars("loss")
    assert [(event.step, event.value) for event in events_] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert [(r["step"], r["loss"]) for r in run.metrics()] == [(e.step, e.value) for e in events_]


@law
@given(st.text(min_size=1), st.text(min_size=1))
def test_series_never_leave_their_folder_nor_share_one(a, b):
    for name in (a, b):
        folder = events.folder_name(name)
        assert "/" not in folder
        assert "\\" not in folder
        assert "\0" not in folder
        assert not folder.startswith(".")
    assert (a == b) == (events.folder_name(a) == events.folder_name(b))


WITHOUT = """
import sys, warnings
sys.modules["tensorboard"] = None  # what Python itself notes for a module that cannot be imported
from noctule.report import RunFolder
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with RunFolder.create(sys.argv[1], recipe="r", options={}, seed=0) as run:
        run.log({"series": "sparse", "step": 1, "loss": 1.0})
        run.log({"series": "dense", "step": 1, "loss": 1.0})
ours = [str(w.message) for w in caught if "TensorBoard" in str(w.message)]
assert len(ours) == 1 and "pip install tensorboard" in ours[0], ours
assert len(run.metrics()) == 2 and not (run.path / "tensorboard").exists()
"""


def test_without_tensorboard_the_run_goes_on_and_says_so_once(tmp_path):
    environment = {"PYTHONPATH": ":".join(sys.path)}
    python = [sys.executable, "-c", WITHOUT, str(tmp_path / "run")]
    done = subprocess.run(python, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
