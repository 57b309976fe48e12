"""`noctule bench inference` measures its rows beside ONNX Runtime."""

import json

import pytest

from noctule_bench import program


@pytest.mark.slow
def test_rows_and_targets(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "inference.jsonl"
    assert (
        program.run("inference", ["--batches", "1", "9", "--densities", "0.1", "--rounds", "3", "--out", str(out)]) == 0
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    rows = {(line["row"], line["batch"]) for line in lines if line["name"] == "inference"}
    kinds = (
        "onnxruntime float32",
        "onnxruntime int8",
        "onnxruntime int8, saturating",
        "dense float32",
        "dense int8",
        "0.1 float32",
        "0.1 int8",
        "0.1 int8 blocks",
    )
    assert rows == {(kind, batch) for kind in kinds for batch in (1, 9)}
    assert next(line for line in lines if line["name"] == "inference.memory")["torch_loaded"] is False
    assert any(line["name"] == "inference.target" for line in lines)
