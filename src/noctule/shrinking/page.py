"""`shrink.html`: accuracy against bytes, latency and memory of all candidates, the front and the choice."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from noctule.measure import machine
from noctule.report import files
from noctule.report.charts import Line, LineChart, drawing
from noctule.report.html import templates
from noctule.report.palette import COLORS, COLORS_DARK, INK, INK_DARK, variables
from noctule.report.tables import Cell, Row, Table, value_cell
from noctule.report.units import duration, percent, ratio, size
from noctule.shrinking.candidates import Candidate
from noctule.shrinking.folder import Asked
from noctule.shrinking.front import front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = ("not on the front", "front", "chosen")
"""The legend, in the order of the colours."""


def write_page(
    folder: Path,
    asked: Asked,
    candidates: Sequence[Candidate],
    source: Candidate,
    chosen: Candidate | None,
    rebuild: str | None,
    tested: Mapping[str, Any],
) -> Path:
    """Write the page into the folder and return its path."""
    done = [each for each in candidates if each.file]
    best = {done[at].name for at in front([_costs(each) for each in done])}
    stopped = [(each.name, each.stopped) for each in candidates if each.stopped]
    headline = f"No candidate meets {' and '.join(asked.target)}"
    if chosen is not None:
        headline = (
            f"{chosen.name}: {ratio(source.bytes / chosen.bytes)} smaller, {ratio(source.latency_ms / chosen.latency_ms)} as fast, "
            f"{percent(tested['chosen'])} of the test part right; the source {percent(tested['source'])}"
        )
    text = (
        templates()
        .get_template("shrink.html")
        .render(
            title=f"{asked.model} on {asked.data}",
            headline=headline,
            facts=[*asked.target, asked.to, f"threads {asked.threads}", f"seed {asked.seed}", machine().get("cpu", "")],
            light=Markup(variables(INK, COLORS)),
            dark=Markup(variables(INK_DARK, COLORS_DARK)),
            charts_drawn=[
                _chart("Accuracy in % against bytes of the file", "kB", done, chosen, lambda each: each.bytes / 1e3),
                _chart("Accuracy in % against the time of a sample", "ms", done, chosen, lambda each: each.latency_ms),
                _chart("Accuracy in % against memory", "MB", done, chosen, _megabytes),
            ],
            candidates=_table(candidates, source, chosen, best),
            stopped=stopped,
            rebuild=rebuild,
        )
    )
    path = folder / "shrink.html"
    files.replace(path, text.encode())
    return path


def _costs(each: Candidate) -> tuple[float, ...]:
    return (each.bytes, each.latency_ms, -each.accuracy)


def _megabytes(each: Candidate) -> float | None:
    return None if each.memory_bytes is None else each.memory_bytes / 1e6


def _chart(
    title: str,
    unit: str,
    done: Sequence[Candidate],
    chosen: Candidate | None,
    cost: Callable[[Candidate], float | None],
) -> LineChart:
    """Accuracy in per cent over a cost, with the front of the two."""
    known = [(x, 100 * each.accuracy, each.name) for each in done if (x := cost(each)) is not None]
    best = sorted(known[at][:2] for at in front([(x, -y) for x, y, _ in known]))
    ours = [(x, y) for x, y, name in known if chosen is not None and name == chosen.name]
    rest = [(x, y) for x, y, _ in known if (x, y) not in best]
    lines = [
        Line(name, points, color) for color, (name, points) in enumerate(zip(PARTS, (rest, best, ours), strict=True))
    ]
    lines = [line for line in lines if line.points]
    words = " ".join(f"{name}: {x:.4g} {unit}, {y:.2f} %." for x, y, name in known)
    if not known:
        return LineChart(title, lines, None, words)

    def plot(axes: "Axes") -> None:
        axes.set_xlabel(unit)
        axes.set_xlim(0.0, 1.05 * max(x for x, _, _ in known))
        for line in lines:
            marks: dict[str, Any] = {"color": COLORS[line.color], "marker": "o", "linestyle": "none", "clip_on": False}
            if line.name == "front":
                marks["linestyle"] = "-"
            if line.name == "chosen":
                marks |= {
                    "markersize": 11,
                    "markerfacecolor": "none",
                    "markeredgewidth": 2,
                    "markeredgecolor": COLORS[line.color],
                }
            axes.plot(*zip(*line.points, strict=True), **marks)

    return LineChart(title, lines, drawing(plot)[0], words)


def _table(candidates: Sequence[Candidate], source: Candidate, chosen: Candidate | None, best: set[str]) -> Table:
    rows = []
    for each in sorted(candidates, key=lambda each: (each.name != source.name, each.file is None, -each.bytes)):
        own = chosen is not None and each.name == chosen.name
        if each.file is None:
            rows.append(Row(each.name, [Cell("stopped, see below", "none", 6), Cell()]))
            continue
        cells = [
            value_cell(size(each.bytes)),
            value_cell(ratio(source.bytes / each.bytes)),
            value_cell(duration(each.latency_ms / 1e3)),
            value_cell(duration(None if each.latency_64_ms is None else each.latency_64_ms / 1e3)),
            value_cell(size(each.memory_bytes)),
            value_cell(percent(each.accuracy)),
            Cell("chosen" if own else "front" if each.name in best else ""),
        ]
        rows.append(Row(each.name, cells, "total" if own else ""))
    heads = ("Candidate", "Bytes", "Smaller", "1 sample", "64 samples", "Memory", "Accuracy", "")
    return Table("All candidates, the largest file first after the source", heads, rows)
