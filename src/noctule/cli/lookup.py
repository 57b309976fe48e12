"""Recipes by name: shipped ones, whose signatures are read without importing them, and files of the user."""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from noctule.cli.source import declared
from noctule.core.errors import UsageError
from noctule.core.place import absolute, nearest

_PACKAGE = "noctule.recipes"


def shipped() -> dict[str, Callable[..., Any]]:
    """The recipes that come with Noctule, by name; each is imported when it is called."""
    return {name: declared(_PACKAGE, name) for name in declared(_PACKAGE, "__all__")}


def canonical(name: str) -> str:
    """The name by which a recipe is found from any folder: the path of a file is absolute."""
    file, colon, function = name.partition(":")
    return f"{absolute(file)}{colon}{function}" if file.endswith(".py") else name


def find(name: str) -> Callable[..., Any]:
    """A shipped recipe by its name, or the user's own by FILE.py or FILE.py:FUNCTION, which may import its neighbours."""
    file, _, function = name.partition(":")
    if not file.endswith(".py"):
        known = list(declared(_PACKAGE, "__all__"))
        if name not in known:
            near = nearest(name, [*known, *(path.name for path in Path().glob("*.py"))])
            raise UsageError(f"there is no recipe {name}{near}. Recipes: {', '.join(known)}, or FILE.py[:FUNCTION]")
        return declared(_PACKAGE, name)
    path = absolute(file)
    if not path.is_file():
        others = [other.name for other in path.parent.glob("*.py")]
        raise UsageError(f"there is no file {file}{nearest(path.name, others)}")
    module, function = _imported(path), function or path.stem.replace("-", "_")
    recipe = getattr(module, function, None)
    if not callable(recipe):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        listed = f"; it has {', '.join(own)}" if own else ""
        raise UsageError(
            f"{file} has no function {function}{nearest(function, own)}{listed}: name it with {file}:FUNCTION"
        )
    return recipe


@contextmanager
def neighbours() -> Iterator[None]:
    """A block after which the modules that a recipe's file has imported from its folder are forgotten."""
    path, modules = list(sys.path), set(sys.modules)
    try:
        yield
    finally:
        added = {folder for folder in sys.path if folder not in path}
        sys.path[:] = path
        gone = {name for name in set(sys.modules) - modules if "." not in name and _home(sys.modules[name]) in added}
        for name in [name for name in sys.modules if name.partition(".")[0] in gone]:
            del sys.modules[name]


def _home(module: ModuleType) -> str:
    """The folder from which a module or a package was imported."""
    file = Path(getattr(module, "__file__", None) or "")
    return str(file.parent.parent if file.name == "__init__.py" else file.parent)


def _imported(path: Path) -> ModuleType:
    """The module in a file, with its folder in ``sys.path`` as Python does it for a script."""
    taken = sys.modules.get(path.stem)
    name = path.stem if taken is None or getattr(taken, "__file__", "") == str(path) else f"recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UsageError(f"{error.filename}, line {error.lineno}, is not Python: {error.msg}") from error
    except Exception as error:
        lines = [each for each in traceback.extract_tb(error.__traceback__) if each.filename == str(path)]
        where = f"{path}, line {lines[-1].lineno}" if lines else str(path)
        raise UsageError(f"{where}, cannot be imported: {type(error).__name__}: {error}") from error
    return module
