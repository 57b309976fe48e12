"""Faults of training together, scripted: a worker is killed or cut off; how soon the others go on, and what is lost.

A training that goes on must equal an undisturbed one: each step says where the weights are in one direction, in float64,
and is compared with the same step of a training that was left alone; what workers must have alike is compared bit for bit.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from noctule.checkpoint import Checkpoints
from noctule.core.errors import NoctuleError, UsageError
from noctule_bench import program
from noctule_bench.faults_link import IMPATIENCE, PROMPT, frozen
from noctule_bench.faults_recipe import Step
from noctule_bench.faults_runs import Asked, Found, Running, Stuck, differing, end, first, off
from noctule_bench.link import parsed

GOES_ON_SECONDS = 3.0
"""In which the survivors of a worker have to do their next step."""
COMMITTED = 0.8
"""Share of the steps of a quiet time that a time with a worker killed every so often has to do."""
ALIKE = 1e-6
"""How far weights in float64 may be, relatively, from those of a training that was left alone: sums are in another order."""
_CHECKPOINT_SECONDS = 1.0


def faults(
    *,
    rows: tuple[str, ...] = (),
    times: int = 10,
    workers: int = 3,
    data: str = "fashion-mnist",
    data_dir: Path | None = None,
    hidden: tuple[int, ...] = (300, 100),
    link: str = "1000/0.5",
    frozen_seconds: float = 5.0,
    soak_seconds: float = 600.0,
    soak_every: float = 20.0,
    quiet_seconds: float = 60.0,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Kill workers, parameter servers and agents of torchrun, and freeze a link: how soon does the training go on?

    Args:
        rows: worker (killed, and its replacement joins), server, frozen, torchrun, agent, soak (default: all).
        times: that each fault happens.
        workers: that train together.
        data: a data set.
        data_dir: where data sets are looked for first.
        hidden: widths of the network.
        link: MBIT/MS of the one that freezes.
        frozen_seconds: for which it does.
        soak_seconds: in which a random worker is killed every so often; 0 leaves it out.
        soak_every: seconds from one kill to the next.
        quiet_seconds: without a fault before, between and after, with which that is compared.
        seed: of the choice of victims and times.
        out: a file that the lines are appended to.
    """
    program.at_least_one(times=times, workers=workers - 1)
    if frozen_seconds <= IMPATIENCE + PROMPT or min(soak_every, quiet_seconds) <= 0.0:
        raise UsageError(f"a link freezes for longer than {IMPATIENCE + PROMPT:g} s, and a soak takes some seconds")
    shape = parsed(link)
    names = [name for name in program.chosen(rows, list(ROWS)) if name != "soak" or soak_seconds > 0.0]
    lines, found = program.Lines(out), list[dict[str, Any]]()
    words = ["--data", data, *(["--data-dir", str(data_dir.resolve())] if data_dir else [])]
    words += ["--hidden", *map(str, hidden)]
    with tempfile.TemporaryDirectory(prefix="noctule-faults-") as folder:
        for name in names:
            asked = Asked(
                Path(folder, name), words, times, workers, Random(f"{seed} {name}"), shape, frozen_seconds,
                (soak_seconds, soak_every, quiet_seconds),
            )  # fmt: skip
            try:
                results = ROWS[name](asked)
            except NoctuleError as error:
                results = [Found(name, error=str(error))]
            for result in results:
                common = {"data": data, "workers": workers, "hidden": list(hidden)}
                found.append(lines.write("faults", **common | result.figures))
    _show(found)


