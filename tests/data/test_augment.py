"""What each augmentation does to a batch, against loops over pixels; and that batches have them wherever a run goes on."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from noctule.data import Batches, Dataset
from noctule.data.augment import cutout, flip, shift

law = settings(deadline=None, derandomize=True, max_examples=50)
seeds = st.integers(0, 2**32)


@st.composite
def images(draw: st.DrawFn) -> Tensor:
    """No pixel is zero, all differ."""
    shape = [draw(st.integers(1, 6)), *draw(st.lists(st.integers(1, 3), max_size=1))]
    shape += [draw(st.integers(1, 6)), draw(st.integers(1, 6))]
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_three(images: Tensor, generator: torch.Generator) -> Tensor:
    return cutout(flip(shift(images, generator, pixels=1), generator), generator, size=2)


def moved(image: Tensor, down: int, right: int) -> Tensor:
    """The oracle: pixel by pixel."""
    high, wide = image.shape[-2:]
    out = torch.zeros_like(image)
    for h, w in itertools.product(range(high), range(wide)):
        if 0 <= h - down < high and 0 <= w - right < wide:
            out[..., h, w] = image[..., h - down, w - right]
    return out


@law
@given(images(), seeds, st.integers(0, 4))
def test_shift_moves_each_image_and_fills_with_zeros(x: Tensor, seed: int, pixels: int) -> None:
    steps = range(-pixels, pixels + 1)
    for before, after in zip(x, shift(x, generator(seed), pixels=pixels), strict=True):
        assert any(torch.equal(after, moved(before, down, right)) for down in steps for right in steps)


def test_shift_goes_everywhere_alike_and_no_further() -> None:
    x = torch.zeros(9000, 1, 7, 7)
    x[..., 3, 3] = 1
    arrived = shift(x, generator(), pixels=2).sum(0)[0]
    assert arrived.sum() == len(x)
    assert arrived[1:6, 1:6].min() > 0.7 * len(x) / 25
    assert arrived[1:6, 1:6].sum() == len(x)


@law
@given(images(), seeds)
def test_shift_by_zero_is_the_identity(x: Tensor, seed: int) -> None:
    assert torch.equal(shift(x, generator(seed), pixels=0), x)


@law
@given(images(), seeds)
def test_flip_mirrors_some_images_and_leaves_the_others(x: Tensor, seed: int) -> None:
    for before, after in zip(x, flip(x, generator(seed)), strict=True):
        columns = range(x.shape[-1])
        mirrored = torch.stack([before[..., x.shape[-1] - 1 - w] for w in columns], -1)
        assert torch.equal(after, before) or torch.equal(after, mirrored)


def test_flip_goes_by_its_chance() -> None:
    x = torch.arange(2.0).expand(4000, 1, 1, 2)
    assert 0.2 < flip(x, generator(), chance=0.25)[:, 0, 0, 0].mean() < 0.3


@law
@given(images(), seeds, st.sampled_from([0.0, 0.5, 1.0]))
def test_flip_twice_alike_is_the_identity(x: Tensor, seed: int, chance: float) -> None:
    once = flip(x, generator(seed), chance=chance)
    assert torch.equal(flip(once, generator(seed), chance=chance), x)
    assert chance or torch.equal(once, x)


@law
@given(images(), seeds, st.integers(0, 8))
def test_cutout_blacks_out_a_square_and_nothing_outside(x: Tensor, seed: int, size: int) -> None:
    high, wide = x.shape[-2:]
    for before, after in zip(x, cutout(x, generator(seed), size=size), strict=True):
        candidates = []
        for middle_h, middle_w in itertools.product(range(high), range(wide)):
            cut = before.clone()
            for h, w in itertools.product(range(high), range(wide)):
                if 0 <= h - middle_h + size // 2 < size and 0 <= w - middle_w + size // 2 < size:
                    cut[..., h, w] = 0
            candidates.append(cut)
        assert any(torch.equal(after, cut) for cut in candidates)


def test_cutout_has_its_middle_anywhere() -> None:
    gone = (cutout(torch.ones(5000, 5, 5), generator(), size=1) == 0).sum(0)
    assert gone.sum() == 5000
    assert gone.min() > 0.7 * 5000 / 25


@law
@given(images(), seeds, st.sampled_from([shift, flip, partial(cutout, size=2), all_three]))
def test_the_same_generator_gives_the_same_batch_and_the_given_one_is_left_alone(
    x: Tensor, seed: int, function
) -> None:
    before = x.clone()
    made = function(x, generator(seed))
    assert torch.equal(made, function(x, generator(seed)))
    assert made.shape == x.shape
    made.fill_(-1)
    assert torch.equal(x, before)


def test_another_generator_gives_another_batch() -> None:
    x = torch.rand(20, 8, 8)
    for made in (lambda g: shift(x, g), lambda g: flip(x, g), lambda g: cutout(x, g, size=3)):
        assert not torch.equal(made(generator(0)), made(generator(1)))


def test_what_makes_no_sense_is_refused() -> None:
    x = torch.rand(2, 8, 8)
    with pytest.raises(ValueError, match="at least 0 pixels, got -1"):
        shift(x, generator(), pixels=-1)
    with pytest.raises(ValueError, match="at least 0 pixels, got -2"):
        cutout(x, generator(), size=-2)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        flip(x, generator(), chance=1.5)
    for function in (shift, flip, lambda x, g: cutout(x, g, size=1)):
        with pytest.raises(ValueError, match=r"\(B, ..., H, W\), got shape \(2, 64\)"):
            function(x.flatten(1), generator())


# -- in batches -------------------------------------------------------------------------------------------------------


def toy(rows: int = 23) -> Dataset:
    return Dataset(torch.rand(rows, 5, 4), torch.arange(rows) % 2, name="toy", classes=2)


@law
@given(st.integers(1, 30), st.integers(-(2**70), 2**70), st.integers(0, 99), st.data())
def test_starting_later_gives_the_tail(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    whole = toy()
    batches = Batches(whole, size, seed=seed, augment=all_three)
    start = data.draw(st.integers(0, len(batches)))
    state = torch.random.get_rng_state()
    tail = list(batches.epoch(epoch, start))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    for (x, y), (again, targets) in zip(list(batches.epoch(epoch))[start:], tail, strict=True):
        assert torch.equal(x, again)
        assert torch.equal(y, targets)
        assert x.shape == (len(y), whole.features)


def test_order_and_targets_are_those_without_augmentation() -> None:
    whole = toy()
    plain, changed = Batches(whole, 7, seed=3), Batches(whole, 7, seed=3, augment=lambda images, _: images * 2)
    for (x, y), (doubled, targets) in zip(plain.epoch(4), changed.epoch(4), strict=True):
        assert torch.equal(x * 2, doubled)
        assert torch.equal(y, targets)


def test_every_batch_of_every_epoch_has_numbers_of_its_own() -> None:
    def noise(images: Tensor, generator: torch.Generator) -> Tensor:
        return torch.rand(images.shape, generator=generator)

    seen = [
        x[0].tolist()
        for seed, epoch in itertools.product(range(3), range(3))
        for x, _ in Batches(toy(), 5, seed=seed, augment=noise).epoch(epoch)
    ]
    assert len(seen) == 45
    assert len(set(map(tuple, seen))) == 45


def test_samples_come_in_their_shape_and_a_table_flat() -> None:
    shapes = []

    def look(x: Tensor, _: torch.Generator) -> Tensor:
        shapes.append(tuple(x.shape))
        return x

    table = Dataset(torch.rand(6, 3), torch.zeros(6).long(), name="table", classes=1)
    for dataset in (toy(6), table):
        for x, _ in Batches(dataset, 6, seed=0, augment=look).epoch(0):
            x.fill_(9)
            assert dataset.inputs.max() < 1, "batches are copies"
    assert shapes == [(6, 5, 4), (6, 3)]


def test_an_augmentation_that_changes_the_shape_is_refused() -> None:
    batches = Batches(toy(), 5, seed=0, augment=lambda images, _: images[:, :2])
    with pytest.raises(ValueError, match=r"augment made \(5, 2, 4\) of a batch of shape \(5, 5, 4\)"):
        next(batches.epoch(0))
