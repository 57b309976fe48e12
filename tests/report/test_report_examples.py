"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import noctule.report

MODULES = [module.name for module in pkgutil.iter_modules(noctule.report.__path__, "noctule.report.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
