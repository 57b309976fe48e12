import copy
import io
import pickle
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from noctule.core.remap import Remap, exchange, merge, resize, resize_full
from noctule.core.topology import Topology, named

laws = settings(max_examples=60, deadline=None, derandomize=True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def topologies(draw: st.DrawFn, most: int = 9) -> Topology:
    shape = draw(st.integers(0, most)), draw(st.integers(0, most))
    keys = draw(st.sets(st.integers(0, max(shape[0] * shape[1] - 1, 0)))) if shape[0] * shape[1] else set()
    return Topology.from_keys(shape, torch.tensor(sorted(keys), dtype=torch.int64))


def dense(topology: Topology, values: Tensor) -> Tensor:
    full = torch.zeros(topology.places, dtype=values.dtype)
    full[topology.keys()] = values
    return full.view(topology.shape)


def numbers(topology: Topology) -> Tensor:
    """Its values, none of them zero."""
    return torch.arange(1.0, topology.size + 1)


def check(topology: Topology) -> None:
    """The invariants."""
    (out_features, in_features), n = topology.shape, topology.size
    assert topology.row_ptr.shape == (out_features + 1,)
    assert topology.columns.shape == (n,)
    assert int(topology.row_ptr[0]) == 0
    assert int(topology.row_ptr[-1]) == n
    keys = topology.keys()
    assert (keys.diff() > 0).all()
    assert n == 0 or 0 <= int(keys[0]) <= int(keys[-1]) < topology.places
    assert topology.columns.dtype == (torch.uint16 if in_features <= 65_536 else torch.int32)
    assert topology.row_ptr.dtype == torch.int32


# -- making one ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 30), st.integers(0, 30), st.floats(0.0, 1.0), st.integers(0, 99))
@laws
def test_random_has_exactly_so_many_places(out_features, in_features, density, seed):
    weights = round(density * out_features * in_features)
    topology = Topology.random((out_features, in_features), weights, generator=seeded(seed))
    assert topology.size == weights
    check(topology)
    assert topology == Topology.random((out_features, in_features), weights, generator=seeded(seed))


def test_keys_of_63_bits():
    shape = 1_000_000, 2**31 - 1
    topology = Topology.random(shape, 300, generator=seeded())
    assert int(topology.keys()[-1]) > 2**50
    assert Topology.from_places(shape, topology.rows(), topology.columns) == topology
    corner = Topology.from_places(shape, torch.tensor([999_999]), torch.tensor([2**31 - 2]))
    assert corner.keys().tolist() == [shape[0] * shape[1] - 1]
    assert int(corner.columns[0]) == 2**31 - 2


def assert_uniform(counts: Tensor, draws: int, each: int) -> None:
    """Counts of how often each of several things was among the ``each`` drawn; draws without repetition vary less."""
    p = each / counts.numel()
    score = (counts - draws * p) / (draws * p * (1 - p)) ** 0.5
    assert score.abs().max() < 4.5
    assert abs((score**2).mean() - 1) < 6 * (2 / counts.numel()) ** 0.5


@pytest.mark.parametrize("weights", [1, 5, 12, 13, 23])
def test_random_is_uniform(weights):
    counts, generator, draws = torch.zeros(24), seeded(), 2000
    for _ in range(draws):
        counts[Topology.random((4, 6), weights, generator=generator).keys()] += 1
    assert_uniform(counts, draws, weights)


def test_every_set_of_places_is_as_likely():
    counts, generator = {}, seeded()
    for _ in range(3000):
        keys = tuple(Topology.random((2, 3), 2, generator=generator).keys().tolist())
        counts[keys] = counts.get(keys, 0) + 1
    assert len(counts) == 15
    assert all(abs(count - 200) < 70 for count in counts.values())


@pytest.mark.parametrize("weights", [-1, 13])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ValueError, match="do not fit"):
        Topology.random((3, 4), weights)


@pytest.mark.parametrize("shape", [(-1, 3), (3, 2**31)])
def test_impossible_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="features must lie"):
        Topology.random(shape, 0)


