"""What ``noctule run`` does once its words are understood: a folder, and the recipe in this process or in several."""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from noctule.allocator import keep_freed_memory
from noctule.errors import NoctuleError, UsageError
from noctule.kernels import native
from noctule.launch import Strategy, Supervisor, as_member_of
from noctule.launch.invitation import Invitation
from noctule.launch.lighthouse import Lighthouse
from noctule.launch.together import Together
from noctule.launch.torchrun import Torchrun
from noctule.report import RunFolder, compare_table, write_report
from noctule.signature import from_json


@dataclass(frozen=True)
class Asked:
    """What the command line said."""

    name: str
    recipe: Callable[..., Any]
    given: dict[str, Any]
    """Options of the recipe."""
    _: KW_ONLY
    threads: int | None
    together: dict[str, Any]
    """Options of several workers, and how many they are."""
    command: list[str]

    @property
    def options(self) -> dict[str, Any]:
        """All options of the recipe."""
        parameters = inspect.signature(self.recipe).parameters.items()
        return {name: p.default for name, p in parameters if p.kind is p.KEYWORD_ONLY} | self.given


def start(asked: Asked, out: Path | None) -> int:
    """A new run."""
    workers, strategy = _several(asked.together)
    here = _prepare(asked.threads, workers or 1)
    return _run(asked, _create(asked, out or _new_path(asked), here), asked.options, workers, strategy)


def start_again(asked: Asked, resume: Path, *, out: Path | None) -> int:
    """A run that was stopped goes on."""
    folder = RunFolder(resume)
    about = folder.about()
    options = from_json(asked.recipe, about["options"])
    changed = sorted(k for k, v in asked.given.items() if k not in options or options[k] != v)
    if changed or out is not None or asked.together:
        words = [*changed, *asked.together] or ["out"]
        raise UsageError(f"--resume goes on with the options of that run; leave out {', '.join(words)}")
    together = about.get("together") or {}
    if ticket := together.get("ticket"):
        asked = replace(asked, given=options, threads=asked.threads or about.get("threads"))
        return start_with_ticket(asked, folder.path, ticket=Path(ticket))
    workers, strategy = _several(together)
    _compare(about, _prepare(asked.threads or about.get("threads"), 1))
    return _run(asked, folder, options, workers, strategy)


def start_under_torchrun(asked: Asked, out: Path) -> int:
    """This worker's part of a run, which is new or goes on."""
    strategy = _without_supervisor(asked.together, "under torchrun")
    rendezvous = Torchrun()
    here = _prepare(asked.threads, 1)
    team = Together(rendezvous, member=rendezvous.member, strategy=strategy)
    with as_member_of(team):
        team.form()
        if rendezvous.member:
            dist.barrier()  # worker 0 makes the run's folder first
        folder = _create_or_open(asked, rendezvous.folder(out), here)
        if not rendezvous.member:
            dist.barrier()
            print(f"run: {folder.path}", flush=True)
        with folder:
            result = asked.recipe(folder, **asked.options)
        if not rendezvous.member:
            _print_outcome(folder, result)
        dist.destroy_process_group()
    return 0


def start_at_lighthouse(asked: Asked, out: Path, *, lighthouse: str, member: int) -> int:
    """One worker, whose run is new or goes on; who the others are is said by the lighthouse."""
    strategy = _without_supervisor(asked.together, "with --lighthouse")
    here = _prepare(asked.threads, 1)
    with Lighthouse(lighthouse, member=member, timeout_seconds=strategy.timeout_seconds) as rendezvous:
        folder = _create_or_open(asked, out, here)
        print(f"run: {folder.path}", flush=True)
        with as_member_of(Together(rendezvous, member=member, strategy=strategy)), folder:
            if not (result := folder.summary()):
                result = asked.recipe(folder, **asked.options)
        _print_outcome(folder, result)
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def start_with_ticket(asked: Asked, out: Path | None, *, ticket: Path) -> int:
    """One worker of a parameter server, whose run is new or goes on; how it trains is said by the ticket."""
    try:
        invitation = Invitation.load(ticket)
    except ValueError as error:
        raise UsageError(str(error)) from error
    said = {"workers": invitation.workers, **invitation.strategy.facts()}
    if others := [f"--{k.replace('_', '-')} {v}" for k, v in asked.together.items() if said[k] != v]:
        raise UsageError(f"{ticket} says how the workers train, and not with {', '.join(others)}: leave it out")
    chosen = {k: v for k, v in said.items() if k == "workers" or v != getattr(Strategy(), k)}
    here = _prepare(asked.threads, 1)
    asked = replace(asked, together={**chosen, "ticket": str(ticket.absolute())})
    folder = _create_or_open(asked, out or _new_path(asked), here)
    print(f"run: {folder.path}, {invitation}", flush=True)
    with folder, _explaining(asked.name, folder):
        if not (result := folder.summary()):
            result = invitation.take_part(lambda: asked.recipe(folder, **asked.options))
    _print_outcome(folder, result)
    return 0


def _without_supervisor(together: dict[str, Any], where: str) -> Strategy:
    """How workers train together that are not started here."""
    strategy = Strategy(**{k: v for k, v in together.items() if k != "workers"})
    if "workers" in together or strategy.served:
        what = f"--strategy {strategy.strategy}" if strategy.served else "--workers"
        more = "; a parameter server for several machines is `noctule server`" if strategy.served else ""
        raise UsageError(f"{what} is for the workers that noctule starts itself: leave it out {where}{more}")
    return strategy


def _create_or_open(asked: Asked, path: Path, here: dict[str, Any]) -> RunFolder:
    """The run's folder; one that is there has to be of the same run."""
    if not (path / "run.json").is_file():
        return _create(asked, path, here)
    folder = RunFolder(path)
    about = folder.about()
    if about["recipe"] != asked.name or from_json(asked.recipe, about["options"]) != asked.options:
        raise UsageError(f"{path} is another run, of {about['recipe']}: give the same command again, or another --out")
    _compare(about, here)
    return folder


def _several(together: dict[str, Any]) -> tuple[int | None, Strategy]:
    """How many workers, None for this process alone, and how they train together."""
    workers = together.get("workers")
    options = {k: v for k, v in together.items() if k != "workers"}
    if workers is None and options:
        raise UsageError(f"{', '.join(f'--{k}' for k in options)} needs --workers, how many train together")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, got {workers}")
    try:
        return workers, Strategy(**options)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _prepare(threads: int | None, workers: int) -> dict[str, Any]:
    """Set this process up; what a run is bit for bit the same with."""
    keep_freed_memory()
    if threads is None and workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
    if threads is not None:
        torch.set_num_threads(threads)
    return {"threads": torch.get_num_threads(), "instruction_set": native.instruction_set()}


def _compare(about: dict[str, Any], here: dict[str, Any]) -> None:
    differ = [f"{k} {about.get(k)} -> {v}" for k, v in here.items() if about.get(k) != v]
    if differ:
        warnings.warn(f"the run goes on, but not bit for bit as it began: {', '.join(differ)}", stacklevel=1)


def _new_path(asked: Asked) -> Path:
    return Path("runs") / f"{Path(asked.name).stem.replace(':', '-')}-{datetime.now():%Y%m%d-%H%M%S}"


def _create(asked: Asked, path: Path, here: dict[str, Any]) -> RunFolder:
    options = asked.options
    return RunFolder.create(
        path,
        recipe=asked.name,
        options=options,
        seed=options.get("seed", 0),
        command=asked.command,
        together=asked.together or None,
        **here,
    )


def _run(asked: Asked, folder: RunFolder, options: dict[str, Any], workers: int | None, strategy: Strategy) -> int:
    print(f"run: {folder.path}", flush=True)
    with folder, _explaining(asked.name, folder):
        if workers is None:
            result = asked.recipe(folder, **options)
        else:
            Supervisor(folder.path, workers=workers, strategy=strategy, threads=torch.get_num_threads()).run()
            if result := folder.summary():
                write_report(folder)  # once more: all workers' records are there now
    _print_outcome(folder, result)
    return 0


@contextmanager
def _explaining(name: str, folder: RunFolder) -> Iterator[None]:
    """After a stop say how to go on, or, where nothing was trained yet, leave no trace of it."""
    try:
        yield
    except (KeyboardInterrupt, NoctuleError, OSError, ValueError) as error:
        if (folder.path / "checkpoints").exists():
            write_report(folder)
            print(f"stopped; to go on: noctule run {name} --resume {folder.path}", file=sys.stderr)
        elif [entry.name for entry in folder.path.iterdir()] == ["run.json"]:
            (folder.path / "run.json").unlink()
            folder.path.rmdir()
        if isinstance(error, ValueError) and not isinstance(error, NoctuleError):
            raise UsageError(str(error)) from error
        raise


def _print_outcome(folder: RunFolder, result: Any) -> None:
    if isinstance(result, dict) and folder.summary():
        print(compare_table([folder]))
    page = folder.path / "report.html"
    if page.exists():
        print(f"report: {page}")
