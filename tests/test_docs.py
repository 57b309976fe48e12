"""Everything a reader sees is executed."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import noctule

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(noctule.__path__, "noctule.")
    if not m.name.endswith(("._native", ".__main__"))
)
OPTIONAL = {"noctule.sparse.layers.lora"}
"""Modules that wrap a library which need not be there."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "snippet"}
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), start=1):
        exec(compile(code, f"{page.name}, snippet {number}", "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = pytest.importorskip(name, exc_type=ImportError) if name in OPTIONAL else importlib.import_module(name)
    namespace = {"torch": importlib.import_module("torch"), "nn": importlib.import_module("torch").nn}
    failed, _ = doctest.testmod(
        module, extraglobs=namespace, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert not failed
