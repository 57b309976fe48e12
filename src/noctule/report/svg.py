"""Charts as inline SVG, drawn by pure functions: lines over an axis, and bars of a whole."""

from collections.abc import Sequence
from dataclasses import dataclass

from noctule.report.markup import shorten, text
from noctule.report.palette import COLORS
from noctule.report.ticks import Point, labels, thin, ticks

WIDTH, HEIGHT = 400, 240  # of the drawing, in its own units: a phone shows them about one to one
TOP, BOTTOM = 10, 42
CHARACTER = 6.8  # the width of a digit, the same for every font that is likely here
DASHES = ("solid", "dashed", "dotted")


@dataclass(frozen=True)
class Line:
    """One line of a chart, its points ordered by x; `color` counts through the palette, `dash` through DASHES."""

    name: str
    points: Sequence[Point]
    color: int = 0
    dash: int = 0

    @property
    def style(self) -> str:
        """The classes that colour and dash it."""
        return f"c{self.color % len(COLORS)} {DASHES[self.dash % len(DASHES)]}"


@dataclass(frozen=True)
class Bar:
    """One bar: the `share` (0 to 1) of a whole, and the words at its end."""

    name: str
    share: float
    note: str
    color: int = 0


@dataclass(frozen=True)
class Frame:
    """Where the data lie in the drawing: the left edge and both axes from end to end."""

    left: float
    right: float
    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Drawing coordinates of a point of the data."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = (x - x0) / (x1 - x0) * (self.right - self.left)
        return round(self.left + across, 2), round(HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP), 2)


def line_chart(
    lines: Sequence[Line], *, title: str, x_label: str, unit: str = "", whole_x: bool = False, zero_x: bool = False
) -> str:
    """A figure of `lines`: y in `unit`, x counted in integers if `whole_x` and starting at 0 if `zero_x`."""
    known = [point for line in lines for point in line.points if point[1] is not None]
    if not known:
        return f'<figure class="chart"><figcaption>{text(title)}</figcaption><p>No finite value recorded.</p></figure>'
    frame, x_ticks, y_ticks = _frame(known, whole_x=whole_x, zero_x=zero_x)
    data = [frame.left, TOP, frame.right, HEIGHT - BOTTOM, *frame.x, *frame.y]
    legend = "".join(f"<li>{_swatch(line)}{text(line.name)}</li>" for line in lines)
    return (
        f'<figure class="chart"><figcaption>{text(title)}</figcaption><ul class="legend">{legend}</ul>'
        f'<div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-frame="{" ".join(map(repr, data))}" '
        f'data-x="{text(x_label)}" data-whole="{whole_x:d}" data-unit="{text(unit)}">'
        f"<title>{text(title)}</title><desc>{text(' '.join(_describe(line, unit) for line in lines))}</desc>"
        f"{_axes(frame, x_ticks, y_ticks, x_label, unit)}{''.join(_line(line, frame) for line in lines)}"
        f'<line class="rule" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f'<div class="readout" aria-hidden="true" hidden></div></div></figure>'
    )


def bar_chart(bars: Sequence[Bar], *, title: str) -> str:
    """A figure of `bars`, one under another, each the share of a whole."""
    row = 36
    rows = []
    for place, bar in enumerate(bars):
        y = place * row
        name = shorten(bar.name, int((WIDTH - CHARACTER * len(bar.note)) / 7.2))
        rows.append(
            f'<text class="name" x="0" y="{y + 14}">{text(name)}</text>'
            f'<text class="note" x="{WIDTH}" y="{y + 14}" text-anchor="end">{text(bar.note)}</text>'
            f'<rect class="track" x="0" y="{y + 20}" width="{WIDTH}" height="8" rx="2"/>'
            f'<rect class="bar c{bar.color % len(COLORS)}" x="0" y="{y + 20}" '
            f'width="{max(0.0, min(1.0, bar.share)) * WIDTH:.2f}" height="8" rx="2"/>'
        )
    words = " ".join(f"{bar.name}: {bar.note}." for bar in bars)
    return (
        f'<figure class="chart"><figcaption>{text(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {max(1, len(bars)) * row}" role="img">'
        f"<title>{text(title)}</title><desc>{text(words)}</desc>{''.join(rows)}</svg></figure>"
    )


