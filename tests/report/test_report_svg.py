"""Charts are well-formed, keep their marks inside, name themselves, and use colours every reader can tell apart."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import law

from noctule.report import palette
from noctule.report.svg import HEIGHT, WIDTH, Bar, Line, bar_chart, line_chart

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40)
POINTS = st.lists(st.tuples(st.floats(0, 1e6), st.none() | st.floats(-1e100, 1e100)), max_size=60).map(
    lambda points: sorted(points, key=lambda point: point[0])
)
LINES = st.builds(Line, NAMES, POINTS, st.integers(0, 20), st.integers(0, 5))


def parse(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.sub(r" hidden>", ' hidden="">', figure))


@settings(law, max_examples=60)
@given(st.lists(LINES, max_size=4), NAMES, st.booleans())
def test_any_lines_make_a_well_formed_chart_inside_its_frame(lines, title, whole):
    figure = parse(line_chart(lines, title=title, x_label="epoch", whole_x=whole, zero_x=not whole))
    known = [point for line in lines for point in line.points if point[1] is not None]
    drawing = figure.find("div/svg")
    assert (drawing is None) == (not known)
    if drawing is None:
        return
    assert [item.text or "" for item in drawing.findall("title")] == [title]
    assert "".join(figure.find("ul").itertext()) == "".join(line.name for line in lines)
    numbers = [float(n) for path in drawing.findall("path") for n in re.findall(r"-?[\d.]+(?:e-?\d+)?", path.get("d"))]
    assert all(-0.01 <= x <= WIDTH + 0.01 for x in numbers[::2])
    assert all(-0.01 <= y <= HEIGHT + 0.01 for y in numbers[1::2])
    assert all(0 <= float(text.get("x")) <= WIDTH for text in drawing.findall("text"))


@law
@given(st.lists(st.builds(Bar, NAMES, st.floats(-1, 2), NAMES, st.integers(0, 20)), max_size=5), NAMES)
def test_any_bars_make_a_well_formed_chart_inside_its_frame(bars, title):
    drawing = parse(bar_chart(bars, title=title)).find("svg")
    widths = [float(rect.get("width")) for rect in drawing.findall("rect") if "bar" in rect.get("class")]
    assert widths == [round(min(1, max(0, bar.share)) * WIDTH, 2) for bar in bars]
    assert all(bar.note in drawing.find("desc").text for bar in bars)


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot():
    line = Line("a", [(1, 1.0), (2, None), (3, 3.0), (4, 2.0)])
    drawing = parse(line_chart([line], title="t", x_label="x")).find("div/svg")
    strokes = [stroke for stroke in drawing.find("path").get("d").split("M") if stroke]
    assert [len(set(stroke.split("L"))) for stroke in strokes] == [1, 2]
    assert len(drawing.findall("circle")) == 3


def test_thousands_of_points_make_a_small_drawing():
    lines = [Line(name, [(x, x % 17 + 0.1) for x in range(20_000)]) for name in "ab"]
    assert len(line_chart(lines, title="t", x_label="x")) < 20_000


def test_a_line_is_described_in_words():
    lines = [Line("a", [(1, 80.0), (2, 91.25)]), Line("b", [(1, None)])]
    drawing = parse(line_chart(lines, title="t", x_label="x", unit=" %"))
    words = drawing.find("div/svg/desc").text
    assert "a: 2 values, from 80 % to 91.25 %" in words
    assert "b: no finite value." in words


def linear(color: str) -> np.ndarray:
    channels = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    darker, lighter = sorted(float(linear(color) @ [0.2126, 0.7152, 0.0722]) for color in (a, b))
    return (lighter + 0.05) / (darker + 0.05)


SIGHTS = {  # Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = np.array(XYZ) @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("colors", [palette.COLORS, palette.COLORS_DARK], ids=["light", "dark"])
def test_lines_are_told_apart_by_every_sight(colors, sight):
    seen = [lab(np.array(SIGHTS[sight]) @ linear(color)) for color in colors]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20


@pytest.mark.parametrize(
    ("ink", "colors"),
    [(palette.INK, palette.COLORS), (palette.INK_DARK, palette.COLORS_DARK)],
    ids=["light", "dark"],
)
def test_text_and_lines_stand_out_from_the_page(ink, colors):
    assert min(contrast(ink[text], ink["page"]) for text in ("ink", "soft", "accent")) >= 4.5
    assert contrast(ink["ink"], ink["panel"]) >= 4.5
    assert contrast(colors[1], ink["page"]) >= 4.5  # also the colour of a ratio below one
    assert min(contrast(color, ink["page"]) for color in colors) >= 3