def _killed(asked: Asked) -> list[Found]:
    """Workers are killed, and replaced."""
    deaths: list[tuple[float, int, int]] = []
    with Running(asked.folder / "killed", asked.words, workers=asked.workers) as running:
        for _ in range(asked.times):
            running.until(running.together, "all workers took part")
            asked.pause()
            victim, process = asked.random.choice(sorted((w, s.process) for w, s in running.last().items()))
            deaths.append((end(process), victim, process))
            running.until(lambda w=victim, p=process: running.last()[w].process != p, "a killed worker was replaced")
            running.until(running.together, "all workers took part again")
        asked.pause()
        running.stop()
        traces = [list(running.steps(worker)) for worker in range(asked.workers)]
    in_flight, gone_on, joined, lost, compared = [], [], [], 0, True
    for killed, victim, process in deaths:
        done = {w: [s for s in trace if s.at <= killed][-1] for w, trace in enumerate(traces)}
        last = [s for s in traces[victim] if s.process == process][-1]
        in_flight.append((process, last.step))
        others = {w: step for w, step in done.items() if w != victim}
        nexts = [
            first(traces[w], lambda s, d=d: s.process == d.process and s.session > d.session) for w, d in others.items()
        ]
        if any(step is None for step in nexts):
            raise Stuck("a worker was started again that had not been killed")
        went = [step for step in nexts if step is not None]
        gone_on.append(max(step.at for step in went) - killed)
        before = [
            s.step for w, d in others.items() for s in traces[w] if (s.process, s.session) == (d.process, d.session)
        ]
        lost = max(lost, max([*before, last.step]) + 1 - min(step.step for step in went))
        joins = first(traces[victim], lambda s, at=killed: s.at > at)
        assert joins is not None
        joined.append(joins.at - killed)
        seen = [s for w in others for s in traces[w] if s.step == joins.step and s.digest == joins.digest]
        compared = compared and joins.digest is not None and len(seen) >= len(others)
    apart = _off(asked, traces)
    unlike = differing(traces, in_flight)
    fine = max(gone_on) <= GOES_ON_SECONDS and lost <= 1 and apart <= ALIKE
    return [
        Found(
            "a worker killed: the others go on",
            gone_on,
            lost,
            fine,
            more={"off": apart, "target_seconds": GOES_ON_SECONDS},
        ),
        Found("a worker joins: weights alike", joined, lost, compared and not unlike, more={"steps_unlike": unlike}),
    ]


def _off(asked: Asked, traces: Sequence[Sequence[Step]]) -> float:
    """How far a training is from one that is left alone, which is made here."""
    steps = max(step.step for trace in traces for step in trace)
    took = max(trace[-1].at for trace in traces) - min(trace[0].at for trace in traces)
    with Running(asked.folder / "alone", asked.words, workers=asked.workers) as running:
        running.until(running.together, "all workers took part")
        running.until(
            lambda: running.last()[0].step >= steps, "the undisturbed training was as far", seconds=60.0 + 10.0 * took
        )
        undisturbed = {step.step: step.along for step in running.steps(0)}
    return off([step for trace in traces for step in trace], undisturbed)


def _server(asked: Asked) -> list[Found]:
    """The parameter server is killed, and started again."""
    seconds = []
    words = [*asked.words, "--no-double"]
    with Running(asked.folder, words, workers=asked.workers, together=["--strategy", "ssp"]) as running:
        for _ in range(asked.times):
            running.until(running.together, "all workers took part")
            asked.pause()
            process = running.server()
            if process is None:
                raise Stuck(f"there is no server{running.last_words()}")
            killed = end(process)

            def gone_on(at: float = killed) -> list[float]:  # a push may have been answered just before
                later = [[s.at for s in running.steps(w) if s.at > at][1:2] for w in range(asked.workers)]
                return [each[0] - at for each in later if each]

            running.until(lambda: len(gone_on()) == asked.workers, "all workers went on")
            seconds.append(max(gone_on()))
        asked.pause()
        running.stop()
        pushes = sum(step.step for step in running.last().values())
        restarted = sum(len({step.process for step in running.steps(w)}) - 1 for w in range(asked.workers))
    states = [Checkpoints(path).latest() for path in sorted((running.run / "server").glob("shard-*"))]
    versions = [state[1]["version"] for state in states if state is not None]
    right = versions == [pushes] and not restarted
    more = {"pushes": pushes, "versions": versions, "workers_restarted": restarted}
    return [Found("a parameter server killed: all go on", seconds, pushes - sum(versions), right, more=more)]


def _torchrun(asked: Asked) -> list[Found]:
    """A worker of torchrun is killed, which starts all of them again."""
    words = [*asked.words, "--checkpoint-seconds", str(_CHECKPOINT_SECONDS)]
    restarts: list[tuple[float, dict[int, Step]]] = []
    with Running(asked.folder, words, workers=2, together=None, restarts=asked.times) as running:
        for _ in range(asked.times):
            _await_checkpoint(asked, running)
            before = dict(running.last())
            restarts.append((end(asked.random.choice(sorted(s.process for s in before.values()))), before))
            running.until(lambda b=before: _replaced(running, b), "torchrun started all again")
        asked.pause()
        traces = [list(running.steps(worker)) for worker in range(2)]
    return [_resumed("a worker killed under torchrun", asked, restarts, traces)]


def _agent(asked: Asked) -> list[Found]:
    """The agent of torchrun is killed, and the same command is given again."""
    words = [*asked.words, "--checkpoint-seconds", str(_CHECKPOINT_SECONDS)]
    restarts: list[tuple[float, dict[int, Step]]] = []
    before: dict[int, Step] = {}
    traces: list[list[Step]] = []
    for number in range(asked.times + 1):
        with Running(asked.folder, words, workers=2, together=None) as running:
            running.until(lambda r=running, b=before: _replaced(r, b), "the training went on")
            if number < asked.times:
                _await_checkpoint(asked, running)
                before = dict(running.last())
                restarts.append((running.lose_agent(), before))
            traces = [list(running.steps(worker)) for worker in range(2)]
    return [_resumed("an agent of torchrun killed", asked, restarts, traces)]


