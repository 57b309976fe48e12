"""Each strategy of the list trains two workers from the command line; real processes."""

import json

import pytest

from noctule.team.strategies import names

OPTIONS = [
    *("--hidden", 16, "--density", 0.3, "--every", 5, "--batch", 256, "--epochs", 4, "--dropout", 0, "--compare", "none"),
    *("--workers", 2, "--threads", 1, "--learning-rate", 0.01),
]
OWN = {
    "diloco": ["--meet", 5],
    "local": ["--meet", 5, "--codec", "bf16"],
    "ssp": ["--bound", 2, "--server-rate", 0.05],
    "wasap": ["--server-rate", 0.02],
    "gossip": ["--meet", 2],
}
"""Options of some."""
MORE = {
    "sync on two levels": ["--per-machine", 2, "--codec", "natural"],
    "diloco in fragments": ["--strategy", "diloco", "--meet", 5, "--fragments", 2],
    "diloco overlapped": ["--strategy", "diloco", "--meet", 5, "--fragments", 2, "--overlap", 2, "--codec", "natural"],
}
CASES = {name: ["--strategy", name, *OWN.get(name, [])] for name in names()} | MORE


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_it_trains_two_workers(noctule_command, tmp_path, words):
    process = noctule_command("run", "sparse_mlp", *OPTIONS, *words, "--out", "run")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "warning" not in err
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["together"]["workers"] == 2
    for folder in (tmp_path / "run", tmp_path / "run" / "workers" / "1"):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["epoch"] for record in records] == [1, 2, 3, 4]
        assert records[-1]["together"]["sent_bytes"] > 0
        assert records[-1]["validation_loss"] < 2.2
    assert (tmp_path / "run" / "report.html").exists()
