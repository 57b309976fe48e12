"""Which runtimes can a model be written for? One file each."""

from pathlib import Path

from noctule.core.errors import UsageError
from noctule.deploy.target import Target
from noctule.deploy.targets import executorch, litert, noctule, onnxruntime, openvino

TARGETS: dict[str, Target] = {
    t.name: t for t in (onnxruntime.TARGET, openvino.TARGET, executorch.TARGET, litert.TARGET, noctule.TARGET)
}
"""By name."""


def named(name: str) -> Target:
    """The target of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in TARGETS:
        raise UsageError(f"there is no target {name!r}. Targets: {', '.join(TARGETS)}")
    return TARGETS[name]


def of_file(path: Path) -> Target:
    """The target of a file, by its suffix.

    Raises:
        UsageError: no target has this suffix.
    """
    for target in TARGETS.values():
        if path.suffix == target.suffix:
            return target
    known = ", ".join(f"{t.suffix} ({t.name})" for t in TARGETS.values())
    raise UsageError(f"{path.name}: no runtime here has files of this kind. Kinds: {known}")
