"""The section about several workers: their pace, what they sent, how long they waited."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from noctule.report.charts import Bar, BarChart, Line, LineChart
from noctule.report.curves import EPOCHS, Records, titled
from noctule.report.facts import baseline_last, by_series, mapping, number
from noctule.report.palette import COLORS
from noctule.report.tables import Cell, Row, Table, value_cell
from noctule.report.units import GAP, MISSING, count, digits, percent, size
from noctule.report.useful_batch import useful_batch

Workers = Mapping[int, Records]
"""The records of each worker by its number; empty where its folder is lost or no epoch has finished."""

MOST_WORKERS = 12
"""The most workers with their own lines in a chart."""
MOST_STALE = 10
"""The staleness from which on all pushes share a bar."""
_MOST_ROWS = 100


def how_many(about: Mapping[str, Any], records: Records) -> int:
    """The number of workers; 0 in a run without a team."""
    said = [number(mapping(about, "together"), "workers"), *(number(r, "together", "workers") for r in records)]
    return max(0, *(int(workers) for workers in said if workers is not None), 0)


def how(about: Mapping[str, Any], records: Records) -> list[str]:
    """The number of workers, their strategy, codec and options, in words; none in a run without a team.

    >>> how({"together": {"workers": 3, "strategy": "diloco", "codec": "natural", "meet": 50}}, [])
    ['3 workers', 'diloco', 'natural', 'meet 50']
    """
    workers, options = how_many(about, records), mapping(about, "together")
    if not workers:
        return []
    names = {"strategy": "sync", "codec": "none"} | options
    others = [f"{name.replace('_', ' ')} {value}" for name, value in names.items() if name not in _SAID_OTHERWISE]
    codec = [] if names["codec"] == "none" else [str(names["codec"])]
    return [f"{count(workers)} worker{'' if workers == 1 else 's'}", str(names["strategy"]), *codec, *others]


_SAID_OTHERWISE = ("workers", "strategy", "codec", "ticket")


def everyone(about: Mapping[str, Any], records: Records, others: Workers) -> dict[int, Records]:
    """The records of all workers of a run, the expected ones and the found ones.

    Args:
        records: of the worker of this page.
        others: of the workers whose folders are inside this worker's folder.
    """
    mine = number(about, "worker") or next((n for r in reversed(records) if (n := number(r, "together", "worker"))), 0)
    if mine > 0:  # its own page: that of worker 0 tells of all
        return {int(mine): records}
    there = {0: records, **others}
    return {
        worker: there.get(worker, []) for worker in sorted({*range(min(how_many(about, records), _MOST_ROWS)), *there})
    }


@dataclass(frozen=True)
class Together:
    """What the page shows of several workers."""

    tables: Sequence[Table]
    notes: str
    hints: Sequence[str]
    charts: Sequence[LineChart | BarChart]


def together(workers: Workers) -> Together | None:
    """A table for each series, words and charts; None where no record tells of exchanges with other workers."""
    own = {worker: by_series([r for r in records if mapping(r, "together")]) for worker, records in workers.items()}
    names = baseline_last([name for series in own.values() for name in series])
    if not names:
        return None
    teams = {name: {worker: series.get(name, []) for worker, series in own.items()} for name in names}
    return Together(
        [_table(team, f"What each worker did{_of(name, names)}") for name, team in teams.items()],
        " ".join(_notes(list(teams.values()))),
        [hint for name, team in teams.items() if (hint := useful_batch(team, _of(name, names)))],
        [chart for name, team in teams.items() for chart in _charts(team, name if len(names) > 1 else "")],
    )


def _of(name: str, names: Sequence[str]) -> str:
    return f" ({name})" if len(names) > 1 else ""


# A table: a line for each worker.


@dataclass(frozen=True)
class _Column:
    head: str
    cell: Callable[[Records], str]
    total: Callable[[Sequence[Records]], str] = lambda _: ""


def _table(workers: Workers, caption: str) -> Table:
    recorded = [records for records in workers.values() if records]
    columns = [column for column in _columns() if any(column.cell(records) != MISSING for records in recorded)]
    lost = [Cell("no records", "none", span=len(columns))]
    rows = [
        Row(str(worker), [value_cell(column.cell(records)) for column in columns] if records else lost)
        for worker, records in workers.items()
    ]
    if 1 < len(workers) == len(recorded):
        rows.append(Row("all", [value_cell(column.total(recorded)) for column in columns], "total"))
    return Table(caption, ["Worker", *(column.head for column in columns)], rows)


def _adding_up(head: str, value: Callable[[Records], float | None], words: Callable[[float | None], str]) -> _Column:
    """A column with a sum over all workers, where all are known."""

    def total(everyone: Sequence[Records]) -> str:
        known = [found for records in everyone if (found := value(records)) is not None]
        return words(sum(known) if len(known) == len(everyone) else None)

    return _Column(head, lambda records: words(value(records)), total)


def _pace_in_words(value: float | None) -> str:
    return count(value) if value is None or value >= 100 else digits(value, 3)


def _share_in_exchanges(records: Records) -> str:
    shares = [number(record, "together", "exchange_share") for record in records]
    known = [share for share in shares if share is not None]
    return percent(fmean(known)) if known else MISSING


def _in_a_group_of(records: Records) -> str:
    if any(mapping(record, "together").get("groups") is None for record in records):
        return MISSING
    known = [workers for record in records if (workers := number(record, "together", "workers")) is not None]
    return " to ".join(dict.fromkeys([count(min(known)), count(max(known))])) if known else MISSING


def _mean_staleness(records: Records) -> str:
    stale = _staleness(records)
    return digits(sum(by * pushes for by, pushes in stale.items()) / stale.total(), 2) if stale else MISSING


def _columns() -> tuple[_Column, ...]:
    return (
        _adding_up("Samples per second", _pace, _pace_in_words),
        _adding_up("Sent per step", _sent_per_step, size),
        _adding_up("Sent in all", _sent_in_all, size),
        _Column("Time in exchanges", _share_in_exchanges),
        _Column("In a group of", _in_a_group_of),
        _Column("Groups", lambda records: count(number(records[-1], "together", "groups"))),
        _Column("Mean staleness", _mean_staleness),
    )


def _notes(teams: Sequence[Workers]) -> list[str]:
    notes = ["Samples and bytes per step are medians over the epochs."]
    notes.append(
        "Bytes are those of all messages, without what the transport adds; an epoch that was cut off counts from where it went on. "
        "Time in exchanges includes that for which a worker waits for slower ones."
    )
    if any(map(_served, teams)):
        notes.append("The staleness of a push is how many pushes of others its weights did not have yet.")
    else:
        notes.append(
            "A new group is formed whenever a worker is lost or joins; one that was started again counts its groups from one."
        )
    all_records = [record for team in teams for records in team.values() for record in records]
    links = dict.fromkeys(_link(said) for r in all_records if (said := mapping(r, "together").get("link")))
    if links:
        notes.append(f"The link between the workers, as measured when a group was formed: {'; '.join(links)}.")
    return notes


def _link(recorded: object) -> str:
    """The recorded link, with 4,250 for 4.25e+03."""
    words = re.sub(r"\d[.\d]*e\+\d+", lambda found: f"{float(found[0]):,.0f}", str(recorded))
    return words.replace(" M", f"{GAP}M").replace(" ms", f"{GAP}ms")


# Charts over the epochs, and how stale pushes were.


def _charts(workers: Workers, series: str) -> list[LineChart | BarChart]:
    stale = sum((_staleness(records) for records in workers.values()), Counter[int]())
    several = {worker: records for worker, records in workers.items() if len(records) > 1}
    notes = [series] if series else []
    cut = [f"the first {MOST_WORKERS} of {len(several)} workers"] if len(several) > MOST_WORKERS else []
    shown = dict(list(several.items())[:MOST_WORKERS])
    charts: list[LineChart | BarChart] = []
    if shown:
        paces = _lines(shown, lambda record: number(record, "samples_per_second"))
        charts.append(EPOCHS.chart(paces, titled("Samples per second", notes + cut)))
    sent = [value for records in shown.values() for record in records if (value := _sent(record)) is not None]
    if sent and max(sent) > 1.02 * min(sent):  # else the table says it all
        per, unit = next(((per, unit) for per, unit in _UNITS if max(sent) >= per), (1, "B"))
        lines = _lines(shown, lambda record: None if (value := _sent(record)) is None else value / per)
        if len({tuple(line.points) for line in lines}) == 1:
            lines = [replace(lines[0], name="each worker")]
        charts.append(EPOCHS.chart(lines, titled("Sent in an epoch", [*notes, unit, *cut]), f"{GAP}{unit}"))
    if stale:
        charts.append(BarChart(titled("Staleness of pushes", notes), _bars(stale)))
    return charts


_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def _lines(workers: Workers, value: Callable[[Mapping[str, Any]], float | None]) -> list[Line]:
    lines = []
    for place, (worker, records) in enumerate(workers.items()):
        points = EPOCHS.points(records, value)
        for at in range(len(points) - 1, 0, -1):
            if points[at][0] > points[at - 1][0] + 1:  # it was away
                points.insert(at, (points[at][0] - 1, None))
        lines.append(Line(f"worker {worker}", points, place, place // len(COLORS)))
    return lines


def _bars(stale: Mapping[int, int]) -> list[Bar]:
    pushes, most = sum(stale.values()), min(max(stale), MOST_STALE)
    bars = []
    for by in range(most + 1):
        those = sum(n for other, n in stale.items() if min(other, most) == by)
        name = f"{by} or more behind" if by == most < max(stale) else f"{by} behind"
        bars.append(
            Bar(name, those / pushes, f"{percent(those / pushes)} · {count(those)} push{'' if those == 1 else 'es'}")
        )
    return bars


# What records say.


def _served(workers: Workers) -> bool:
    return any(_staleness(records) for records in workers.values())


def _sent(record: Mapping[str, Any]) -> float | None:
    return number(record, "together", "sent_bytes")


def _sent_in_all(records: Records) -> float | None:
    known = [sent for record in records if (sent := _sent(record)) is not None]
    return sum(known) if known else None


def _sent_per_step(records: Records) -> float | None:
    """Bytes per step, the median over the epochs that followed directly on another."""
    found, before = [], 0.0
    for at, record in enumerate(records):
        step, sent = number(record, "step"), _sent(record)
        follows = number(record, "epoch") == (number(records[at - 1], "epoch") or 0) + 1 if at else True
        if step is not None and step > before and sent is not None and follows:
            found.append(sent / (step - before))
        before = before if step is None else step
    return _typical(found)


def _pace(records: Records) -> float | None:
    return _typical([pace for record in records if (pace := number(record, "samples_per_second")) is not None])


def _typical(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _staleness(records: Records) -> Counter[int]:
    """The number of pushes by their staleness; a restarted worker counts from zero again."""
    lives: list[Counter[int]] = []
    for record in records:
        said = mapping(mapping(record, "together"), "staleness")
        counts = Counter({int(by): int(n) for by in said if _is_number(by) and (n := number(said, by)) and n > 0})
        if lives and counts >= lives[-1]:
            lives.pop()
        lives.append(counts)
    return sum(lives, Counter[int]())


def _is_number(by: str) -> bool:
    return by.isdecimal() and len(by) < 10
