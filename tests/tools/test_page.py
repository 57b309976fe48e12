"""The examples with other people's tools run."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "how_to_use" / "other_tools.md"


@pytest.mark.filterwarnings("ignore")
def test_examples_with_other_tools_run(tmp_path, monkeypatch):
    for tool in ("accelerate", "lightning", "peft"):
        pytest.importorskip(tool)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "snippet"}
    for number, code in enumerate(re.findall(r"```python(?: tools)?\n(.*?)```", PAGE.read_text(), re.DOTALL), start=1):
        exec(compile(code, f"{PAGE.name}, snippet {number}", "exec", dont_inherit=True), namespace)
