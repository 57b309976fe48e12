"""Columns become numbers as the training rows say, and only as they say."""

from datetime import date

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.core.errors import DataError
from noctule.data.cells import date_format, number_style, to_date, to_number
from noctule.data.columns import MOST_LEVELS, Column, Skip, fit_column

law = settings(deadline=None, derandomize=True, max_examples=60)
TEXTS = st.sampled_from(["a", "b", "c", "", "?", "1", "2.5", "-3", "True", "no", "2020-02-03", "1,5", "x y"])


def texts(*cells: str) -> np.ndarray:
    return np.array(cells, object)


def place(row: int) -> str:
    return f"row {row}"


def fit(*cells: str, name: str = "column") -> Column:
    return fit_column(name, texts(*cells), place)


def encoded(column: Column, *cells: str) -> list[list[float]]:
    return column.encode(texts(*cells), place).inputs.tolist()


@law
@given(st.lists(TEXTS, min_size=1, max_size=30), st.lists(TEXTS, min_size=1, max_size=10))
def test_what_can_be_fitted_encodes_its_own_rows_to_finite_numbers_each_by_itself(
    train: list[str], more: list[str]
) -> None:
    try:
        column = fit(*train)
    except (Skip, DataError):
        return
    made = column.encode(texts(*train), place)
    assert made.warning is None
    assert made.inputs.shape == (len(train), column.width)
    assert made.inputs.dtype == np.float32
    assert np.isfinite(made.inputs).all()
    for row, cell in enumerate(train):
        assert encoded(column, cell)[0] == made.inputs[row].tolist()
    try:
        assert np.isfinite(column.encode(texts(*more), place).inputs).all()
    except DataError as error:
        assert "row" in str(error)  # noqa: PT017


def test_numbers_with_gaps() -> None:
    column = fit("1", "", "2", "9", "NA")
    assert (column.kind, column.fill, column.missing) == ("number", 2.0, True)
    assert encoded(column, "5", "?") == [[5, 0], [2, 1]]


def test_a_gap_where_training_had_none_is_filled_and_told() -> None:
    made = fit("1", "2", "9").encode(texts("", "4"), place)
    assert made.inputs.tolist() == [[2], [4]]
    assert made.warning == "'column' is missing in 1 rows but in no training row: 2 is taken"


def test_categories_and_levels_never_seen() -> None:
    column = fit("b", "a", "b", "")
    assert (column.kind, column.levels, column.missing) == ("category", ("b", "a"), True)
    made = column.encode(texts("a", "b", "", "z"), place)
    assert made.inputs.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert made.warning == "'column' has 'z' in 1 rows but in no training row: taken as none of the known"


def test_levels_that_a_file_happens_to_hold_as_numbers_are_the_same() -> None:
    column = fit("1", "2.5", "PC", "1", "PC")
    assert column.encode(np.array([1.0, 2.5]), place).inputs.tolist() == encoded(column, "1", "2.5")


def test_many_levels_are_one_number() -> None:
    cells = [f"level {at}" for at in range(MOST_LEVELS + 1)] * 2 + ["level 3"]
    column = fit(*cells)
    assert column.kind == "index"
    assert encoded(column, "level 3", "never", "level 0") == [[1], [0], [2]]


@pytest.mark.parametrize(
    ("cells", "wanted"), [(["True", "False", "True"], [1, 0, 1]), (["no", "Yes", "no"], [0, 1, 0])]
)
def test_flags(cells: list[str], wanted: list[int]) -> None:
    assert encoded(fit(*cells), *cells) == [[value] for value in wanted]


@pytest.mark.parametrize(
    ("cells", "days"),
    [
        (["2020-01-01", "2020-01-03"], [0, 2]),
        (["01.02.2020", "28.02.2020"], [0, 27]),
        (["1/13/2020", "1/2/2020"], [11, 0]),
        (["13/1/2020", "2/1/2020"], [11, 0]),
        (["1/13/2020 1:30 PM", "1/12/2020 12:00 AM"], [1.5625, 0]),
        (["3 Jan 2020", "1 Feb 2020"], [0, 29]),
        (["2020-01-01T12:00:00Z", "2020-01-02 06:00:00+00:00"], [0.5, 1.25]),
    ],
)
def test_dates_are_days_since_the_first(cells: list[str], days: list[float]) -> None:
    column = fit(*cells)
    assert column.kind == "date"
    assert [row[0] for row in encoded(column, *cells)] == days
    assert column.width == (5 if column.times else 3)


