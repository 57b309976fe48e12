"""SparseConv2d against the dense convolution that has the same zeros."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import SETS, running
from torch import nn

from noctule.core.convert import convert_
from noctule.core.method import attach
from noctule.core.remap import Remap
from noctule.core.topology import Topology
from noctule.kernels import Epilogue, Frame, native, reference
from noctule.measure import measure
from noctule.sparse.layers import FuseEpilogue, SparseConv2d, SparseLayer, ToDense, ToSparse
from noctule.sparse.layers.compiled_convolution import compiled_convolution, packed, unpacked
from noctule.sparse.layers.convolution import MOST_SIZES, Framed, shifted
from noctule.sparse.rewire import gse, rigl, set_


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    reach = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [draw(st.integers(max(1, least), max(1, least) + 8)) for least in reach]
    dense = nn.Conv2d(
        groups * draw(st.integers(1, 5)),
        groups * draw(st.integers(1, 5)),
        kernel,
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding,
        dilation,
        groups,
        bias=draw(st.booleans()),
    )
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        dense.weight *= torch.rand(dense.weight.shape, generator=generator) < draw(
            st.sampled_from([0.0, 0.1, 0.5, 1.0])
        )
    batch = draw(st.sampled_from([1, 2, 3, 8, 16, 17, 33]))
    x = torch.randn(batch, dense.in_channels, *size, generator=generator)
    return dense, _laid_out(x, draw(st.sampled_from(["rows", "channels last", "feature-major", "sliced"])))


def _laid_out(x, how):
    if how == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if how == "feature-major":
        return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    return torch.cat([x, x], 3)[..., ::2] if how == "sliced" and x.shape[3] > 1 else x


def _step(module, x, dy=None):
    x = x.detach().requires_grad_()
    y = module(x)
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)
    found = torch.autograd.grad(y, [x, *module.parameters()], dy)
    return y.detach(), *found


def _assert_equals_dense(sparse, dense, x, tolerance):
    y, dx, dvalues, *dbias = _step(sparse, x)
    right_y, right_dx, right_dw, *right_dbias = _step(dense, x)
    right = [right_y, right_dx, right_dw.flatten()[sparse.topology.keys()], *right_dbias]
    for name, a, b in zip(("y", "dx", "dvalues", "dbias"), [y, dx, dvalues, *dbias], right, strict=False):
        assert a.shape == b.shape, name
        scale = max(1.0, float(b.abs().max()) if b.numel() else 0.0)
        assert (a - b).abs().max().item() <= tolerance * scale if b.numel() else True, name


@pytest.mark.parametrize("instruction_set", SETS)
@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_it_is_its_masked_dense_twin(instruction_set, case):
    dense, x = case
    with running(instruction_set):
        _assert_equals_dense(SparseConv2d.from_dense(dense), dense, x, 1e-4)


def test_several_threads_find_what_one_finds():
    layer = SparseConv2d(32, 48, 3, stride=2, padding=1, density=0.3)
    x, found = torch.randn(32, 32, 17, 17), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_step(layer, x))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 20),
    st.integers(-2, 4), st.integers(-2, 4), st.integers(1, 3), st.integers(1, 3),
    st.integers(1, 8), st.integers(1, 24), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_native_places_images_as_the_reference(
    channels, batch, high, wide, top, left, ph, pw, frame_high, frame_wide, innermost, dtype
):
    x = torch.randn(batch, channels, high, wide).to(dtype)
    x = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) if innermost else x
    frame = Frame(top, left, (ph, pw), frame_high, frame_wide)
    for instruction_set in SETS:
        with running(instruction_set):
            assert torch.equal(native.place(x, frame), reference.place(x, frame))


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_the_reference_is_its_masked_dense_twin(case):
    dense, x = case
    dense, x = dense.double(), x.double()
    _assert_equals_dense(SparseConv2d.from_dense(dense), dense, x, 1e-10)


def test_gradcheck_in_float64():
    layer = SparseConv2d(3, 4, (3, 2), stride=2, padding=1, density=0.4, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)

    def function(x, values, bias):
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.values, layer.bias))


@settings(max_examples=40, deadline=None)
@given(convolutions(), st.sampled_from([0.0, -0.5, 0.3]), st.sampled_from([0.0, 0.5]))
def test_native_epilogue_is_the_reference_epilogue(case, slope, dropout):
    if not native.available():
        pytest.skip("no compiled module")
    dense, x = case
    sparse = SparseConv2d.from_dense(dense)
    sparse.epilogue = Epilogue(slope, dropout)
    twin = copy.deepcopy(sparse).double()
    torch.manual_seed(5)
    found = _step(sparse, x)
    torch.manual_seed(5)
    right = _step(twin, x.double())
    for a, b in zip(found, right, strict=True):
        assert (a - b).abs().max().item() <= 1e-4 * max(1.0, b.abs().max().item()) if b.numel() else True


@settings(max_examples=40, deadline=None)
@given(convolutions())
def test_rows_of_the_dense_gradient_and_the_image_come_from_what_a_watch_sees(case):
    dense, x = case
    sparse, seen = SparseConv2d.from_dense(dense), []
    sparse.watch = lambda dz, x: seen.append((dz, x))
    _step(sparse, x)
    dz, framed = seen[0]
    right = _step(dense, x)[2]
    rows = sparse.gradient_rows(0, dense.out_channels, dz, framed)
    assert (rows - right.flatten(1)).abs().max().item() <= 1e-4 * max(1.0, right.abs().max().item())
    assert isinstance(framed, Framed)
    again = framed.images(sparse.geometry)
    reached = again != 0
    assert again.shape == x.shape
    assert torch.equal(again[reached], x[reached])
    output = sparse.respond(framed).view(dense.out_channels, *dense(x).shape[2:], x.shape[0]).permute(3, 0, 1, 2)
    assert torch.allclose(output, dense(x), atol=1e-4, rtol=1e-4)


def test_output_stays_feature_major_and_the_next_layer_reads_it():
    first, second = (SparseConv2d(8, 8, 3, padding=1, density=0.2) for _ in range(2))
    y = first(torch.randn(16, 8, 6, 6))
    assert y.stride() == (1, 36 * 16, 6 * 16, 16)
    assert torch.relu(y).stride() == y.stride()
    twin = nn.Sequential(first.to_dense(), nn.ReLU(), second.to_dense())
    x = torch.randn(16, 8, 6, 6)
    assert torch.allclose(nn.Sequential(first, nn.ReLU(), second)(x), twin(x), atol=1e-5)


def test_same_padding_of_an_even_kernel():
    dense = nn.Conv2d(3, 5, (4, 2), padding="same", dilation=(1, 3))
    x = torch.randn(4, 3, 9, 8)
    _assert_equals_dense(SparseConv2d.from_dense(dense), dense, x, 1e-4)


def test_an_image_without_a_batch():
    layer = SparseConv2d(3, 5, 3, density=0.5)
    x = torch.randn(3, 7, 7)
    assert torch.allclose(layer(x), layer(x[None])[0])


def test_models_are_converted_and_come_back():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, groups=2),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    x = torch.randn(4, 3, 8, 8)
    kept = ToSparse(density=1.0, fresh=False)
    before = model(x)
    conversion = convert_(copy.deepcopy(model), kept)
    assert [type(m).__name__ for m in conversion.model if isinstance(m, SparseLayer)] == [
        "SparseConv2d", "SparseConv2d", "SparseLinear"
    ]  # fmt: skip
    assert torch.allclose(conversion.model(x), before, atol=1e-5)
    back = convert_(convert_(conversion.model, FuseEpilogue()).model, ToDense()).model
    assert torch.allclose(back(x), before, atol=1e-5)
    weights = [m for m in back.modules() if isinstance(m, nn.Conv2d)]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(weights, (model[0], model[3]), strict=True))


def test_the_budget_counts_all_sides_of_a_kernel():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3))
    sparse = convert_(model, ToSparse(density=0.1)).model
    total = 0.1 * (16 * 32 * 9 + 32 * 64 * 9)
    assert abs(sparse[0].weights - total * 54 / (54 + 102)) <= 1
    assert sparse[0].weights + sparse[1].weights == round(total)


@pytest.mark.parametrize("method", [gse, set_, rigl])
def test_connections_move_and_adam_follows(method):
    torch.manual_seed(0)
    options = {"until": 100} if method is rigl else {}
    model = nn.Sequential(SparseConv2d(4, 8, 3, density=0.2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
    optimizer = torch.optim.Adam(model.parameters())
    layer = model[0]
    before, weights = layer.topology, layer.weights
    with attach(model, optimizer, rewire := method(every=2, **options)):
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 4, 6, 6)).square().mean().backward()
            optimizer.step()
    assert layer.weights == weights
    assert rewire.moved["0"] > 0
    assert layer.topology != before
    assert optimizer.state[layer.values]["exp_avg"].shape == (weights,)


def test_rigl_grows_where_the_dense_gradient_is_steepest():
    torch.manual_seed(1)
    layer = SparseConv2d(3, 6, 3, padding=1, density=0.3)
    capture = rigl(until=10, every=1).grow(layer, torch.Generator())
    layer.watch = capture
    x, dy = torch.randn(4, 3, 5, 5), torch.randn(4, 6, 5, 5)
    _step(layer, x, dy)
    gradient = _step(layer.to_dense(), x, dy)[2].abs().flatten()
    keys = layer.topology.keys()
    gradient[keys] = -1
    assert set(capture.choose(7, keys, keys[:0]).tolist()) == set(gradient.topk(7).indices.tolist())


def test_state_dict_brings_the_places_along():
    first = SparseConv2d(4, 6, 3, density=0.2, generator=torch.Generator().manual_seed(1))
    second = SparseConv2d(4, 6, 3, density=0.3, generator=torch.Generator().manual_seed(2))
    x = torch.randn(2, 4, 5, 5)
    second(x)  # its shifted places are made, and must not be used after loading
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_shifted_places_are_made_once_for_each_size_of_image():
    layer = SparseConv2d(4, 6, 3, density=0.2)
    places = shifted(layer.topology, layer.geometry, (5, 5), 8)
    assert shifted(layer.topology, layer.geometry, (5, 5), 8) is places
    assert shifted(layer.topology, layer.geometry, (6, 5), 8) is not places
    bytes_before = layer.topology.nbytes
    assert places.transposed.slots.numel() == layer.weights
    assert layer.topology.nbytes > bytes_before
    for size in range(7, 20):
        layer(torch.zeros(1, 4, size, size))
    assert len(layer.topology.derived) <= MOST_SIZES


def test_multiply_adds_are_those_of_the_non_zeros():
    layer = SparseConv2d(4, 6, 3, density=0.25, bias=False)
    x = torch.randn(2, 4, 7, 7, requires_grad=True)
    with measure() as cost:
        layer(x).sum().backward()
    assert cost.multiply_adds == 3 * layer.weights * 2 * 25 - layer.weights * 2 * 25 + layer.weights * 2 * 49


def test_runs_are_equal_bit_for_bit():
    layer = SparseConv2d(8, 16, 3, stride=2, padding=1, density=0.2)
    x = torch.randn(17, 8, 13, 13)
    first, second = _step(layer, x), _step(layer, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"groups": 2}, "cut into 2 groups"),
        ({"padding": -1}, "padding must be at least 0"),
        ({"padding": "same", "stride": 2}, "stride 1 only"),
        ({"kernel_size": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        SparseConv2d(**{"in_channels": 3, "out_channels": 4, "kernel_size": 3, "density": 0.5, **options})


def test_wrong_images_are_refused():
    layer = SparseConv2d(3, 4, 3, density=0.5)
    with pytest.raises(ValueError, match="images of 3 channels"):
        layer(torch.randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match="does not fit"):
        layer(torch.randn(2, 3, 2, 8))
    with pytest.raises(ValueError, match="inputs are"):
        layer(torch.randn(2, 3, 8, 8, dtype=torch.float64))


def test_reflecting_convolutions_are_left():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3))
    conversion = convert_(model, ToSparse(density=0.5))
    assert "reflect" in conversion.left["0"]
    assert "1" in conversion.changed


def test_topologies_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="the topology has shape"):
        SparseConv2d(3, 4, 3, topology=Topology.random((4, 3), 5))


@pytest.mark.parametrize("slope", [1.0, 0.0])
def test_compiled_it_finds_what_eager_finds_and_sees_new_places(slope):
    torch.manual_seed(0)
    layer = SparseConv2d(4, 6, 3, stride=2, padding=1, density=0.3)
    layer.epilogue = Epilogue(slope)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 4, 9, 9)
    for _ in range(2):
        for a, b in zip(_step(compiled, x), _step(layer, x), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
        topology = Topology.random(layer.topology.shape, layer.weights)
        layer.remap_(topology, Remap.between(layer.topology, topology), 0.5)


def test_the_operator_passes_torchs_own_checks():
    layer = SparseConv2d(3, 4, (2, 3), padding=1, density=0.5)
    arguments = (
        torch.randn(2, 3, 5, 6, requires_grad=True), layer.values, layer.bias, [layer.topology.handle],
        torch.zeros((), dtype=torch.int64), packed(layer.geometry), 0.5, 0.0,
    )  # fmt: skip
    torch.library.opcheck(compiled_convolution, arguments)
    held = [layer.topology.row_ptr, layer.topology.columns]
    torch.library.opcheck(compiled_convolution, (*arguments[:3], held, *arguments[4:]))
    assert unpacked(packed(layer.geometry)) == layer.geometry
