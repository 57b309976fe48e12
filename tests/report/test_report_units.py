"""Numbers in words, checked by eye."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import law

from noctule.report import facts, units


@pytest.mark.parametrize(
    ("words", "value", "text"),
    [
        (units.count, 125_685, "125,685"),
        (units.count, None, "not available"),
        (units.size, 0, "0 B"),
        (units.size, 999, "999 B"),
        (units.size, 999.9, "1.00 kB"),
        (units.size, 514_780, "515 kB"),
        (units.size, 999_600, "1.00 MB"),
        (units.size, 33_564_120, "33.6 MB"),
        (units.size, None, "not available"),
        (units.duration, 0, "0 ms"),
        (units.duration, 0.00812, "8.12 ms"),
        (units.duration, 0.4, "0.400 s"),
        (units.duration, 9.1199, "9.12 s"),
        (units.duration, 99.99, "1 min 40 s"),
        (units.duration, 11_111, "3 h 5 min"),
        (units.percent, 0, "0.0 %"),
        (units.percent, 1, "100.0 %"),
        (units.percent, 0.9123, "91.2 %"),
        (units.percent, 0.046, "4.6 %"),
        (units.percent, 0.00045, "0.045 %"),
        (units.percent, 0.9997, "99.97 %"),
        (units.ratio, 19.2, "19x"),
        (units.ratio, 6.84, "6.8x"),
        (units.ratio, 1, "1.0x"),
        (units.ratio, 0.44, "0.44x"),
        (units.ratio, 1234.5, "1,234x"),
        (units.energy, 4200, "4.20 kJ"),
    ],
)
def test_units_checked_by_eye(words, value, text):
    assert words(value).replace("\u00a0", " ").replace("\u00d7", "x") == text


@law
@given(st.floats(0, 1e18))
def test_no_number_is_too_odd_for_its_unit(value):
    for words in (units.count, units.size, units.duration, units.percent, units.ratio, units.energy):
        text = words(value)
        assert text
        assert "e" not in text.replace("not available", "")


@law
@given(st.floats(1e-3, 1e9))
def test_bytes_say_the_value_to_three_digits(value):
    number, unit = units.size(value).split("\u00a0")
    power = ["B", "kB", "MB", "GB"].index(unit)
    assert math.isclose(float(number.replace(",", "")) * 1000**power, value, rel_tol=6e-3)


@pytest.mark.parametrize("odd", [None, "7", True, math.nan, math.inf, -math.inf, 1e200, [1], {}])
def test_what_is_no_number_is_none(odd):
    assert facts.number({"a": odd}, "a") is None
    assert facts.number({"a": {"b": odd}}, "a", "b") is None
    assert facts.number(odd, "a") is None
