"""`noctule bench link` from its options to its lines and its tables, in small."""

import json

import pytest

from noctule.core.errors import UsageError
from noctule.testing.link import available
from noctule_bench import link
from noctule_bench.program import run as bench


@pytest.mark.skipif(available() is not None, reason=str(available()))
def test_two_ways_and_the_automatic_one_and_a_star(capsys):
    options = "--links none --megabytes 0.1 --rounds 2 --stars 3 --star-link 1000/0.1 --star-megabytes 0.1".split()
    assert bench("link", [*options, "--rows", "ddp fp32", "natural", "auto"]) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    found = {(line["workers"], line["row"]): line for line in lines if line["name"] == "link"}
    assert list(found) == [(2, "ddp fp32"), (2, "natural"), (2, "auto"), (3, "ddp fp32"), (3, "natural")]
    size = found[2, "natural"]["model_bytes"]
    assert found[2, "natural"]["bytes_said"] == pytest.approx(size / 4, rel=0.1)
    assert found[3, "natural"]["bytes_said"] == pytest.approx(2 * 2 / 3 * size / 4, rel=0.1)
    for workers in (2, 3):
        natural, plain = found[workers, "natural"], found[workers, "ddp fp32"]
        assert natural["bytes_counted"] < 0.6 * plain["bytes_counted"]
        assert natural["bytes_framed"] == pytest.approx(natural["bytes_counted"], rel=0.1)  # of few and small messages
    targets = {(line["workers"], line["row"]): line for line in lines if line["name"] == "link.target"}
    assert all(line["holds"] == (line["found"] <= line["target"]) for line in targets.values())
    assert targets[3, "natural: bytes off the formula"]["holds"]
    assert {(2, "natural: bytes off the counted"), (2, "auto, times ddp fp32")} <= set(targets)
    assert "because the link has" in targets[2, "auto, times ddp fp32"]["why"]
    assert "link: milliseconds of a step" in captured.err


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="a link is MBIT/MS"):
        link.parsed("fast")
    with pytest.raises(UsageError, match="workers must be at least"):
        link.link(workers=1)
    with pytest.raises(UsageError, match="a star has two workers or more"):
        link.link(stars=(1,))
