"""``noctule bench``: the benchmarks, a package of its own that is found through its entry point."""

from importlib.metadata import entry_points

from noctule.core.errors import UsageError

GROUP = "noctule.commands"
"""The group of entry points whose ``bench`` is a function of the words after ``noctule bench``."""


def main(words: list[str]) -> int:
    """Measure Noctule beside its strongest alternatives."""
    found = [each for each in entry_points(group=GROUP) if each.name == "bench"]
    try:
        benchmarks = found[0].load()
    except (IndexError, ImportError) as error:
        why = "they are not there" if isinstance(error, IndexError) else str(error)
        raise UsageError(
            f"the benchmarks are not installed ({why}): install Noctule from its repository, pip install .[bench]"
        ) from error
    return benchmarks(words)
