"""A sparse layer is a masked dense one."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noctule.core.topology import Topology
from noctule.kernels import Epilogue
from noctule.sparse.layers import SparseLinear

SHAPES = [(30,), (1, 30), (17, 30), (2, 3, 30), (0, 30), (2, 0, 30), (2, 2, 2, 30)]


def weight_of(layer: SparseLinear) -> Tensor:
    full = torch.zeros(layer.topology.places, dtype=layer.values.dtype)
    full[layer.topology.keys()] = layer.values.detach()
    return full.view(layer.topology.shape)


def masked_dense(layer: SparseLinear, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Output and the gradients of input, values and bias, by ``nn.Linear``'s function on the dense weight."""
    x = x.detach().clone().requires_grad_()
    weight = weight_of(layer).requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    y = F.linear(x, weight, bias)
    y.backward(dy)
    at_places = weight.grad.flatten()[layer.topology.keys()]
    return y, x.grad, at_places, *(() if bias is None else (bias.grad,))


def step(layer: SparseLinear, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y, x.grad, layer.values.grad, *(() if layer.bias is None else (layer.bias.grad,))


def arranged(x: Tensor, how: str) -> Tensor:
    """The same numbers, lying in memory in another order."""
    if how == "feature-major":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if how == "transposed":
        return x.transpose(0, -2).contiguous().transpose(0, -2) if x.dim() > 2 else x
    if how == "strided":
        return torch.stack([x, x], -1)[..., 0]
    return x


# -- the law ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_sparse_is_masked_dense(shape, bias, density):
    layer = SparseLinear(30, 20, density=density, bias=bias)
    x, dy = torch.randn(shape), torch.randn(*shape[:-1], 20)
    expected = masked_dense(layer, x, dy)
    for how in ("row-major", "feature-major", "transposed", "strided"):
        for dy_how in ("row-major", "feature-major", "strided"):
            actual = step(layer, arranged(x, how), arranged(dy, dy_how))
            assert len(actual) == len(expected)
            for a, e in zip(actual, expected):
                torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)], ids=str)
def test_thin_layers(shape, lead):
    layer = SparseLinear(*shape, density=1.0)
    assert layer.weights == shape[0] * shape[1]
    x, dy = torch.randn(*lead, shape[0]), torch.randn(*lead, shape[1])
    for a, e in zip(step(layer, x, dy), masked_dense(layer, x, dy)):
        torch.testing.assert_close(a, e)


