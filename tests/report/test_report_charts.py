"""Charts are well-formed, keep their marks inside, describe themselves, and use colours that every reader can tell apart."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import law

from noctule.report import palette
from noctule.report.charts import HEIGHT, WIDTH, Bar, Line, LineChart, drawing, line_chart, thin

NAMES = st.text(max_size=20)
POINTS = st.lists(st.tuples(st.floats(0, 1e6), st.none() | st.floats(-1e100, 1e100)), max_size=60).map(
    lambda points: sorted(points, key=lambda point: point[0])
)
LINES = st.builds(Line, NAMES, POINTS, st.integers(0, 20), st.integers(0, 5))


def parse(chart: LineChart) -> ElementTree.Element:
    return ElementTree.fromstring(f"<svg>{chart.svg}</svg>")


def drawn(chart: LineChart, number: int) -> list[list[float]]:
    """The numbers of each stroke of a line."""
    path = parse(chart).find(f".//*[@data-gid='line-{number}']/path").get("d")
    return [[float(n) for n in re.findall(r"-?[\d.]+", stroke)] for stroke in path.split("M") if stroke]


def dots(chart: LineChart) -> int:
    return len(parse(chart).findall(".//*[@data-gid='line-0']//use"))


def words(chart: LineChart) -> list[str]:
    return [text.text for text in parse(chart).iter("text")]


@settings(law, max_examples=25)
@given(st.lists(LINES, max_size=3), st.booleans())
def test_any_lines_make_a_well_formed_chart_inside_its_frame(lines, whole):
    chart = line_chart(lines, title="t", x_label="epoch", whole_x=whole, zero_x=not whole)
    assert (chart.svg is None) == all(y is None for line in lines for _, y in line.points)
    if chart.svg is None:
        return
    left, top, right, bottom = map(float, chart.frame.split()[:4])
    assert 0 <= left < right <= WIDTH
    assert 0 <= top < bottom <= HEIGHT
    for number, line in enumerate(lines):
        if any(y is not None for _, y in line.points):
            numbers = [n for stroke in drawn(chart, number) for n in stroke]
            assert all(left - 0.02 <= x <= right + 0.02 for x in numbers[::2])
            assert all(top - 0.02 <= y <= bottom + 0.02 for y in numbers[1::2])
    assert all(0 <= float(text.get("x")) <= WIDTH for text in parse(chart).iter("text"))


def test_the_frame_says_where_the_data_lie():
    chart = line_chart([Line("a", [(2, 10.0), (4, 15.0)])], title="t", x_label="x")
    left, top, right, bottom, x0, x1, y0, y1 = map(float, chart.frame.split())
    assert (x0, x1) == (2, 4)
    assert y0 <= 10 < 15 <= y1
    places = [
        left,
        bottom - (10 - y0) / (y1 - y0) * (bottom - top),
        right,
        bottom - (15 - y0) / (y1 - y0) * (bottom - top),
    ]
    assert drawn(chart, 0) == [pytest.approx(places, abs=0.011)]


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot():
    points = [(1, 1.0), (2, None), (3, 3.0), (4, 2.0)]
    chart = line_chart([Line("a", points)], title="t", x_label="x")
    assert [len(stroke) // 2 for stroke in drawn(chart, 0)] in ([1, 2], [2])  # what has no length need not be drawn
    assert dots(chart) == 3
    many = [*points, *((x, 1.0) for x in range(5, 200)), (200, None), (201, 3.0)]
    assert dots(line_chart([Line("a", many)], title="t", x_label="x")) == 2


def test_thousands_of_points_make_a_small_drawing():
    lines = [Line(name, [(x, x % 17 + 0.1) for x in range(20_000)]) for name in "ab"]
    assert len(line_chart(lines, title="t", x_label="x").svg) < 20_000


def test_a_line_is_described_in_words():
    lines = [Line("a", [(1, 80.0), (2, 91.25)]), Line("b", [(1, None)])]
    said = line_chart(lines, title="t", x_label="x", unit=" %").description
    assert "a: 2 values, from 80 % to 91.25 %" in said
    assert "b: no finite value." in said


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.71, 0.89, ["0.70", "0.75", "0.80", "0.85", "0.90"]),
        (0, 15_000, ["0", "5k", "10k", "15k"]),
        (-2, 2, ["\u22122", "\u22121", "0", "1", "2"]),
        (0, 2.4e6, ["0", "1M", "2M"]),
        (1234567.25, 1234567.5, ["+1.234567e6"]),
    ],
)
def test_some_axes_checked_by_eye(low, high, texts):
    found = words(line_chart([Line("a", [(1, low), (2, high)])], title="t", x_label="epoch", whole_x=True))
    assert set(texts) <= set(found)
    assert {"1", "2", "epoch"} <= set(found)


@pytest.mark.parametrize("x", [1.0, 7.0])
def test_an_only_epoch_is_a_whole_number(x):
    found = words(line_chart([Line("a", [(x, 0.5)])], title="t", x_label="epoch", whole_x=True))
    assert f"{x:.0f}" in found
    assert f"{x - 0.2:.1f}" not in found


def test_the_pages_style_sheet_chooses_colours_and_fonts():
    svg = line_chart([Line("a", [(1, 1.0), (2, 2.0)], 4)], title="t", x_label="x").svg
    assert "var(--c4)" in svg
    assert not re.search(r"#[0-9a-f]{6}|font|<style|<metadata", svg)


def test_settings_of_the_user_change_nothing():
    lines = [Line("a", [(1, 1.0), (2, 2.0)])]
    before = line_chart(lines, title="t", x_label="x")
    with matplotlib.rc_context({"axes.grid": False, "lines.linewidth": 9, "text.usetex": True, "font.size": 30}):
        assert line_chart(lines, title="t", x_label="x") == before


def test_labels_are_text_whatever_they_contain():
    label = '$x_1$ <b>&"'
    svg, _ = drawing(lambda axes: axes.set_xlabel(label))
    assert label in words(LineChart("t", [], svg, ""))


def test_a_new_kind_of_chart_is_a_function_of_axes():
    svg, _ = drawing(lambda axes: axes.scatter([1, 2, 3], [3, 1, 2]))
    assert str(svg).count("<use") >= 3
    assert "var(--c0)" in svg


@law
@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=300), st.integers(6, 80))
def test_thinning_keeps_order_ends_and_extremes(values, most):
    points = list(enumerate(values))
    kept = thin(points, most)
    assert len(kept) <= most
    assert kept == [point for point in points if point in kept]
    if points:
        assert kept[0] == points[0]
        assert kept[-1] == points[-1]
    known = [y for y in values if y is not None]
    if known:
        seen = [y for _, y in kept if y is not None]
        assert (min(seen), max(seen)) == (min(known), max(known))


def test_a_long_gap_stays_a_gap():
    points = [(x, None if 400 <= x < 600 else 1.0) for x in range(1000)]
    kept = thin(points, 100)
    assert any(y is None for _, y in kept)
    assert all(400 <= x < 600 for x, y in kept if y is None)


@law
@given(st.floats(-1, 2))
def test_a_bar_is_no_longer_than_its_whole(share):
    assert float(Bar("a", share, "").percent) == round(100 * min(1, max(0, share)), 2)


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
