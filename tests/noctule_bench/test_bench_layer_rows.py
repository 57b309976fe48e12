"""Every layer that is timed computes what the sparse layer it is made of computes, gradients included."""

from importlib.util import find_spec

import pytest
import torch

from noctule.measure.turns import Process, Unavailable
from noctule.sparse.layers import SparseLinear
from noctule_bench import layer_steps
from noctule_bench.contestants import BF16, CONTESTANTS, CSR_OWN, LINEAR, NOCTULE, Contestant
from noctule_bench.layer_steps import FEATURE_MAJOR, LAYOUTS, ROW_MAJOR, build, layouts_of
from noctule_bench.peers import at_places, index_bytes


@pytest.fixture(autouse=True)
def _fresh():
    yield
    layer_steps._drop()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("contestant", CONTESTANTS.values(), ids=list(CONTESTANTS))
@pytest.mark.parametrize("layout", [ROW_MAJOR, FEATURE_MAJOR])
def test_everyone_is_right_or_is_not_here(contestant, layout):
    library = contestant.name.partition(",")[0]
    if library in ("sparselab", "sparseprop") and find_spec(library) is None:
        with pytest.raises(Unavailable, match=r"pip install noctule\[bench\]"):
            build(contestant, 40, 0.3, 8, layout)
        return
    step, _ = build(contestant, 40, 0.3, 8, layout)
    y, gradients = step()
    assert y.shape == (8, 40)
    assert len(gradients) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noctule_has_every_layout(layout):
    assert layout in layouts_of(NOCTULE)
    build(NOCTULE, 30, 0.2, 5, layout)[0]()


def test_inputs_lie_as_the_layout_says():
    x, dy = layer_steps._tensors(30, 8, ROW_MAJOR)
    x_f, dy_f = layer_steps._tensors(30, 8, FEATURE_MAJOR)
    assert x.is_contiguous()
    assert x_f.t().is_contiguous()
    assert torch.equal(x, x_f)
    assert torch.equal(dy, dy_f)


def test_a_wrong_layer_is_not_timed():
    def wrong(layer):
        dense = layer.to_dense()
        with torch.no_grad():
            dense.weight[0, 0] += 1.0
        return dense

    with pytest.raises(Unavailable, match="wrong result: output"):
        build(Contestant("wrong", Process("torch"), wrong, dense=True), 30, 0.2, 8, ROW_MAJOR)


def test_gradients_are_read_at_the_places():
    layer = SparseLinear(7, 5, density=0.4)
    dense = layer.to_dense()
    gradient = torch.arange(35.0).reshape(5, 7)
    assert torch.equal(at_places(gradient, dense, layer), layer.topology.keys().float())
    assert index_bytes(dense) == 0


def test_index_arrays_are_counted():
    layer = SparseLinear(7, 5, weights=14)
    forward = 4 * (5 + 1 + 14)
    assert index_bytes(CSR_OWN.make(layer)) == forward + 4 * (7 + 1 + 14) + 8 * 14
    if find_spec("sparseprop") is not None:
        assert index_bytes(CONTESTANTS["sparseprop"].make(layer)) == forward


def test_half_precision_is_allowed_to_be_less_exact():
    assert LINEAR.tolerance < BF16.tolerance < 0.1