def test_a_layer_without_weights_is_its_bias():
    layer = SparseLinear(5, 3, weights=0)
    nn.init.normal_(layer.bias)
    y, dx, dvalues, dbias = step(layer, torch.randn(4, 5), torch.ones(4, 3))
    assert torch.equal(y, layer.bias.expand(4, 3))
    assert torch.equal(dx, torch.zeros(4, 5))
    assert dvalues.shape == (0,)
    assert torch.equal(dbias, torch.full((3,), 4.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    layer = SparseLinear(30, 20, density=0.2).to(dtype)
    x, dy = torch.randn(7, 30, dtype=dtype), torch.randn(7, 20, dtype=dtype)
    exact = masked_dense(
        SparseLinear.from_dense(layer.to_dense().double(), topology=layer.topology), x.double(), dy.double()
    )
    for a, e in zip(step(layer, x, dy), exact):
        assert a.dtype == dtype
        tolerance = {torch.float64: 1e-12, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
        torch.testing.assert_close(a.double(), e, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("slope", [1.0, 0.2, -0.6])
@pytest.mark.parametrize("shape", [(5, 6), (6,), (2, 3, 6)], ids=str)
def test_gradcheck(slope, shape):
    layer = SparseLinear(6, 4, density=0.5, dtype=torch.float64)
    layer.epilogue = Epilogue(slope)

    def run(x, values, bias):
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, layer.values, layer.bias))


def test_dense_and_back():
    layer = SparseLinear(30, 20, density=0.2)
    dense = layer.to_dense()
    assert torch.equal(dense.weight, weight_of(layer))
    assert torch.equal(dense.bias, layer.bias)
    again = SparseLinear.from_dense(dense)
    assert again.topology == layer.topology
    assert torch.equal(again.values, layer.values)
    pruned = SparseLinear.from_dense(dense, weights=10)
    assert pruned.values.abs().min() >= layer.values.abs().sort(descending=True).values[9]
    assert SparseLinear.from_dense(dense, density=0.05).weights == 30
    other = Topology.random((20, 30), 9)
    assert torch.equal(SparseLinear.from_dense(dense, topology=other).values, dense.weight.flatten()[other.keys()])
    assert SparseLinear.from_dense(nn.Linear(3, 4, bias=False)).bias is None


# -- autograd -----------------------------------------------------------------------------------------------------


def test_gradients_add_up_over_backward_passes():
    layer = SparseLinear(30, 20, density=0.2)
    x = torch.randn(10, 30)
    layer(x).pow(2).sum().backward()
    whole = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    for part in x.split(4):
        layer(part).pow(2).sum().backward()
    for p, expected in zip(layer.parameters(), whole):
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x", [True, False])
def test_only_what_asks_for_a_gradient_gets_one(values, bias, x):
    layer = SparseLinear(30, 20, density=0.2)
    layer.values.requires_grad_(values)
    layer.bias.requires_grad_(bias)
    inputs, dy = torch.randn(7, 30, requires_grad=x), torch.randn(7, 20)
    y = layer(inputs)
    assert y.requires_grad == (values or bias or x)
    if y.requires_grad:
        y.backward(dy)
    _, dx, dvalues, dbias = masked_dense(layer, inputs, dy)
    for asked, tensor, expected in ((x, inputs, dx), (values, layer.values, dvalues), (bias, layer.bias, dbias)):
        assert (tensor.grad is not None) == asked
        if asked:
            torch.testing.assert_close(tensor.grad, expected)


def test_without_gradients_it_is_the_same_function():
    layer = SparseLinear(30, 20, density=0.2)
    x = torch.randn(7, 30)
    expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer.eval()(x), expected)
    layer(x.requires_grad_()).sum().backward()  # nothing of the inference mode stayed behind
    assert x.grad is not None


def test_inference_mode_first_then_training():
    with torch.inference_mode():
        topology = Topology.random((20, 30), 100)
    layer = SparseLinear(30, 20, topology=topology)
    x = torch.randn(7, 30, requires_grad=True)
    with torch.inference_mode():
        layer(torch.randn(7, 30))
    layer(x).sum().backward()
    assert x.grad.shape == (7, 30)


def test_only_one_of_several_uses_of_an_input_needs_care():
    layer = SparseLinear(30, 30, density=0.2)
    x = torch.randn(7, 30, requires_grad=True)
    (layer(layer(x)) + x).sum().backward()
    weight = weight_of(layer)
    torch.testing.assert_close(x.grad, torch.ones(7, 30) @ weight @ weight + 1)


@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), nn.Hardtanh(inplace=True)])
@pytest.mark.parametrize("shape", [(7, 30), (17, 30), (2, 3, 30), (30,)], ids=str)
def test_what_follows_may_work_in_place(after, shape):
    layer, x = SparseLinear(30, 20, density=0.2), torch.randn(shape)
    gradients = []
    for inplace in (True, False):
        after.inplace = inplace
        layer.zero_grad()
        torch.manual_seed(1)
        after(layer(x)).pow(2).sum().backward()
        gradients.append(layer.values.grad)
    assert torch.equal(*gradients)


def test_changing_what_was_saved_is_noticed():
    layer = SparseLinear(30, 20, density=0.2)
    x_BI = torch.randn(30, 7).t()  # feature-major: saved as it is
    y = layer(x_BI)
    x_BI.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = layer(torch.randn(7, 30, requires_grad=True))
    with torch.no_grad():
        layer.values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_row_major_inputs_may_change_since_a_transpose_was_saved():
    layer, x = SparseLinear(30, 20, density=0.2), torch.randn(7, 30)
    _, _, expected, _ = masked_dense(layer, x, torch.ones(7, 20))
    y = layer(x)
    x.zero_()
    y.sum().backward()
    torch.testing.assert_close(layer.values.grad, expected)


def test_a_watch_sees_the_gradient_before_the_epilogue_and_the_input():
    layer = SparseLinear(30, 20, density=0.2)
    layer.epilogue = Epilogue(0.0)
    seen = []
    layer.watch = lambda dz, x: seen.append((dz.clone(), x.clone()))
    x, dy = torch.randn(7, 30), torch.randn(7, 20)
    y = layer(x)
    y.backward(dy)
    ((dz_OB, x_IB),) = seen
    assert torch.equal(x_IB, x.t())
    assert torch.equal(dz_OB, (dy * (y > 0)).t())


