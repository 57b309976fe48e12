"""Charts as inline SVG, drawn by matplotlib in the colours of the page: the one file that imports it.

A new kind of chart is a function that gives `drawing` what to do with a pair of axes.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from noctule.report.palette import COLORS, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Point = tuple[float, float | None]
"""x and y; y is None where nothing was measured."""

WIDTH, HEIGHT = 400, 240  # of the drawing, in its own units: a phone shows them about one to one
DASHES = {"solid": "-", "dashed": (0, (2.5, 2)), "dotted": (0, (0.05, 2))}
_MOST_POINTS = 300
_DOT_ROOM = 8  # units of the drawing for each point of a line, from which on points have dots


@dataclass(frozen=True)
class Line:
    """A line of a chart, its points ordered by x; `color` counts through the palette, `dash` through DASHES."""

    name: str
    points: Sequence[Point]
    color: int = 0
    dash: int = 0

    @property
    def dash_name(self) -> str:
        """The line style, as the style sheet calls it."""
        return tuple(DASHES)[self.dash % len(DASHES)]

    @property
    def color_name(self) -> str:
        """The colour, as a custom property of the style sheet."""
        return f"c{self.color % len(COLORS)}"


@dataclass(frozen=True)
class LineChart:
    """A finished chart of lines; `svg` is None where no line has a finite value."""

    title: str
    lines: Sequence[Line]
    svg: Markup | None
    description: str
    frame: str = ""
    """Left, top, right and bottom edge in the drawing, then the ends of the x axis and of the y axis."""
    x_label: str = ""
    unit: str = ""
    whole_x: bool = False
    width: int = WIDTH
    height: int = HEIGHT


@dataclass(frozen=True)
class Bar:
    """A bar: the `share` (0 to 1) of a whole, and the words at its end."""

    name: str
    share: float
    note: str
    color: int = 0

    @property
    def color_name(self) -> str:
        """The colour, as a custom property of the style sheet."""
        return f"c{self.color % len(COLORS)}"

    @property
    def percent(self) -> str:
        """The length of the bar, at most that of the whole."""
        return f"{100 * max(0.0, min(1.0, self.share)):.2f}"


@dataclass(frozen=True)
class BarChart:
    """Bars under one another, each the share of a whole. The template draws them: their names are text that wraps."""

    title: str
    bars: Sequence[Bar]


def line_chart(
    lines: Sequence[Line], *, title: str, x_label: str, unit: str = "", whole_x: bool = False, zero_x: bool = False
) -> LineChart:
    """A chart of `lines`: y in `unit`, x counted in integers if `whole_x` and starting at 0 if `zero_x`."""
    words = " ".join(_describe(line, unit) for line in lines)
    known = [x for line in lines for x, y in line.points if y is not None]
    if not known:
        return LineChart(title, lines, None, words)
    ends = min(0.0 if zero_x else known[0], *known), max(known)
    if ends[1] - ends[0] <= 1e-9 * max(map(abs, ends)):
        pad = max(0.5, 0.05 * abs(ends[0]))
        ends = ends[0] - pad, ends[1] + pad

    def plot(axes: "Axes") -> None:
        axes.set_xlim(*ends)
        axes.set_xlabel(x_label)
        axes.locator_params("x", integer=whole_x, min_n_ticks=1 if whole_x else 2, nbins=7)
        axes.locator_params("y", nbins=6)
        for number, line in enumerate(lines):
            _plot(axes, line, gid=f"line-{number}")
        _short_numbers(axes.xaxis)
        _short_numbers(axes.yaxis)

    svg, axes = drawing(plot)
    box = axes.bbox
    edges = [box.x0, HEIGHT - box.y1, box.x1, HEIGHT - box.y0, *axes.get_xlim(), *axes.get_ylim()]
    return LineChart(title, lines, svg, words, " ".join(repr(float(edge)) for edge in edges), x_label, unit, whole_x)


def drawing(plot: "Callable[[Axes], None]") -> tuple[Markup, "Axes"]:
    """What `plot` draws on a pair of axes, as the content of an `<svg viewBox="0 0 WIDTH HEIGHT">`, and the axes.

    Colours of the palette become custom properties, so that the page's style sheet chooses them. A `gid` of an artist becomes
    its `data-gid`. The user's own settings of matplotlib change nothing.
    """
    import matplotlib.style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        figure.set_layout_engine("tight", pad=0.15)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        plot(axes)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    return Markup(_for_the_page(file.getvalue())), axes


_STYLE: dict[str, Any] = {
    "figure.dpi": 72,
    "axes.edgecolor": INK["line"],
    "axes.labelcolor": INK["soft"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.autolimit_mode": "round_numbers",
    "axes.labelpad": 6,
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "axes.prop_cycle": f"cycler('color', {list(COLORS)})",
    "grid.color": INK["line"],
    "lines.linewidth": 2,
    "lines.markersize": 4.5,
    "lines.markeredgewidth": 0,
    "lines.solid_capstyle": "round",
    "lines.dash_capstyle": "round",
    "xtick.color": INK["soft"],
    "ytick.color": INK["soft"],
    "ytick.major.size": 0,
    "xtick.major.pad": 6,  # phones show larger letters than are planned for here
    "ytick.major.pad": 5,
    "font.size": 12,
    "axes.labelsize": 12,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "font.family": "DejaVu Sans",  # comes with matplotlib; wider than what pages are shown in, so labels have room
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "noctule",
}
_VARIABLES = {value: f"var(--{name})" for name, value in INK.items()}
_VARIABLES |= {value: f"var(--c{place})" for place, value in enumerate(COLORS)}


def _for_the_page(svg: str) -> str:
    """The content of an SVG file without what a page has already: header, metadata, fonts, ids that nothing refers to."""
    content = svg.partition("</metadata>")[2].rpartition("</svg>")[0]
    content = re.sub(r"<style.*?</style>", "", content, flags=re.DOTALL)
    content = re.sub(r"<[^>]*>", lambda tag: _tag(tag[0]), content)
    return re.sub(r">\s+<", "><", re.sub(r"<defs>\s*</defs>", "", content)).strip()


def _tag(tag: str) -> str:
    tag = re.sub(r"\s+", " ", tag)
    tag = re.sub(r' id="(\w+-\d+)"', r' data-gid="\1"', tag)
    tag = re.sub(r' id="[a-z0-9.]+_\d+"', "", tag)
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)
    tag = re.sub(r'(?<= d=)"[^"]*"', lambda path: re.sub(r" ?([MLCQz]) ?", r"\1", path[0]), tag)
    tag = re.sub(r"font-size: [^;]*; font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r"#[0-9a-f]{6}\b", lambda color: _VARIABLES.get(color[0], color[0]), tag)
    tag = re.sub(r'(?<= style=)"[^"]*"', lambda style: style[0].replace("; ", ";").replace(": ", ":"), tag)
    tag = tag.replace("xlink:href", "href")
    return re.sub(r"(\.\d)\d+" if tag.startswith(("<use", "<text")) else r"(\.\d\d)\d+", r"\1", tag)


def _short_numbers(axis: "Axis") -> None:
    """Write 40k for 40,000, where ticks differ in the digits that this leaves."""
    from matplotlib.ticker import EngFormatter

    low, high = axis.get_view_interval()
    largest = max(abs(low), abs(high))
    if 1e4 <= largest < 1e15 and high - low > 1e-3 * largest:
        axis.set_major_formatter(EngFormatter(sep=""))


def _plot(axes: "Axes", line: Line, *, gid: str) -> None:
    """Draw one line: gaps where y is None, dots where there are few points or one stands alone."""
    points = thin(line.points)
    (low, high), span = axes.get_xlim(), points[-1][0] - points[0][0] if points else 0.0
    dots = len(points) * _DOT_ROOM <= 0.9 * WIDTH * span / (high - low)
    alone = [
        at
        for at, (_, y) in enumerate(points)
        if y is not None and all(other is None for _, other in points[max(0, at - 1) : at] + points[at + 1 : at + 2])
    ]
    axes.plot(
        [x for x, _ in points],
        [float("nan") if y is None else y for _, y in points],
        color=COLORS[line.color % len(COLORS)],
        linestyle=DASHES[line.dash_name],
        marker="o",
        markevery=None if dots else alone,
        clip_on=False,
        gid=gid,
    )


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most `most` of `points`, in order: the first, the last, and the lowest and highest of each stretch between."""
    if len(points) <= most:
        return list(points)
    inner = points[1:-1]
    stretches = (most - 2) // 2
    kept = [points[0]]
    for index in range(stretches):
        stretch = inner[index * len(inner) // stretches : (index + 1) * len(inner) // stretches]
        known = [(y, place) for place, (_, y) in enumerate(stretch) if y is not None]
        ends = {min(known)[1], max(known)[1]} if known else {0}  # where all are gaps, a gap stays
        kept.extend(stretch[place] for place in sorted(ends))
    return [*kept, points[-1]]


def _describe(line: Line, unit: str) -> str:
    known = [y for _, y in line.points if y is not None]
    if not known:
        return f"{line.name}: no finite value."
    first, last, low, high = (f"{value:.4g}{unit}" for value in (known[0], known[-1], min(known), max(known)))
    return f"{line.name}: {len(known)} values, from {first} to {last}, lowest {low}, highest {high}."
