"""A compiled module whose intrinsics are emulated, in the place of the one that is installed."""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

PATH = os.environ.get("NOCTULE_EMULATED")
"""The file of the module; None where the tests are of the installed one."""


def instead_of(name: str) -> ModuleType:
    """Load the file under the name of the installed module."""
    assert PATH
    spec = spec_from_file_location(name, PATH)
    assert spec
    assert spec.loader
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