@given(topologies(), st.randoms(use_true_random=False))
@laws
def test_places_in_any_order_give_the_same(topology, random):
    check(topology)
    order = list(range(topology.size))
    random.shuffle(order)
    again = Topology.from_places(topology.shape, topology.rows()[order], topology.columns.to(torch.int64)[order])
    assert again == topology
    check(again)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([0, 0], [1, 1], "twice"),
        ([0, 2], [1, 1], r"rows must lie in \[0, 2\)"),
        ([0, -1], [1, 1], "rows must lie"),
        ([0, 1], [1, 3], r"columns must lie in \[0, 3\)"),
        ([0, 1], [1], "two equal lists"),
        ([[0, 1]], [[1, 1]], "two equal lists"),
    ],
)
def test_wrong_places_are_refused(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        Topology.from_places((2, 3), torch.tensor(rows), torch.tensor(columns))


# -- reading it ---------------------------------------------------------------------------------------------------


@given(topologies())
@laws
def test_transposed_is_the_transpose(topology):
    t = topology.transposed
    values = numbers(topology)
    turned = Topology(topology.shape[::-1], t.row_ptr, t.columns)
    check(turned)
    assert torch.equal(dense(turned, values[t.slots.to(torch.int64)]), dense(topology, values).t())
    assert topology.transposed is t


@given(topologies())
@laws
def test_rows_columns_and_keys_agree(topology):
    full = torch.zeros(topology.shape, dtype=torch.bool)
    full[topology.rows(), topology.columns.to(torch.int64)] = True
    assert full.flatten().nonzero()[:, 0].tolist() == topology.keys().tolist()
    assert topology.density == (topology.size / topology.places if topology.places else 1.0)


def test_bytes_are_those_of_the_arrays():
    topology = Topology.random((10, 20), 50)
    assert topology.nbytes == 11 * 4 + 50 * 2
    _ = topology.transposed
    assert topology.nbytes == 11 * 4 + 50 * 2 + 21 * 4 + 50 * 2 + 50 * 4


@given(topologies(), st.integers(0, 90), st.integers(0, 9))
@laws
def test_missing_places_are_distinct_and_not_here(topology, count, seed):
    missing = topology.missing(count, generator=seeded(seed))
    assert missing.numel() == min(count, topology.places - topology.size)
    assert (missing.diff() > 0).all()
    assert not set(missing.tolist()) & set(topology.keys().tolist())
    assert missing.numel() == 0 or 0 <= int(missing[0]) <= int(missing[-1]) < topology.places
    assert torch.equal(missing, topology.missing(count, generator=seeded(seed)))


@pytest.mark.parametrize(("weights", "count"), [(6, 3), (6, 12), (12, 5), (20, 2)])
def test_missing_is_uniform(weights, count):
    topology, generator, draws = Topology.random((4, 6), weights, generator=seeded(1)), seeded(), 1500
    counts = torch.zeros(24)
    for _ in range(draws):
        counts[topology.missing(count, generator=generator)] += 1
    free = counts[[key for key in range(24) if key not in topology.keys().tolist()]]
    assert counts.sum() == free.sum()
    assert_uniform(free, draws, count)


def test_few_missing_places_are_found_at_once():
    topology = Topology.random((1000, 1000), 1_000_000 - 20, generator=seeded())
    start = time.process_time()
    assert topology.missing(10, generator=seeded()).numel() == 10
    assert time.process_time() - start < 1.0


def test_equality_is_of_shape_and_places():
    places = torch.tensor([0, 1]), torch.tensor([1, 0])
    topology = Topology.from_places((2, 2), *places)
    assert topology == Topology.from_places((2, 2), *places)
    assert topology != Topology.from_places((2, 3), *places)
    assert topology != Topology.from_places((2, 2), *places[::-1][:1], torch.tensor([1, 1]))
    assert topology != Topology.from_places((2, 2), torch.tensor([0]), torch.tensor([1]))
    assert topology != "a topology"
    assert topology == Topology((2, 2), topology.row_ptr.to(torch.int64), topology.columns.to(torch.int32))


def test_five_million_features_take_what_the_weights_take():
    start = time.process_time()
    topology = Topology.random((5_000_000, 5_000_000), 100_000, generator=seeded())
    assert topology.missing(100_000, generator=seeded()).numel() == 100_000
    assert topology.size == 100_000
    assert topology.transposed.columns.dtype == torch.int32
    assert topology.nbytes < 60e6  # two row pointers of 20 MB; a dense mask would be 25 TB
    assert time.process_time() - start < 10.0


# -- keeping it ---------------------------------------------------------------------------------------------------


@given(topologies())
@laws
def test_state_round_trip(topology):
    file = io.BytesIO()
    torch.save(topology.state_dict(), file)
    file.seek(0)
    again = Topology.from_state_dict(torch.load(file, weights_only=True))
    assert again == topology
    assert again.row_ptr.dtype == topology.row_ptr.dtype
    assert again.columns.dtype == topology.columns.dtype


def good() -> dict:
    return {"shape": [2, 3], "row_ptr": torch.tensor([0, 1, 3]), "columns": torch.tensor([2, 0, 1])}


GARBAGE = {
    "nothing": {},
    "text": "topology",
    "none": None,
    "list": [1, 2],
    "no columns": {k: v for k, v in good().items() if k != "columns"},
    "one number": {**good(), "shape": 5},
    "one feature": {**good(), "shape": [2]},
    "fractions": {**good(), "shape": [2.0, 3.0]},
    "infinite": {**good(), "shape": [float("inf"), 3]},
    "negative": {**good(), "shape": [-2, 3]},
    "huge": {**good(), "shape": [2**40, 3]},
    "other shape": {**good(), "shape": [3, 3]},
    "narrow": {**good(), "shape": [2, 2]},
    "list of pointers": {**good(), "row_ptr": [0, 1, 3]},
    "2-d pointers": {**good(), "row_ptr": torch.tensor([[0, 1, 3]])},
    "2-d columns": {**good(), "columns": torch.tensor([[2, 0, 1]])},
    "0-d columns": {**good(), "columns": torch.tensor(2)},
    "real columns": {**good(), "columns": torch.tensor([2.0, 0.5, 1.0])},
    "sparse pointers": {**good(), "row_ptr": torch.tensor([0, 1, 3]).to_sparse()},
    "sparse columns": {**good(), "columns": torch.tensor([2, 0, 1]).to_sparse()},
    "falling pointers": {**good(), "row_ptr": torch.tensor([0, 4, 3])},
    "late start": {**good(), "row_ptr": torch.tensor([1, 1, 3])},
    "early end": {**good(), "row_ptr": torch.tensor([0, 1, 2])},
    "no pointers": {**good(), "row_ptr": torch.tensor([], dtype=torch.int64)},
    "twice": {**good(), "columns": torch.tensor([2, 1, 1])},
    "negative column": {**good(), "columns": torch.tensor([-1, 0, 1])},
    "wide column": {**good(), "columns": torch.tensor([3, 0, 1])},
}


@pytest.mark.parametrize("state", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_a_value_error(state):
    with pytest.raises(ValueError, match=r"topology|lie|twice|fit"):
        Topology.from_state_dict(state)


def test_columns_in_any_order_within_a_row_are_sorted():
    assert Topology.from_state_dict({**good(), "columns": torch.tensor([2, 1, 0])}) == Topology.from_state_dict(good())


def test_copies():
    topology = Topology.random((4, 5), 7)
    assert copy.deepcopy(topology) is topology
    for again in (copy.copy(topology), pickle.loads(pickle.dumps(topology))):
        assert again == topology
        check(again)
        assert int(again.handle) != int(topology.handle)
    wide = Topology.random((2, 70_000), 7)
    assert pickle.loads(pickle.dumps(wide)) == wide
    file = io.BytesIO()
    torch.save(topology, file)
    file.seek(0)
    assert torch.load(file, weights_only=False) == topology


def test_handles_name_the_living():
    topology = Topology.random((4, 5), 7)
    handle = topology.handle
    assert named(handle) is topology
    del topology
    with pytest.raises(KeyError):
        named(handle)


def test_to_the_same_device_is_itself():
    topology = Topology.random((4, 5), 7)
    assert topology.to("cpu") is topology


# -- what happened to it ------------------------------------------------------------------------------------------


@given(topologies(), st.data())
@laws
def test_remap_between_carries_what_stays(old, data):
    weights = data.draw(st.integers(0, old.places))
    new = Topology.random(old.shape, weights, generator=seeded(weights))
    remap = Remap.between(old, new)
    assert (remap.old_size, remap.new_size) == (old.size, new.size)
    x, kept = numbers(old), dense(old, numbers(old))
    assert torch.equal(dense(new, remap.apply(x)), kept * (dense(new, torch.ones(new.size)) > 0))
    fresh = remap.apply(x, new=-7.0) == -7.0
    assert int(fresh.sum()) == remap.grown == len(set(new.keys().tolist()) - set(old.keys().tolist()))
    there = torch.full((new.size,), -7.0)
    assert torch.equal(remap.apply(x, new=there), remap.apply(x, new=-7.0))


@given(topologies(), st.integers(0, 9))
@laws
def test_remaps_compose_and_the_identity_is_one(old, seed):
    same = Remap.between(old, Topology.from_keys(old.shape, old.keys()))
    assert torch.equal(same.old_slot, torch.arange(old.size))
    assert same.grown == 0
    middle = Topology.random(old.shape, old.places * 2 // 3, generator=seeded(seed))
    new = Topology.random(old.shape, old.places // 2, generator=seeded(seed + 50))
    there, back = Remap.between(old, middle), Remap.between(middle, new)
    both = back.apply(there.apply(numbers(old)))
    expected = dense(old, numbers(old)) * (dense(middle, torch.ones(middle.size)) > 0)
    assert torch.equal(both, expected.flatten()[new.keys()])


def test_remap_keeps_the_dtype_and_refuses_another_size():
    remap = Remap(torch.tensor([1, -1]), 3)
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool):
        assert remap.apply(torch.ones(3, dtype=dtype)).dtype == dtype
    with pytest.raises(ValueError, match="3 old slots"):
        remap.apply(torch.zeros(2))
    with pytest.raises(ValueError, match="use resize"):
        Remap.between(Topology.random((2, 3), 1), Topology.random((3, 2), 1))
    assert Remap(torch.tensor([-1, -1]), 0).apply(torch.zeros(0), new=2.0).tolist() == [2.0, 2.0]


@given(topologies(), st.data())
@laws
def test_exchange_drops_and_grows(topology, data):
    dropped = torch.tensor(sorted(data.draw(st.sets(st.integers(0, topology.size - 1)))) if topology.size else [])
    grown = topology.missing(dropped.numel(), generator=seeded())
    grown = grown[torch.randperm(grown.numel(), generator=seeded())]  # in any order
    dropped = dropped[: grown.numel()].to(torch.int64)
    new, remap = exchange(topology, dropped, grown)
    check(new)
    assert new.size == topology.size
    kept = numbers(topology)
    kept[dropped] = 0.0
    assert torch.equal(dense(new, remap.apply(numbers(topology))), dense(topology, kept))
    assert sorted(new.keys()[remap.old_slot < 0].tolist()) == sorted(grown.tolist())
    again = Remap.between(topology, new)
    assert torch.equal(remap.old_slot, again.old_slot)


@st.composite
def kept_lines(draw: st.DrawFn, size: int) -> Tensor | None:
    """Old lines in some order with new ones in between, or None: all stay."""
    if draw(st.booleans()):
        return None
    old = draw(st.permutations(range(size)))[: draw(st.integers(0, size))]
    return torch.tensor(draw(st.permutations([*old, *[-1] * draw(st.integers(0, 3))])), dtype=torch.int64)


def indexed(full: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Those rows and columns of a matrix; -1 finds an empty one."""
    bordered = torch.zeros(full.shape[0] + 1, full.shape[1] + 1)
    bordered[:-1, :-1] = full
    r = torch.arange(full.shape[0]) if rows is None else rows
    c = torch.arange(full.shape[1]) if columns is None else columns
    return bordered[r][:, c]


@given(topologies(), st.data())
@laws
def test_resize_is_indexing(topology, data):
    rows, columns = (data.draw(kept_lines(size)) for size in topology.shape)
    new, remap = resize(topology, rows=rows, columns=columns)
    check(new)
    assert remap.old_size == topology.size
    assert remap.resized(topology.shape) == new.shape
    expected = indexed(dense(topology, numbers(topology)), rows, columns)
    assert torch.equal(dense(new, remap.apply(numbers(topology))), expected)
    assert remap.grown == 0


@given(st.integers(0, 5), st.integers(0, 5), st.data())
@laws
def test_a_full_matrix_is_indexed_too(height, width, data):
    rows, columns = data.draw(kept_lines(height)), data.draw(kept_lines(width))
    remap = resize_full((height, width), rows=rows, columns=columns)
    full = torch.arange(1.0, height * width + 1).view(height, width)
    expected = indexed(full, rows, columns)
    assert remap.resized((height, width)) == tuple(expected.shape)
    assert torch.equal(remap.apply(full.flatten()).view(expected.shape), expected)


@given(topologies(), st.data())
@laws
def test_rows_and_columns_are_remaps_of_their_own(topology, data):
    kept = [data.draw(kept_lines(size)) for size in topology.shape]
    remaps = [
        resize(topology, rows=kept[0], columns=kept[1])[1],
        resize_full(topology.shape, rows=kept[0], columns=kept[1]),
    ]
    for remap in remaps:
        assert remap.of("values") is remap
        assert remap.of("weight") is remap
        assert remap.of("gain") is None
        assert remap.of("bias") is remap.rows
        for lines, old, size in zip((remap.rows, remap.columns), kept, topology.shape):
            assert (lines is None) == (old is None)
            if old is not None:
                each = torch.arange(1.0, size + 1)
                assert torch.equal(lines.apply(each), torch.cat([each, torch.zeros(1)])[old])


def test_what_leaves_the_width_alone_says_nothing_of_rows():
    topology = Topology.random((3, 4), 5)
    for remap in (
        Remap.between(topology, Topology.random((3, 4), 6)),
        exchange(topology, torch.tensor([0]), topology.missing(1))[1],
    ):
        assert remap.rows is None
        assert remap.columns is None
        assert remap.of("bias") is None
        assert remap.resized((3, 4)) == (3, 4)


def test_a_remap_of_other_lines_is_refused():
    remap = resize_full((3, 4), rows=torch.tensor([0]))
    assert remap.resized((3, 9)) == (1, 9)
    with pytest.raises(ValueError, match=r"of 3 rows and 5 columns, the weight has the shape \(4, 5\)"):
        remap.resized((4, 5))


@pytest.mark.parametrize("rows", [[0, 0], [0, 2], [5]])
def test_resize_refuses_rows_that_are_not_there_or_twice(rows):
    for side in ("rows", "columns"):
        with pytest.raises(ValueError, match="each used once"):
            resize(Topology.random((2, 2), 2), **{side: torch.tensor(rows)})
        with pytest.raises(ValueError, match="each used once"):
            resize_full((2, 2), **{side: torch.tensor(rows)})


@given(st.integers(1, 4), st.integers(0, 6), st.integers(0, 6), st.integers(0, 9))
@laws
def test_merge_is_the_mean_over_the_holders(workers, out_features, in_features, seed):
    generator, places = seeded(seed), out_features * in_features
    several = [
        Topology.random((out_features, in_features), places * k // 4, generator=generator) for k in range(workers)
    ]
    values = [torch.randn(t.size, dtype=torch.float64, generator=generator) for t in several]
    merged, mean = merge(several, values)
    check(merged)
    total = sum(dense(t, v) for t, v in zip(several, values))
    holders = sum(dense(t, torch.ones_like(v)) for t, v in zip(several, values))
    assert torch.equal(dense(merged, torch.ones(merged.size)) > 0, holders > 0)
    torch.testing.assert_close(dense(merged, mean), torch.where(holders > 0, total / holders, 0.0))


def test_merge_refuses_what_does_not_belong_together():
    topology = Topology.random((2, 3), 4)
    with pytest.raises(ValueError, match="one shape"):
        merge([topology, Topology.random((3, 2), 4)], [torch.zeros(4), torch.zeros(4)])
    with pytest.raises(ValueError, match="one shape"):
        merge([], [])
    with pytest.raises(ValueError, match="match 4 places"):
        merge([topology], [torch.zeros(3)])
    with pytest.raises(ValueError, match="one list of values"):
        merge([topology], [])
