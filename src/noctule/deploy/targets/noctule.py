"""Our own runtime, which needs numpy and nothing else; sparse layers stay sparse."""

from importlib import import_module
from pathlib import Path
from typing import Any

from noctule.core.errors import ExportError, UsageError
from noctule.deploy.target import Job, Run, Target, Written


def _write(job: Job) -> Written:
    write_model: Any = import_module("noctule.deploy.noctule_file").write_model
    if job.kwargs or len(job.args) != 1:
        raise ExportError("noctule.runtime runs models of one input, a tensor: export this one to another runtime")
    write_model(job.model, job.args[0], job.path)
    return Written()


def _open(path: Path, threads: int) -> Run:
    if threads != 1:
        raise UsageError(f"noctule.runtime computes on one thread, not on {threads}: run several models side by side")
    model: Any = import_module("noctule.runtime").load(path)
    return lambda inputs: model(*inputs) if isinstance(inputs, tuple) else model(inputs)


TARGET = Target(
    name="noctule",
    suffix=".noctule",
    precisions=("float32", "int8"),
    module="noctule.runtime",
    needs="pip install noctule-runtime",
    write=_write,
    open=_open,
)
