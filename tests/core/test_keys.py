"""Sorted lists of keys, beside torch's own search."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from noctule.core import keys as module
from noctule.core.keys import counts_up_to, merged, slots_of

_MOST = 2**62 - 1
_sorted = st.lists(st.integers(0, 40) | st.integers(0, _MOST), max_size=40).map(
    lambda xs: torch.tensor(sorted(xs), dtype=torch.int64)
)
_places = _sorted.map(torch.Tensor.unique)


@given(_sorted, _sorted)
def test_as_many_as_torch_finds(keys, wanted):
    assert torch.equal(counts_up_to(keys, wanted), torch.searchsorted(keys, wanted, right=True))


@given(_sorted, _sorted)
def test_two_lists_make_one_in_which_the_second_is_found_again(keys, others):
    both, at = merged(keys, others)
    assert torch.equal(both, torch.cat([keys, others]).sort().values)
    rest = torch.ones_like(both, dtype=torch.bool)
    rest[at] = False
    assert torch.equal(both[at], others)
    assert torch.equal(both[rest], keys)


@given(_places, _places)
def test_each_slot_holds_its_key_and_what_has_none_is_nowhere(keys, wanted):
    slots = slots_of(keys, wanted)
    assert torch.equal(slots >= 0, torch.isin(wanted, keys))
    assert torch.equal(keys[slots[slots >= 0]], wanted[slots >= 0])


@given(_places, _places)
def test_long_lists_are_searched_to_the_same_end(keys, wanted):
    with pytest.MonkeyPatch.context() as patch:
        short = [*merged(keys, wanted), counts_up_to(keys, wanted), slots_of(keys, wanted)]
        patch.setattr(module, "_MERGED", -1)
        long = [*merged(keys, wanted), counts_up_to(keys, wanted), slots_of(keys, wanted)]
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
