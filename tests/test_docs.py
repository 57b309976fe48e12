"""Everything a reader sees is executed."""

import doctest
import importlib
import pkgutil
import re
import runpy
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
OPTIONAL = {"noctule.kernels.triton", "noctule.sparse.layers.lora"}
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


def test_every_page_is_in_the_navigation_of_the_site():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))


def test_the_page_of_public_names_has_all_of_them():
    shown = re.findall(r"^::: noctule\.(\w+)$", (ROOT / "docs/api/index.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(noctule.__all__)


def test_the_picture_of_the_folders_is_that_of_the_sources():
    pytest.importorskip("grimp")
    folders = runpy.run_path(str(ROOT / "docs/folders.py"))
    assert (ROOT / "docs/figures/folders.svg").read_text() == folders["drawing"](), "run: make figures"


def test_the_picture_of_the_layers_imports_is_in_their_order():
    pytest.importorskip("grimp")
    folders = runpy.run_path(str(ROOT / "docs/folders.py"))
    below = {"a": set(), "b": {"a"}, "c": {"a"}, "d": {"b", "c"}}
    assert folders["rows"](below) == [["a"], ["b", "c"], ["d"]]


@pytest.mark.parametrize("module", MODULES)
def test_every_folder_says_what_it_is_for_in_one_line(module):
    path = ROOT / "src" / Path(*module.split(".")) / "__init__.py"
    if path.exists():
        first = (importlib.import_module(module).__doc__ or "").split("\n")[0]
        assert first.endswith((".", "?"))
        assert len(first) <= 140