def _frame(
    known: Sequence[Point], *, whole_x: bool, zero_x: bool
) -> tuple[Frame, list[tuple[float, str]], list[tuple[float, str]]]:
    ys = [y for _, y in known if y is not None]
    y_values = ticks(min(ys), max(ys))
    y_labels = labels(y_values)
    x0, x1 = min(0.0 if zero_x else known[0][0], *(x for x, _ in known)), max(x for x, _ in known)
    if x1 - x0 <= 1e-9 * max(abs(x0), abs(x1)):
        pad = max(0.5, 0.05 * abs(x0))
        x0, x1 = x0 - pad, x1 + pad
    left = 8 + CHARACTER * max(map(len, y_labels))
    for most in (8, 6, 4, 3):
        inside = [x for x in ticks(x0, x1, most=most, whole=whole_x) if x0 <= x <= x1] or [x0]
        x_labels = labels(inside)
        if len(inside) * (CHARACTER * max(map(len, x_labels)) + 12) < WIDTH - left:
            break
    right = WIDTH - max(6, CHARACTER * len(x_labels[-1]) / 2)
    frame = Frame(left, right, (x0, x1), (y_values[0], y_values[-1]))
    return frame, list(zip(inside, x_labels, strict=True)), list(zip(y_values, y_labels, strict=True))


def _axes(
    frame: Frame, x_ticks: list[tuple[float, str]], y_ticks: list[tuple[float, str]], x_label: str, unit: str
) -> str:
    parts = []
    for value, label in y_ticks:
        _, y = frame.place(frame.x[0], value)
        parts.append(f'<line class="grid" x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{frame.left - 6:.1f}" y="{y + 4}" text-anchor="end">{text(label)}</text>')
    for value, label in x_ticks:
        x, y = frame.place(value, frame.y[0])
        parts.append(f'<line class="tick" x1="{x}" x2="{x}" y1="{y}" y2="{y + 4}"/>')
        parts.append(f'<text x="{x}" y="{y + 17}" text-anchor="middle">{text(label)}</text>')
    middle = (frame.left + frame.right) / 2
    parts.append(f'<text class="axis" x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{text(x_label)}</text>')
    return "".join(parts)


def _line(line: Line, frame: Frame) -> str:
    path, dots, pen = [], [], "M"
    points = thin(line.points)
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        px, py = frame.place(x, y)
        path.append(f"M{px},{py}L{px},{py}" if pen == "M" else f"L{px},{py}")  # alone between gaps: a dot
        dots.append(f'<circle class="c{line.color % len(COLORS)}" cx="{px}" cy="{py}" r="2.2"/>')
        pen = "L"
    room = (frame.right - frame.left) * (points[-1][0] - points[0][0]) / (frame.x[1] - frame.x[0]) if points else 0
    drawn = "".join(dots) if len(points) == 1 or len(points) * 8 <= room else ""
    return f'<path class="line {line.style}" data-name="{text(line.name)}" d="{"".join(path)}"/>{drawn}' if path else ""


def _swatch(line: Line) -> str:
    path = f'<path class="line {line.style}" d="M1,4L23,4"/>'
    return f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true">{path}</svg>'


def _describe(line: Line, unit: str) -> str:
    known = [y for _, y in line.points if y is not None]
    if not known:
        return f"{line.name}: no finite value."
    first, last, low, high = (f"{value:.4g}{unit}" for value in (known[0], known[-1], min(known), max(known)))
    return f"{line.name}: {len(known)} values, from {first} to {last}, lowest {low}, highest {high}."
