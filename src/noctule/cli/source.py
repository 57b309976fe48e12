"""Signatures and constants read from the source of a module, without importing it or what it needs."""

import ast
import builtins
import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

_PACKAGE = __name__.partition(".")[0]


def declared(module: str, name: str) -> Any:
    """The value of a name in a module of this package, which is not imported.

    A constant is evaluated. A function keeps its options and its docstring, and is imported when it is called. Names of other
    modules of this package are looked up in the same way; classes, and what is not of this package, are imported.

    Raises:
        AttributeError: the module does not say.
    """
    tree = _tree(module)
    if tree is None:  # installed without sources
        return getattr(import_module(module), name)
    for node in tree.body:
        match node:
            case ast.FunctionDef() if node.name == name:
                return _function(module, node)
            case ast.ClassDef() if node.name == name:
                return getattr(import_module(module), name)
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                return _evaluated(module, value)
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value) if target == name:
                return _evaluated(module, value)
            case ast.ImportFrom(module=str(home), names=aliases):
                for alias in aliases:
                    if (alias.asname or alias.name) == name:
                        ours = home.partition(".")[0] == _PACKAGE
                        return declared(home, alias.name) if ours else getattr(import_module(home), alias.name)
    raise AttributeError(f"{module} does not say what {name} is")


@functools.cache
def _tree(module: str) -> ast.Module | None:
    root = importlib.util.find_spec(_PACKAGE)
    assert root is not None
    assert root.submodule_search_locations is not None
    for folder in root.submodule_search_locations:  # several where it is installed to be edited
        path = Path(folder, *module.split(".")[1:])
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
    return None


def _function(module: str, node: ast.FunctionDef) -> Callable[..., Any]:
    bare = copy.deepcopy(node)
    bare.body = [bare.body[0] if ast.get_docstring(node) else ast.Pass()]
    bare.decorator_list, bare.returns = [], None
    for argument in [*bare.args.posonlyargs, *bare.args.args]:  # only options need their types
        argument.annotation = None
    namespace = _namespace(module, bare)
    exec(compile(ast.Module([bare], []), f"<signature in {module}>", "exec"), namespace)

    @functools.wraps(namespace[node.name])
    def function(*arguments: Any, **options: Any) -> Any:
        return getattr(import_module(module), node.name)(*arguments, **options)

    return function


def _evaluated(module: str, node: ast.expr) -> Any:
    return eval(compile(ast.Expression(node), f"<constant in {module}>", "eval"), _namespace(module, node))


def _namespace(module: str, node: ast.AST) -> dict[str, Any]:
    return {name: declared(module, name) for name in _names(node) if not hasattr(builtins, name)}


def _names(node: ast.AST) -> Iterator[str]:
    return (each.id for each in ast.walk(node) if isinstance(each, ast.Name))