def _await_checkpoint(asked: Asked, running: Running) -> None:
    running.until(running.together, "all workers took part")
    time.sleep(2.0 * _CHECKPOINT_SECONDS)
    asked.pause()


def _replaced(running: Running, before: dict[int, Step]) -> bool:
    last = running.last()
    return running.together() and all(last[worker].process != step.process for worker, step in before.items())


def _resumed(
    name: str, asked: Asked, restarts: Sequence[tuple[float, dict[int, Step]]], traces: Sequence[Sequence[Step]]
) -> Found:
    """From the times of the kills and the workers alive before each; steps are lost back to the checkpoint."""
    seconds, twice, resumed = [], [], True
    for killed, before in restarts:
        ended = [[s for s in traces[w] if s.process == step.process][-1] for w, step in before.items()]
        again = [
            first(traces[w][traces[w].index(last) :], lambda s, p=last.process: s.process != p)
            for w, last in zip(before, ended, strict=True)
        ]
        went = [step for step in again if step is not None]
        seconds.append(max(step.at for step in went) - killed)
        twice.append(max(step.step for step in ended) + 1 - min(step.step for step in went))
        resumed = resumed and len(went) == len(before) and all(step.step > 1 for step in went)
    apart = _off(Asked(**{**vars(asked), "workers": 2}), traces)
    more = {"workers": 2, "steps_twice": twice, "checkpoint_seconds": _CHECKPOINT_SECONDS, "off": apart}
    return Found(name, seconds, max(twice), resumed and apart <= ALIKE, more=more)


def _soak(asked: Asked) -> list[Found]:
    """A random worker is killed every so often, for long, between quiet times."""
    soak_seconds, every, quiet_seconds = asked.soak
    quiet: list[tuple[int, float]] = []
    busy: list[tuple[int, float]] = []
    kills = 0
    with Running(asked.folder, [*asked.words, "--digest-every", "100"], workers=asked.workers) as running:

        def furthest() -> int:
            return max(step.step for step in running.last().values())

        def watch(seconds: float, into: list[tuple[int, float]]) -> None:
            at, step = time.monotonic(), furthest()
            until = at + seconds
            while (rest := until - time.monotonic()) > 0:
                time.sleep(min(rest, 0.5))
                if running.process.poll() is not None:
                    raise Stuck(f"the training ended{running.last_words()}")
            into.append((furthest() - step, time.monotonic() - at))

        for _ in range(2):
            running.until(running.together, "all workers took part")
            watch(quiet_seconds, quiet)
            for _ in range(max(1, round(soak_seconds / 2 / every))):
                victims = sorted({s.process for s in running.last().values()} & set(running.children()))
                kills += 1
                end(asked.random.choice(victims))
                watch(every, busy)
        running.until(running.together, "all workers took part")
        watch(quiet_seconds, quiet)
        running.stop()
    rates = [sum(steps for steps, _ in parts) / sum(seconds for _, seconds in parts) for parts in (busy, quiet)]
    slowest = min(steps for steps, _ in busy)
    share = rates[0] / rates[1]
    more = {"kills": kills, "steps_per_second": rates[0], "steps_per_second_quiet": rates[1], "committed": share}
    more |= {"target": COMMITTED, "quiet": [s / t for s, t in quiet], "least_steps_after_a_kill": slowest}
    name = f"a worker killed every {every:g} s: {share:.0%} of the steps"
    return [Found(name, [], None, share >= COMMITTED and slowest > 0, more=more | {"times": kills})]


ROWS: dict[str, Callable[[Asked], list[Found]]] = {
    "worker": _killed,
    "server": _server,
    "frozen": frozen,
    "torchrun": _torchrun,
    "agent": _agent,
    "soak": _soak,
}


def _show(found: Sequence[dict[str, Any]]) -> None:
    program.show(
        "faults: seconds until the training goes on, and steps that were done once more",
        ("fault", "times", "median", "worst", "lost", "holds"),
        [
            (
                line["row"],
                str(line["times"]),
                *("-" if line[part] is None else f"{line[part]:.2f}" for part in ("median_seconds", "worst_seconds")),
                "-" if line["lost"] is None else str(line["lost"]),
                "yes" if line["holds"] else "NO",
            )
            for line in found
            if "error" not in line
        ],
    )
    program.show_errors(found)
