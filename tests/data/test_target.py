"""Labels are numbered without a gap and get their names back; numbers with many values are predicted as numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.core.errors import DataError, UsageError
from noctule.data.target import Target, fit_target

law = settings(deadline=None, derandomize=True, max_examples=80)
labels = st.one_of(
    st.lists(st.text(min_size=1, max_size=4), min_size=2, max_size=40),
    st.lists(st.integers(-5, 4), min_size=2, max_size=40),
    st.lists(st.booleans(), min_size=2, max_size=40),
    st.lists(st.sampled_from([1.0, 2.0, 7.0]), min_size=2, max_size=40),
)


def place(row: int) -> str:
    return f"row {row}"


@law
@given(labels)
def test_class_numbers_are_a_bijection_onto_0_to_k(values: list) -> None:
    array = np.array(values, object if isinstance(values[0], str) else None)
    try:
        target = fit_target("y", array, place, task="classification")
    except DataError as error:
        assert "all" in str(error) or "no label" in str(error)  # noqa: PT017
        return
    numbers = target.encode(array, place)
    assert sorted(set(numbers.tolist())) == list(range(len(target.labels)))
    assert len(set(target.labels)) == len(target.labels)
    assert np.array_equal(target.encode(np.array(target.labels, object), place), np.arange(len(target.labels)))
    pairs = set(zip(map(str, array.tolist()), numbers.tolist(), strict=True))
    assert len({number for _, number in pairs}) == len(target.labels)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([1, 2, 3, 1], (1, 2, 3)),
        ([-1, 1, 1, -1], (-1, 1)),
        ([5, 0, 5, 0], (0, 5)),
        ([1.0, 2.0, 2.0], (1, 2)),
        ([True, False, True], ("False", "True")),
        (["b", "a", "b"], ("a", "b")),
        (["1", "-1", "1"], (-1, 1)),
        (["02", "01", "01"], ("01", "02")),
        ([0.5, 1.5, 0.5], ()),
        ([1990, 2001, 2002], ()),
        (list(range(1, 27)) * 5, tuple(range(1, 27))),
        ([*range(1, 27), 40] * 5, ()),
        (list(range(50)), ()),
        (["1.5", "2,5", "x"], ("1.5", "2,5", "x")),
    ],
)
def test_classes_or_a_number(values: list, wanted: tuple) -> None:
    array = np.array(values, object if isinstance(values[0], str | bool) else None)
    target = fit_target("y", array, place)
    assert target.labels == wanted
    assert target.task == ("classification" if wanted else "regression")
    assert ("a number" in target.describe()) == (not wanted)


def test_the_guess_can_be_overruled() -> None:
    whole = np.array([3, 4, 5, 3])
    assert fit_target("y", whole, place, task="regression").encode(whole, place).tolist() == [3, 4, 5, 3]
    assert fit_target("y", np.array([0.5, 1.5, 0.5]), place, task="classification").labels == (0.5, 1.5)
    with pytest.raises(UsageError, match="holds 'a', which is no number"):
        fit_target("y", np.array(["a", "b"], object), place, task="regression")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1, 1, 1], "is '1' in all 3 rows: there is nothing to learn with one class only"),
        (["a", "", "b"], "row 1: no label"),
        ([1.0, float("nan")], "row 1: no label"),
        ([f"name {at}" for at in range(100)], "100 different texts in 100 rows"),
        ([[1, 2], [3, 4]], r"labels of shape \(2, 2\)"),
    ],
)
def test_no_target(values: list, says: str) -> None:
    with pytest.raises(DataError, match=says):
        fit_target("y", np.array(values, object if isinstance(values[0], str) else None), place)


def test_a_label_that_is_no_class() -> None:
    with pytest.raises(DataError, match="row 1 has the label '3', which no train sample has"):
        Target("y", (1, 2)).encode(np.array([1, 3]), place)
