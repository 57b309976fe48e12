"""The charts of a run, drawn from its metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noctule.report.charts import Bar, BarChart, Line, LineChart, Point, line_chart
from noctule.report.facts import by_series, mapping, number, predicts_numbers
from noctule.report.palette import COLORS
from noctule.report.units import count, percent

Records = Sequence[Mapping[str, Any]]
MOST_LAYERS = 12


@dataclass(frozen=True)
class Across:
    """The x axis of a chart: a key of the records, the number of its units in a unit of the axis, label and title."""

    key: str
    per: float
    label: str
    title: str

    def chart(self, lines: Sequence[Line], what: str, unit: str = "") -> LineChart:
        """The chart of `what` against this axis."""
        epochs = self.key == "epoch"
        title = f"{what} by {self.title}"
        return line_chart(lines, title=title, x_label=self.label, unit=unit, whole_x=epochs, zero_x=not epochs)

    def points(self, records: Records, value: Callable[[Mapping[str, Any]], float | None]) -> list[Point]:
        """The points of the records in order; records without the key have none."""
        found = [(number(record, self.key), value(record)) for record in records]
        return sorted(((at / self.per, y) for at, y in found if at is not None), key=lambda point: point[0])


EPOCHS = Across("epoch", 1, "epoch", "epoch")


def learning(records: Records) -> list[LineChart]:
    """Validation accuracy (R² of a regression) and both losses, each against epochs and against the time spent training."""
    series, time = by_series(records), _time(records)
    losses = [_losses(series, EPOCHS), _losses(series, time)]
    if predicts_numbers(records):
        return [_r2(series, EPOCHS), _r2(series, time), *losses]
    return [_accuracy(series, EPOCHS), _accuracy(series, time), *losses]


def structure(records: Records) -> list[LineChart | BarChart]:
    """For each series with sparse layers: how dense each layer is, and the connections it moved by epoch."""
    layered = {name: [r for r in own if mapping(r, "layers")] for name, own in by_series(records).items()}
    sparse = {name: own for name, own in layered.items() if own}
    charts: list[LineChart | BarChart] = []
    for name, own in sparse.items():
        of = [name] if len(sparse) > 1 else []
        charts += [_densities(own, of), _moved(own, of)]
    return charts


def _accuracy(series: Mapping[str, Records], across: Across) -> LineChart:
    def accuracy(record: Mapping[str, Any]) -> float | None:
        value = number(record, "validation_accuracy")
        return None if value is None else 100 * value

    lines = [Line(name, across.points(own, accuracy), place) for place, (name, own) in enumerate(series.items())]
    return across.chart(lines, "Validation accuracy (%)", " %")


def _r2(series: Mapping[str, Records], across: Across) -> LineChart:
    lines = [
        Line(name, across.points(own, lambda record: number(record, "validation_r2")), place)
        for place, (name, own) in enumerate(series.items())
    ]
    return across.chart(lines, "Validation R²")


def _losses(series: Mapping[str, Records], across: Across) -> LineChart:
    lines = [
        Line(
            f"{name}, {kind}", across.points(own, lambda record, kind=kind: number(record, f"{kind}_loss")), place, dash
        )
        for place, (name, own) in enumerate(series.items())
        for dash, kind in enumerate(("validation", "train"))
    ]
    return across.chart(lines, "Loss")


def _densities(records: Records, of: list[str]) -> BarChart:
    layers = mapping(records[-1], "layers")
    bars = []
    for place, (name, layer) in enumerate(layers.items()):
        weights, places = number(layer, "weights"), number(layer, "places")
        if weights is not None and places:
            note = f"{percent(weights / places)} · {count(weights)} of {count(places)}"
            bars.append(Bar(_layer(name), weights / places, note, place))
    some = [f"the first {MOST_LAYERS} of {len(bars)} layers"] if len(bars) > MOST_LAYERS else []
    return BarChart(titled("Layer densities: weights of possible places", of + some), bars[:MOST_LAYERS])


def _moved(records: Records, of: list[str]) -> LineChart:
    lines = []
    for place, name in enumerate(mapping(records[-1], "layers")):
        points = EPOCHS.points(records, lambda record, name=name: number(record, "layers", name, "moved"))
        lines.append(Line(_layer(name), points, place, place // len(COLORS)))
    some = [f"the {MOST_LAYERS} busiest of {len(lines)} layers"] if len(lines) > MOST_LAYERS else []
    busiest = sorted(lines, key=lambda line: -sum(moved or 0 for _, moved in line.points))[:MOST_LAYERS]
    return EPOCHS.chart([line for line in lines if line in busiest], titled("Connections moved", of + some))


def _layer(name: str) -> str:
    return f"layer {name}" if name.isdigit() else name


def titled(what: str, notes: list[str]) -> str:
    """A title with notes in brackets."""
    return f"{what} ({', '.join(notes)})" if notes else what


def _time(records: Records) -> Across:
    longest = max((number(record, "seconds") or 0 for record in records), default=0)
    per, unit = (1, "s") if longest < 600 else (60, "min") if longest < 3 * 3600 else (3600, "h")
    return Across("seconds", per, f"training time ({unit})", "training time")
