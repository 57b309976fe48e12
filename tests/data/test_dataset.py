"""A data set holds what it was given, in one form, or says what is wrong and where."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.core.errors import DataError
from noctule.data import Dataset

law = settings(deadline=None, derandomize=True, max_examples=50)


def make(rows: int = 6, features: int = 4, classes: int = 3) -> Dataset:
    inputs = torch.arange(rows * features, dtype=torch.float32).reshape(rows, features)
    return Dataset(inputs, torch.arange(rows) % classes, name="toy", classes=classes)


@law
@given(
    st.sampled_from([torch.uint8, torch.int16, torch.int64, torch.float16, torch.float64]),
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
)
def test_any_real_dtype_and_shape_becomes_flat_float32_rows(dtype: torch.dtype, shape: list[int]) -> None:
    inputs = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    made = Dataset(inputs.transpose(0, 1), torch.zeros(shape[1], dtype=torch.uint8), name="toy", classes=1)
    assert made.inputs.dtype is torch.float32
    assert made.inputs.is_contiguous()
    assert made.inputs.shape == (len(made), made.features)
    assert made.targets.dtype is torch.int64
    assert made.shape == (tuple(inputs.transpose(0, 1).shape[1:]) if len(shape) > 2 else None)
    assert torch.equal(made.inputs, inputs.transpose(0, 1).flatten(1).float())


@law
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_take_gives_those_rows_in_that_order(indices: list[int]) -> None:
    whole = make()
    part = whole.take(indices)
    assert torch.equal(part.inputs, whole.inputs[indices])
    assert torch.equal(part.targets, whole.targets[indices])
    assert (part.name, part.classes, part.shape) == (whole.name, whole.classes, whole.shape)


def test_take_understands_a_mask_and_copies() -> None:
    whole = make()
    part = whole.take(whole.targets == 1)
    assert part.targets.tolist() == [1, 1]
    part.inputs.zero_()
    assert whole.inputs[1].tolist() == [4, 5, 6, 7]


def test_take_of_nothing_is_an_empty_set() -> None:
    with pytest.raises(DataError, match="'toy' is empty"):
        make().take([])


@law
@given(st.integers(0, 9_000), st.integers(0, 2), st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300]))
def test_the_first_row_that_is_not_finite_is_named(row: int, column: int, bad: float) -> None:
    inputs = torch.zeros(9_001, 3, dtype=torch.float64)
    inputs[row, column] = bad
    inputs[-1, -1] = float("nan")
    with pytest.raises(DataError, match=rf"'toy' has the input (nan|-?inf) in row {row}, feature {column} "):
        Dataset(inputs, torch.zeros(9_001, dtype=torch.int64), name="toy", classes=1)


def test_huge_finite_inputs_are_fine_though_their_sum_is_not() -> None:
    made = Dataset(torch.full((3, 2), 3e38), torch.zeros(3, dtype=torch.int64), name="toy", classes=1)
    assert made.inputs.min() == torch.tensor(3e38)


@law
@given(st.integers(0, 5), st.sampled_from([-1, 3, 2**40]))
def test_the_first_label_out_of_range_is_named(row: int, bad: int) -> None:
    targets = torch.zeros(6, dtype=torch.int64)
    targets[row:] = bad
    with pytest.raises(DataError, match=rf"label {bad} in row {row}; with 3 classes .* from 0 to 2"):
        Dataset(torch.zeros(6, 2), targets, name="toy", classes=3)


@pytest.mark.parametrize(
    ("inputs", "targets", "shape", "says"),
    [
        (torch.zeros(0, 3), torch.zeros(0).long(), None, "is empty"),
        (torch.zeros(3, 0), torch.zeros(3).long(), None, "is empty"),
        (torch.zeros(3, 2), torch.zeros(4).long(), None, "3 inputs but 4 targets"),
        (torch.zeros(3), torch.zeros(3).long(), None, r"\(samples, features\)"),
        (torch.zeros(3, 2), torch.zeros(3, 10).long(), None, r"targets of shape \(3, 10\)"),
        (torch.zeros(3, 2), torch.zeros(3), None, "float32 targets"),
        (torch.zeros(3, 2, dtype=torch.complex64), torch.zeros(3).long(), None, "complex64 inputs"),
        (torch.zeros(3, 6), torch.zeros(3).long(), (2, 2), r"6 features, which do not fill .*\(2, 2\)"),
    ],
)
def test_what_cannot_be_a_data_set_is_refused(
    inputs: torch.Tensor, targets: torch.Tensor, shape: tuple[int, ...] | None, says: str
) -> None:
    with pytest.raises(DataError, match=f"data set 'toy' .*{says}"):
        Dataset(inputs, targets, name="toy", classes=1, shape=shape)


@pytest.mark.parametrize(("given", "shape"), [((8, 7), (1, 8, 7)), ((3, 8, 7), (3, 8, 7)), ((3, 3, 3), (3, 3, 3))])
def test_images_have_channels_height_and_width(given: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert Dataset(torch.rand(2, *given), torch.zeros(2).long(), name="toy", classes=1).image_shape == shape


@pytest.mark.parametrize(
    ("given", "says"),
    [((8,), "no shape, which are no images"), ((2, 2, 2, 2), "no images"), ((8, 8, 3), "channels come last")],
)
def test_what_is_no_image_says_so(given: tuple[int, ...], says: str) -> None:
    with pytest.raises(DataError, match=f"data set 'toy' .*{says}.*; give "):
        _ = Dataset(torch.rand(2, *given), torch.zeros(2).long(), name="toy", classes=1).image_shape
