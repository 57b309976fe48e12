"""The comparison of ways to prune runs from its options to its table, and goes on where it was."""

import json

import pytest
from torch.nn import functional as F

from noctule.compress.prune import EarlyCroP, sup_tickets
from noctule.core.errors import UsageError
from noctule.data import Batches, load
from noctule_bench import pruning
from noctule_bench.program import run as bench

SMALL = (
    "--data digits --channels 6 8 --hidden 20 --epochs 2 --densities 0.2 --threads 1 --seeds 0 --samples 400".split()
)


def run(capsys, *options: str):
    assert bench("pruning", [*SMALL, *options]) == 0
    captured = capsys.readouterr()
    kinds = {}
    for line in map(json.loads, captured.out.splitlines()):
        kinds.setdefault(line["name"], []).append(line)
    return kinds, captured.err


def test_it_compares_and_goes_on_where_it_was(capsys, tmp_path):
    out = tmp_path / "pruning.jsonl"
    kinds, tables = run(capsys, "--methods", "dense", "gradual", "--out", str(out))
    dense, gradual = kinds["pruning"]
    assert dense["kept"] == 1.0
    assert dense["cost_epochs"] == pytest.approx(2.0)
    assert gradual["weights"] == round(0.2 * gradual["places"])
    assert 0.2 * 2 < gradual["cost_epochs"] < 2.0
    difference = kinds["pruning.row"][1]["against"]["dense"]["difference_points"]
    assert difference == pytest.approx(100 * (gradual["accuracy"] - dense["accuracy"]))
    assert "gradual" in tables
    again, _ = run(capsys, "--methods", "dense", "gradual", "gap", "--out", str(out))
    assert [line["method"] for line in again["pruning"]] == ["gap"]


@pytest.mark.slow
def test_every_method_keeps_what_it_is_given(capsys):
    kinds, _ = run(capsys)
    lines = {line["method"]: line for line in kinds["pruning"]}
    assert {*lines} == {*pruning.METHODS}
    for method, line in lines.items():
        if method not in pruning.FREE:
            assert line["kept"] == pytest.approx(0.2, abs=0.01)
    assert lines["gradual-scl"]["kept"] == pytest.approx(lines["scl"]["kept"], abs=0.01)
    assert lines["sup-tickets"]["cost_epochs"] == pytest.approx(0.4, abs=0.02)


def test_the_rate_begins_anew_after_a_crop_and_in_each_cycle():
    batches = Batches(load("digits", seed=0).train, 100, seed=0)
    setting = pruning.Setting(0.1, 20, 20 * len(batches), batches, 0, 0.5)
    crop = EarlyCroP(density=0.1, loss_fn=F.cross_entropy, batches=batches.epoch(0), every=1)
    rate, end = pruning._rate(setting, [crop]), setting.steps
    assert (rate(0), rate(end)) == pytest.approx((1.0, 0.01))
    at = end // 2
    before, crop.pruned_at = rate(at + end // 10), at
    assert rate(at) == pytest.approx(0.1)  # weights that lost most others are not to jump
    assert rate(at + end // 10) > before + 0.2
    assert rate(end) == pytest.approx(0.01)
    _, tickets = own = sup_tickets(**setting.cycles)
    rate = pruning._rate(setting, own)
    for start in range(tickets.start, tickets.start + 3 * tickets.cycle, tickets.cycle):
        assert (rate(start), rate(start + tickets.cycle // 2)) == pytest.approx(pruning.TICKETS, abs=0.05)


def test_unknown_methods_are_refused():
    with pytest.raises(UsageError, match="there is no row 'gradul'"):
        bench("pruning", [*SMALL, "--methods", "gradul"])
    with pytest.raises(UsageError, match="give --channels two numbers, not 3"):
        bench("pruning", [*SMALL, "--channels", "1", "2", "3"])
