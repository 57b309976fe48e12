"""Standardised train features have mean 0 and deviation 1, or are 0; the other parts go by the train part's scale."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.data import Dataset, Splits, standardize

law = settings(deadline=None, derandomize=True, max_examples=50)


def part(inputs: torch.Tensor) -> Dataset:
    return Dataset(inputs, torch.zeros(len(inputs), dtype=torch.int64), name="toy", classes=1)


def splits_of(train: torch.Tensor, test: torch.Tensor | None = None) -> Splits:
    other = part(train if test is None else test)
    return Splits(part(train), other, other)


@law
@given(st.integers(2, 1500), st.floats(-1e3, 1e3), st.floats(1e-3, 1e6), st.integers(0, 99))
def test_train_features_have_mean_0_and_deviation_1(rows: int, shift: float, scale: float, seed: int) -> None:
    draws = torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    draws[0], draws[1] = -1, 1  # no feature is constant
    after = standardize(splits_of(draws * scale + shift * scale)).train.inputs.double()
    assert after.mean(0).abs().max() < 1e-5
    assert (after.std(0, correction=0) - 1).abs().max() < 1e-5


@law
@given(st.integers(1, 1500), st.floats(-(2.0**99), 2.0**99, width=32))
def test_a_feature_that_is_constant_in_train_is_0_everywhere(rows: int, value: float) -> None:
    after = standardize(splits_of(torch.full((rows, 1), value), torch.tensor([[0.0], [value], [1e6]])))
    assert not after.train.inputs.any()
    assert not after.test.inputs.any()


@law
@given(st.integers(0, 99))
def test_it_is_undone_by_nothing_and_done_only_once(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    once = standardize(splits_of(torch.rand(50, 4, generator=generator), torch.rand(7, 4, generator=generator)))
    twice = standardize(once)
    assert torch.allclose(once.train.inputs, twice.train.inputs, atol=1e-5)
    assert torch.allclose(once.test.inputs, twice.test.inputs, atol=1e-5)


def test_by_hand_and_without_touching_what_was_given() -> None:
    before = splits_of(torch.tensor([[0.0, 5.0], [4.0, 5.0]]), torch.tensor([[2.0, 5.0], [6.0, 7.0]]))
    after = standardize(before)
    assert after.train.inputs.tolist() == [[-1, 0], [1, 0]]
    assert after.test.inputs.tolist() == [[0, 0], [2, 0]]
    assert before.train.inputs.tolist() == [[0, 5], [4, 5]]
    assert before.test.inputs.tolist() == [[2, 5], [6, 7]]


def test_huge_values_do_not_overflow_on_the_way() -> None:
    after = standardize(splits_of(torch.tensor([[-3e38], [3e38]])))
    assert after.train.inputs.tolist() == [[-1], [1]]


def test_shape_name_and_targets_stay() -> None:
    pictures = Dataset(torch.rand(6, 2, 3), torch.arange(6), name="toy", classes=6)
    after = standardize(Splits(pictures, pictures, pictures)).validation
    assert (after.shape, after.name, after.classes) == ((2, 3), "toy", 6)
    assert torch.equal(after.targets, pictures.targets)
