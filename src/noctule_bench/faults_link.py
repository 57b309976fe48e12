"""A fault of the link: it lets nothing through for a while, shorter or longer than workers wait."""

import time
from statistics import median
from typing import Any

from noctule.core.errors import NoctuleError
from noctule.testing.link import available, shaped_network
from noctule.testing.processes import Workers
from noctule_bench import faults_recipe
from noctule_bench.faults_recipe import TRACE, Step
from noctule_bench.faults_runs import Asked, Found, Stuck, Tail

PATIENCE, IMPATIENCE, PROMPT = 30.0, 2.0, 1.0
"""Time-outs above and below the time that a link is frozen, and how much later than that an error may come."""
_WIDTH, _TRAIN_SECONDS, _CALL_SECONDS = 128, 3.0, 120.0


def frozen(asked: Asked) -> list[Found]:
    """A link is frozen, for shorter and for longer than workers wait."""
    if why := available():
        raise NoctuleError(f"links cannot be frozen here: {why}")
    asked.folder.mkdir(parents=True)
    with (
        shaped_network(2, link=asked.link) as network,
        Workers(2, network=network, threads=1, group_timeout_seconds=PATIENCE) as group,
    ):

        def run(name: str, steps: int, freeze: bool) -> tuple[list[Any], list[list[Step]], float, float]:
            folder = asked.folder / name
            tails = [Tail(folder / str(rank) / TRACE) for rank in range(2)]
            begun = group.begin(faults_recipe.over_link, str(folder), steps, _WIDTH)
            at = thawed = 0.0
            if freeze:
                until, begin = time.monotonic() + _CALL_SECONDS, asked.random.randint(1, steps // 2)
                while not all(len(tail.read()) >= begin for tail in tails) and time.monotonic() < until:
                    time.sleep(0.002)
                network.freeze()
                at = time.monotonic()
                time.sleep(asked.frozen_seconds)
                thawed = time.monotonic()
                network.thaw()
            outcomes = begun.results(timeout_seconds=_CALL_SECONDS)
            return outcomes, [tail.read() for tail in tails], at, thawed

        _, (trial, _), _, _ = run("trial", 20, freeze=False)
        a_step = median(b.at - a.at for a, b in zip(trial[1:], trial[2:]))
        steps = max(20, round(_TRAIN_SECONDS / a_step))
        _, (alone, _), _, _ = run("alone", steps, freeze=False)
        undisturbed = [step.digest for step in alone]
        seconds, same = [], True
        for number in range(asked.times):
            errors, traces, frozen, thawed = run(f"frozen-{number}", steps, freeze=True)
            same = same and errors == [None, None] and all([s.digest for s in t] == undisturbed for t in traces)
            # what was on its way to a worker when the link froze may still have come
            still = [[s for s in trace if frozen + 1.0 < s.at < thawed] for trace in traces]
            if any(still) or not all(trace[-1].at > thawed for trace in traces):
                raise Stuck("the link was not frozen while the workers trained")
            seconds.append(max(min(s.at for s in trace if s.at > thawed) for trace in traces) - thawed)
        late = []
        group.group_timeout_seconds = IMPATIENCE
        for number in range(asked.times):
            group.form_group()
            errors, _, frozen, _ = run(f"given-up-{number}", steps, freeze=True)
            if None in errors:
                raise Stuck("a worker did not notice that the link was frozen")
            late.append(max(at for at, _ in errors) - frozen)
    length = {"workers": 2, "frozen_seconds": asked.frozen_seconds}
    prompt = max(late) <= IMPATIENCE + PROMPT
    return [
        Found("a link frozen: after the thaw all go on", seconds, 0, same, more=length | {"timeout_seconds": PATIENCE}),
        Found("a link frozen for too long: error", late, 0, prompt, more=length | {"timeout_seconds": IMPATIENCE}),
    ]
