"""Every sample lands in exactly one part, every class in its share, and only the validation part follows the seed."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from noctule.core.errors import DataError, UsageError
from noctule.data import Dataset, Splits, split

law = settings(deadline=None, derandomize=True, max_examples=50)


def make(rows: int, classes: int = 3, features: int = 1) -> Dataset:
    """Row numbers as inputs, so that a sample can be followed."""
    inputs = torch.arange(rows).unsqueeze(1).expand(rows, features)
    targets = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(rows))
    return Dataset(inputs, targets, name="toy", classes=classes)


def rows_of(part: Dataset) -> list[int]:
    return part.inputs[:, 0].long().tolist()


@law
@given(st.integers(3, 300), st.floats(0.01, 0.6), st.floats(0.01, 0.6), st.integers(-(2**70), 2**70))
def test_parts_are_disjoint_and_complete(rows: int, validation: float, test: float, seed: int) -> None:
    assume(max(1, round(rows * validation)) + max(1, round(rows * test)) < rows)
    whole = make(rows)
    splits = split(whole, validation=validation, test=test, seed=seed)
    parts = [rows_of(part) for part in (splits.train, splits.validation, splits.test)]
    assert sorted(row for part in parts for row in part) == list(range(rows))
    assert all(part == sorted(part) for part in parts)
    assert len(parts[1]) == max(1, round(rows * validation))
    assert len(parts[2]) == max(1, round(rows * test))
    for part in (splits.train, splits.validation, splits.test):
        assert torch.equal(part.targets, whole.targets[rows_of(part)])


@law
@given(st.integers(2, 300), st.integers(1, 8), st.floats(0.01, 0.9), st.integers(0, 99))
def test_each_class_has_its_share_to_within_one_sample(rows: int, classes: int, share: float, seed: int) -> None:
    whole = make(rows, classes)
    count = max(1, round(rows * share))
    assume(count < rows)
    drawn = split(whole, validation=share, test=make(3, classes), seed=seed).validation
    wanted = torch.bincount(whole.targets, minlength=classes) * count / rows
    assert (torch.bincount(drawn.targets, minlength=classes) - wanted).abs().max() < 1


@law
@given(st.integers(0, 2**64), st.integers(0, 2**64))
def test_the_seed_moves_validation_and_never_test(one: int, other: int) -> None:
    whole = make(200)
    a, b = split(whole, seed=one), split(whole, seed=other)
    assert rows_of(a.test) == rows_of(b.test)
    assert rows_of(split(whole, seed=one).validation) == rows_of(a.validation)
    assert one % 2**32 == other % 2**32 or rows_of(a.validation) != rows_of(b.validation)


def test_parts_that_are_given_are_kept() -> None:
    whole, validation, test = make(20), make(5), make(6)
    splits = split(whole, validation=validation, test=test)
    assert splits.validation is validation
    assert splits.test is test
    assert rows_of(splits.train) == list(range(20))


def test_a_validation_of_0_leaves_all_but_the_test_part_to_train() -> None:
    whole = make(20)
    splits = split(whole, validation=0)
    assert splits.validation is None
    assert sorted(rows_of(splits.train) + rows_of(splits.test)) == list(range(20))
    assert rows_of(splits.test) == rows_of(split(whole).test)


@pytest.mark.parametrize("fraction", [1, -0.1, 1.5, float("nan")])
def test_fractions_outside_0_to_1_are_a_usage_error(fraction: float) -> None:
    with pytest.raises(UsageError, match="validation fraction must lie between 0 and 1"):
        split(make(10), validation=fraction)
    with pytest.raises(UsageError, match="test fraction"):
        split(make(10), test=fraction)


def test_a_test_part_there_must_be() -> None:
    with pytest.raises(UsageError, match="test fraction must lie between 0 and 1, not 0"):
        split(make(10), test=0)


@pytest.mark.parametrize(("rows", "validation", "test"), [(1, 0.1, 0.1), (2, 0.1, 0.1), (10, 0.5, 0.5)])
def test_nothing_left_to_train_on(rows: int, validation: float, test: float) -> None:
    with pytest.raises(DataError, match=rf"'toy' has {rows} samples: .* leave none to train on"):
        split(make(rows), validation=validation, test=test)


def test_parts_must_agree_in_features_and_classes() -> None:
    with pytest.raises(DataError, match="test has 2 features but train has 1"):
        Splits(make(9), make(9), make(9, features=2))
    with pytest.raises(DataError, match="validation has 4 classes but train has 3"):
        Splits(make(9), make(9, classes=4), make(9))
