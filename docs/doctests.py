"""A griffe extension for the API pages: doctests in docstrings become code blocks."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^(?P<indent> *)>>> .*\n?(?:(?P=indent)\S.*\n?)*", re.MULTILINE)


_HIDDEN = {"__init__", "__post_init__", "__prepare_scriptable__"}


class Doctests(griffe.Extension):
    """Fences each paragraph that starts with ``>>>``, and hides special methods that nobody calls by name."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object, if it has one."""
        if obj.name in _HIDDEN:
            obj.public = False
        if obj.docstring is not None:
            obj.docstring.value = _DOCTEST.sub(_fenced, obj.docstring.value)


def _fenced(found: re.Match[str]) -> str:
    return f"{found['indent']}```pycon\n{found[0].rstrip()}\n{found['indent']}```\n"
