"""`noctule bench link` from its options to its lines and its tables, in small."""

import json

import pytest

from noctule.bench import link
from noctule.errors import UsageError
from noctule.testing.link import available


@pytest.mark.skipif(available() is not None, reason=str(available()))
def test_two_ways_and_the_automatic_one(capsys):
    options = "--links none --rows --megabytes 0.1 --rounds 1 --steps 1".split()
    options[options.index("--rows") + 1 : options.index("--rows") + 1] = ["ddp fp32", "natural", "auto"]
    assert link.main(options) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    found = {line["row"]: line for line in lines if line["name"] == "link"}
    assert list(found) == ["ddp fp32", "natural", "auto"]
    size = found["natural"]["model_bytes"]
    assert found["natural"]["bytes_said"] == pytest.approx(size / 4, rel=0.1)
    assert found["natural"]["bytes_counted"] < 0.6 * found["ddp fp32"]["bytes_counted"]
    (target,) = (line for line in lines if line["name"] == "link.target")
    assert target["holds"] == (target["found"] <= 1.1)
    assert "because the link has" in target["why"]
    assert "link: milliseconds of a step" in captured.err


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="a link is MBIT/MS"):
        link.parsed("fast")
    with pytest.raises(UsageError, match="workers must be at least"):
        link.link(workers=1)
