import json

import pytest

from noctule.cli.main import main

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.mark.slow
def test_a_small_network_is_compared_in_all_precisions_at_both_widths(capfd):
    words = "--depth 8 --image 12 --classes 10 --rounds 3 --seconds 0.02 --calibration 4".split()
    assert main(["bench", "shipping", *words]) == 0
    said = capfd.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [line["row"] for line in lines] == ["full float32", "full int8", "half float32", "half int8"]
    assert lines[0]["faster"] == lines[0]["smaller"] == 1.0
    assert lines[3]["smaller"] > 5.0
    assert all(line["memory_bytes"] > 0 for line in lines)
    assert "fastest: " in said.err