# -- its inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (29,), (3, 31), (30, 3), (2, 30, 1)], ids=str)
def test_wrong_inputs_are_refused(shape):
    with pytest.raises(ValueError, match="expected inputs of 30 features"):
        SparseLinear(30, 20, density=0.2)(torch.zeros(shape))


def test_another_dtype_is_refused_outside_autocast():
    with pytest.raises(ValueError, match=r"inputs are torch.float64 but the layer's values torch.float32"):
        SparseLinear(30, 20, density=0.2)(torch.zeros(3, 30, dtype=torch.float64))


def test_nan_reaches_the_rows_that_read_it():
    layer = SparseLinear(30, 20, density=0.2)
    x = torch.randn(7, 30)
    x[3, 4] = torch.nan
    rows = layer.topology.rows()[layer.topology.columns.to(torch.int64) == 4]
    assert torch.isnan(layer(x)).nonzero().tolist() == [[3, int(row)] for row in rows]


# -- making one ---------------------------------------------------------------------------------------------------


def test_how_sparse_is_said_once():
    topology = Topology.random((20, 30), 50)
    assert SparseLinear(30, 20, topology=topology).weights == SparseLinear(30, 20, weights=50).weights == 50
    assert SparseLinear(30, 20, density=0.1).weights == 60
    assert SparseLinear(30, 20, density=1e-9).weights == 1
    for options in ({}, {"density": 0.1, "weights": 60}, {"weights": 50, "topology": topology}):
        with pytest.raises(ValueError, match="one of density=, weights= or topology="):
            SparseLinear(30, 20, **options)
    with pytest.raises(ValueError, match="one of density=, weights= or topology="):
        SparseLinear.from_dense(nn.Linear(30, 20), density=0.1, weights=60)


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 1.01}, {"density": float("nan")}, {"density": -0.1}])
def test_densities_outside_their_range_are_refused(options):
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        SparseLinear(30, 20, **options)
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        SparseLinear.from_dense(nn.Linear(30, 20), **options)


@pytest.mark.parametrize("weights", [-1, 601])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ValueError, match="do not fit"):
        SparseLinear(30, 20, weights=weights)
    with pytest.raises(ValueError, match="do not fit"):
        SparseLinear.from_dense(nn.Linear(30, 20), weights=weights)


def test_a_topology_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(30, 20\), the layer \(20, 30\)"):
        SparseLinear(30, 20, topology=Topology.random((30, 20), 5))


def test_the_first_values_are_scaled_to_the_sparse_fan_in():
    layer = SparseLinear(400, 1000, density=0.05)  # 20 weights reach each output
    bound = 20**-0.5
    assert layer.init_bound == pytest.approx(bound)
    for parameter in (layer.values.detach(), layer.bias.detach()):
        assert parameter.abs().max() <= bound
        assert abs(parameter.mean()) < 5 * bound / (3 * parameter.numel()) ** 0.5
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    dense = nn.Linear(400, 1000)  # the rule of nn.Linear, with the fan-in that is there
    assert layer(torch.randn(64, 400)).std().item() == pytest.approx(dense(torch.randn(64, 400)).std().item(), rel=0.1)


def test_a_seed_makes_it_repeatable():
    first, again = (SparseLinear(30, 20, density=0.2, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.topology == again.topology
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    torch.manual_seed(4)
    first = SparseLinear(30, 20, density=0.2)
    torch.manual_seed(4)
    assert torch.equal(first.values, SparseLinear(30, 20, density=0.2).values)


def test_five_million_features_make_a_small_layer():
    layer = SparseLinear(5_000_000, 5_000_000, weights=100_000, bias=False)
    assert sum(p.nbytes for p in layer.parameters()) == 400_000
    assert repr(layer) == "SparseLinear(5000000, 5000000, weights=100000 (0.00%), bias=False)"


def test_there_is_no_dense_weight_to_fall_for():
    weight = SparseLinear(30, 20, density=0.2, dtype=torch.float64).weight
    assert (weight.shape, weight.dtype) == ((20, 30), torch.float64)
    for read in (lambda: weight + 1, lambda: torch.zeros(3, 30) @ weight.t(), weight.sum, weight.tolist):
        with pytest.raises(RuntimeError, match=r"to_dense\(\)\.weight|tensor subclasses"):
            read()


def test_print_shows_what_matters():
    layer = SparseLinear(30, 20, density=0.2)
    layer.epilogue = Epilogue(-0.6, 0.3)
    assert repr(layer) == "SparseLinear(30, 20, weights=120 (20.00%), bias=True, slope=-0.6, dropout=0.3)"
    assert layer.density == 0.2