def test_day_and_month_that_could_be_either_is_told() -> None:
    assert "month before day" in fit("1/2/2020", "3/4/2020").describe()
    assert "before" not in fit("1/2/2020", "30/4/2020").describe()


def test_datetime64_and_its_text_are_the_same() -> None:
    days = np.array(["2021-05-06", "NaT", "2022-05-06T06:00"], "datetime64[us]")
    cells = ("2021-05-06 00:00:00", "", "2022-05-06 06:00:00")
    one, other = fit_column("day", days, place), fit(*cells, name="day")
    assert one.encode(days, place).inputs.tolist() == encoded(other, *cells)


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        (["1,5", "2", "-0,25"], [1.5, 2, -0.25]),
        (["1,234.5", "12"], [1234.5, 12]),
        (["1,234,567", "1,000"], [1234567, 1000]),
        (["$5.50", "$1,200.00"], [5.5, 1200]),
        (["12%", "7 %"], [12, 7]),
    ],
)
def test_numbers_as_people_write_them(cells: list[str], wanted: list[float]) -> None:
    assert encoded(fit(*cells), *cells) == [[value] for value in wanted]


def test_a_comma_that_could_be_either_is_refused() -> None:
    with pytest.raises(DataError, match=r"'1,234': is the comma that of thousands or of decimals"):
        fit("1,234", "5,678")


@law
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_what_its_text_says(value: float) -> None:
    assert to_number(repr(value)) == value
    assert to_number(f"{value:.3f}".replace(".", ","), "decimal comma") == float(f"{value:.3f}")
    assert number_style([f"{value:,.3f}"]) in ("plain", "thousands commas")
    assert to_number(f"{value:,.3f}", "thousands commas") == float(f"{value:.3f}")


@law
@given(st.dates(min_value=date(1000, 1, 1)))
def test_a_date_is_what_its_text_says(day) -> None:
    since = (day - date(1970, 1, 1)).days
    for form in ("%Y-%m-%d", "%d.%m.%Y", "%Y/%m/%d", "%d %b %Y"):
        cell = day.strftime(form)
        found = date_format([cell])
        assert found is not None
        assert to_date(cell, found[0]) == since


@pytest.mark.parametrize(
    ("cells", "name", "why"),
    [
        (["", "NA", "?"], "a", "empty"),
        (["3", "3.0", "3"], "a", "the same in every training row"),
        (["x", "x"], "a", "the same in every training row"),
        ([f"name {at}" for at in range(30)], "a", "a different text in"),
        (["3", "1", "2"], "PassengerId", "a key"),
        (["3", "1", "2"], "Unnamed: 0", "a key"),
    ],
)
def test_what_is_left_out(cells: list[str], name: str, why: str) -> None:
    with pytest.raises(Skip, match=why):
        fit(*cells, name=name)


def test_whole_numbers_that_differ_are_kept_under_another_name() -> None:
    assert fit("3", "1", "2", name="age").kind == fit("3", "1", "2", name="width").kind == "number"
    assert fit("3", "1", "1", name="id").kind == "number"


def test_a_few_cells_that_are_no_number_are_refused_and_many_are_a_category() -> None:
    with pytest.raises(DataError, match="row 2, column 'column': 'four' is no finite number, as 3 others"):
        fit("1", "2", "four", "3")
    assert fit("1", "PC 2", "four", "3").kind == "category"


@pytest.mark.parametrize("cell", ["inf", "1e99", "-Infinity"])
def test_numbers_beyond_float32_are_refused_with_their_place(cell: str) -> None:
    with pytest.raises(DataError, match=r"row 1, column 'column': '-?inf' is no finite number \(as float32\)"):
        fit("1", cell, "3").encode(texts("1", cell), place)


def test_another_kind_of_column_than_in_training_is_refused() -> None:
    with pytest.raises(DataError, match="row 1, column 'column': 'x' is no finite number, as it was in training"):
        fit("1", "2").encode(texts("1", "x"), place)
    with pytest.raises(DataError, match="holds numbers, but in training it held dates"):
        fit("2020-01-01", "2021-01-01").encode(np.array([1.0, 2.0]), place)
    with pytest.raises(DataError, match="'x' is no date"):
        fit("2020-01-01", "2021-01-01").encode(texts("x"), place)
