"""Does something as soon as another library's module has been imported, which is not imported for it."""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def on_import(name: str, then: Callable[[], Any]) -> None:
    """Call ``then()`` now if the module of this name has been imported, else right after it will have been."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        then()
    else:
        sys.meta_path.insert(0, _Waiting(name, then))


class _Waiting(MetaPathFinder):
    """Finds nothing itself; what finds the module is made to say when it has executed it."""

    def __init__(self, name: str, then: Callable[[], Any]) -> None:
        self.name, self.then = name, then
        self._asking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of that module from the other finders, and None for any other."""
        if name != self.name or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(name)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_tell(
            module: ModuleType,
        ) -> None:  # a spec may be asked for without an import, to see what is installed
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.then()

        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec
