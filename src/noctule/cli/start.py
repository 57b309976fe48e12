"""What ``noctule run`` does once its command line was checked: make a folder, and run the recipe in this process or in several."""

import inspect
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from noctule.cli.signature import from_json
from noctule.core.errors import NoctuleError, UsageError
from noctule.kernels import native
from noctule.launch import Supervisor
from noctule.launch.lighthouse import Lighthouse
from noctule.launch.server_ticket import ServerTicket
from noctule.launch.torchrun import Torchrun
from noctule.measure.allocator import keep_freed_memory
from noctule.measure.cpus import available_cpus
from noctule.report import RunFolder, compare_table, write_report
from noctule.team import as_member_of
from noctule.team.group import GroupTeam
from noctule.team.strategies import made, workers_and_strategy
from noctule.team.strategy import GroupStrategy, Strategy
from noctule.train.interrupt import default_signals

_OWN = {"run.json", "data.json", "twin.json", "workers", "worker.log", "server", "tensorboard"}
"""The names in a run's folder before anything is trained."""


@dataclass(frozen=True)
class Asked:
    """A checked command line."""

    name: str
    recipe: Callable[..., Any]
    given: dict[str, Any]
    """The options of the recipe that were given."""
    _: KW_ONLY
    threads: int | None
    together: dict[str, Any]
    """What was given of several workers: how many, their strategy and its options."""
    command: list[str]

    @property
    def options(self) -> dict[str, Any]:
        """All options of the recipe, with their defaults."""
        parameters = inspect.signature(self.recipe).parameters.items()
        return {name: p.default for name, p in parameters if p.kind is p.KEYWORD_ONLY} | self.given


def start(asked: Asked, out: Path | None) -> int:
    """Begin a run."""
    workers, strategy = workers_and_strategy(asked.together)
    here = _prepare(asked.threads, workers or 1)
    return _run(asked, _create(asked, out, here), asked.options, workers, strategy)


def start_again(asked: Asked, resume: Path, *, out: Path | None) -> int:
    """Resume a run that was stopped."""
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
    try:
        workers, strategy = workers_and_strategy(together)
    except UsageError as error:
        raise UsageError(
            f"{folder.path / 'run.json'} says how its workers train in a way that cannot be: {error}"
        ) from error
    _compare(about, _prepare(asked.threads or about.get("threads"), 1))
    return _run(asked, folder, options, workers, strategy)


def start_under_torchrun(asked: Asked, out: Path) -> int:
    """Begin or resume this worker's part of a run."""
    strategy = _without_supervisor(asked.together, "under torchrun")
    rendezvous = Torchrun()
    here = _prepare(asked.threads, 1)
    team = GroupTeam(rendezvous, member=rendezvous.member, strategy=strategy)
    with as_member_of(team):
        with default_signals():  # torch waits for the others where Python's own handlers are not called
            team.form()
            if rendezvous.member:
                dist.barrier()  # worker 0 makes the run's folder first
        folder = _create_or_open(asked, rendezvous.folder(out), here)
        if not rendezvous.member:
            dist.barrier()
            announce(folder)
        with folder, _explaining(folder, again="" if rendezvous.member else "give torchrun the same command again"):
            result = asked.recipe(folder, **asked.options)
        if not rendezvous.member:
            _print_outcome(folder, result)
        dist.destroy_process_group()
    return 0


def start_at_lighthouse(asked: Asked, out: Path, *, lighthouse: str, member: int) -> int:
    """Begin or resume the run of a worker that finds the others through a lighthouse."""
    strategy = _without_supervisor(asked.together, "with --lighthouse")
    here = _prepare(asked.threads, 1)
    with Lighthouse(lighthouse, member=member, timeout_seconds=strategy.timeout_seconds) as rendezvous:
        folder = _create_or_open(asked, out, here)
        announce(folder)
        again = "give the same command again"
        with (
            as_member_of(GroupTeam(rendezvous, member=member, strategy=strategy)),
            folder,
            _explaining(folder, again=again),
        ):
            if not (result := folder.summary()):
                result = asked.recipe(folder, **asked.options)
        _print_outcome(folder, result)
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def start_with_ticket(asked: Asked, out: Path | None, *, ticket: Path) -> int:
    """Begin or resume the run of a worker of a server, which trains as its ticket says."""
    try:
        place = ServerTicket.load(ticket)
    except ValueError as error:
        raise UsageError(str(error)) from error
    facts = {"workers": place.workers, **place.strategy.facts()}
    if others := [f"--{k.replace('_', '-')} {v}" for k, v in asked.together.items() if facts.get(k) != v]:
        raise UsageError(f"{ticket} says how the workers train, and not with {', '.join(others)}: leave it out")
    chosen = {"workers": place.workers, **place.strategy.changed()}
    here = _prepare(asked.threads, 1)
    asked = replace(asked, together={**chosen, "ticket": str(ticket.absolute())})
    folder = _create_or_open(asked, out, here)
    announce(folder, f", {place}")
    with folder, _explaining(folder):
        if not (result := folder.summary()):
            result = place.take_part(lambda: asked.recipe(folder, **asked.options))
    _print_outcome(folder, result)
    return 0


def _without_supervisor(together: dict[str, Any], where: str) -> GroupStrategy:
    """The strategy of workers that are not started here."""
    strategy = made({k: v for k, v in together.items() if k != "workers"})
    if not isinstance(strategy, GroupStrategy):
        raise UsageError(
            f"--strategy {strategy.name} is for the workers that noctule starts itself: leave it out {where}; a parameter server "
            "for several machines is `noctule server`"
        )
    if "workers" in together:
        raise UsageError(f"--workers is for the workers that noctule starts itself: leave it out {where}")
    return strategy


def _create_or_open(asked: Asked, path: Path | None, here: dict[str, Any]) -> RunFolder:
    """The run's folder, new or of the same run."""
    if path is None or not (path / "run.json").is_file():
        return _create(asked, path, here)
    folder = RunFolder(path)
    about = folder.settle()
    if about["recipe"] != asked.name or from_json(asked.recipe, about["options"]) != asked.options:
        raise UsageError(f"{path} is another run, of {about['recipe']}: give the same command again, or another --out")
    _compare(about, here)
    return folder


def _prepare(threads: int | None, workers: int) -> dict[str, Any]:
    """Set this process up; return what must be alike for a run to be the same bit for bit."""
    keep_freed_memory()
    if threads is None:
        most = torch.get_num_threads()  # as OMP_NUM_THREADS says, or one for each core that it may run on
        threads = max(1, (most if "OMP_NUM_THREADS" in os.environ else min(most, available_cpus())) // workers)
    torch.set_num_threads(threads)
    return {"threads": torch.get_num_threads(), "instruction_set": native.instruction_set()}


def _compare(about: dict[str, Any], here: dict[str, Any]) -> None:
    differ = [f"{k} {about.get(k)} -> {v}" for k, v in here.items() if about.get(k) != v]
    if differ:
        warnings.warn(f"the run goes on, but not bit for bit as it began: {', '.join(differ)}", stacklevel=1)


def _create(asked: Asked, path: Path | None, here: dict[str, Any]) -> RunFolder:
    options = asked.options
    about = {
        "recipe": asked.name,
        "options": options,
        "seed": options.get("seed", 0),
        "command": asked.command,
        "together": asked.together or None,
        **here,
    }
    if path is not None:
        return RunFolder.create(path, **about)
    name = Path(asked.name.partition(":")[0]).stem
    return RunFolder.create_in(Path("runs").absolute(), f"{name}-{datetime.now():%Y%m%d-%H%M%S}", **about)


def _run(asked: Asked, folder: RunFolder, options: dict[str, Any], workers: int | None, strategy: Strategy) -> int:
    with folder, _explaining(folder):
        if workers is None:
            announce(folder)
            result = asked.recipe(folder, **options)
        else:
            Supervisor(folder.path, workers=workers, strategy=strategy, threads=torch.get_num_threads()).run()
            if result := folder.summary():
                write_report(folder)  # once more: all workers' records are there now
    _print_outcome(folder, result)
    return 0


@contextmanager
def _explaining(folder: RunFolder, *, again: str | None = None) -> Iterator[None]:
    """After a stop print how to resume, or remove the folder if nothing was trained yet.

    Args:
        again: how to resume, if not by ``--resume``; empty for no message.
    """
    try:
        yield
    except (KeyboardInterrupt, NoctuleError, OSError, ValueError) as error:
        trained = any(folder.path.rglob("checkpoints"))
        if folder.new and not trained and {entry.name for entry in folder.path.iterdir()} <= _OWN:
            shutil.rmtree(folder.path)
            if isinstance(error, KeyboardInterrupt):
                print("stopped before anything was trained: no run was kept", file=sys.stderr)
        elif trained or isinstance(error, KeyboardInterrupt):
            with suppress(NoctuleError, OSError):  # on a full disk, say, which the error is about
                write_report(folder)
            if again is None:
                again = f"noctule run --resume {shlex.quote(str(folder.path))}"
            if again:
                print(f"stopped; to go on: {again}", file=sys.stderr)
        if isinstance(error, ValueError) and not isinstance(error, NoctuleError):
            raise UsageError(str(error)) from error
        raise


def announce(folder: RunFolder, more: str = "") -> None:
    """Have a run print its folder when its training begins."""
    folder.on_begin = lambda: print(f"run: {folder.path}{more}", flush=True)


def _print_outcome(folder: RunFolder, result: Any) -> None:
    folder.begin()
    if isinstance(result, dict) and folder.summary():
        print(compare_table([folder]))
    page = folder.path / "report.html"
    if page.exists():
        print(f"report: {page}")
