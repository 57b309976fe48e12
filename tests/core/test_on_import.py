"""What is done as soon as another module has been imported."""

import importlib.util
import sys

import pytest

from noctule.core.on_import import on_import


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "awaited_here.py").write_text("there = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "awaited_here"
    sys.modules.pop("awaited_here", None)


def test_it_is_done_once_and_after_the_import(module):
    finders, told = list(sys.meta_path), []
    on_import(module, lambda: told.append(sys.modules[module].there))
    for _ in range(2):
        assert importlib.util.find_spec(module) is not None  # to look whether it is installed is no import
    assert told == []
    importlib.import_module(module)
    importlib.import_module(module)
    assert told == [True]
    assert sys.meta_path == finders


def test_what_is_there_is_no_longer_awaited(module):
    importlib.import_module(module)
    told = []
    on_import(module, lambda: told.append(1))
    assert told == [1]


def test_a_module_that_fails_is_awaited_still(module, tmp_path):
    (tmp_path / "awaited_here.py").write_text("raise ValueError\n")
    told = []
    on_import(module, lambda: told.append(1))
    for _ in range(2):
        with pytest.raises(ValueError):  # noqa: PT011 importlib's own text
            importlib.import_module(module)
    assert told == []
    sys.meta_path.pop(0)
