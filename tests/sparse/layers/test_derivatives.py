"""Derivatives of any order and the transforms of ``torch.func``: sparse layers give what their dense twins give."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

from noctule.core.convert import convert_
from noctule.core.topology import Topology
from noctule.kernels import Epilogue
from noctule.sparse.layers import FuseEpilogue, SparseAttention, SparseConv2d, SparseLinear, ToDense
from noctule.sparse.layers.layout import feature_major, row_major


def network(*activations: nn.Module) -> nn.Sequential:
    """Two sparse layers in float64, with a fused slope if no activations are given."""
    first, second = SparseLinear(7, 6, density=0.4), SparseLinear(6, 3, density=0.6, bias=False)
    model = nn.Sequential(first, *(activations or (nn.LeakyReLU(0.3),)), second).double()
    return model if activations else convert_(model, FuseEpilogue()).model


def images() -> nn.Sequential:
    model = nn.Sequential(
        SparseConv2d(2, 4, 3, stride=2, padding=1, density=0.5),
        nn.LeakyReLU(0.3),
        SparseConv2d(4, 2, 2, density=0.7, groups=2),
    )
    return convert_(model.double(), FuseEpilogue()).model


def dense(model: nn.Module) -> nn.Module:
    return convert_(copy.deepcopy(model), ToDense()).model


def gradients_of(model: nn.Module, twin: nn.Module):
    """Pairs of the gradient of a sparse parameter and that of its dense twin at the same places."""
    sparse = [m for m in model.modules() if isinstance(m, SparseLinear | SparseConv2d)]
    others = [m for m in twin.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer, other in zip(sparse, others, strict=True):
        yield layer.values.grad, other.weight.grad.flatten()[layer.topology.keys()]
        if layer.bias is not None:
            yield layer.bias.grad, other.bias.grad


def close(a, b) -> None:
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


LAYOUTS = {
    "rows": lambda x: x.clone(),
    "feature-major": lambda x: x.t().contiguous().t(),
    "one": lambda x: x[:1].clone(),
    "sliced": lambda x: torch.cat([x, x], 1)[:, ::2],
}


# -- derivatives of derivatives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slope", [1.0, 0.3])
def test_gradcheck_of_gradients(layout, slope):
    layer = SparseLinear(5, 4, density=0.5, dtype=torch.float64)
    layer.epilogue = Epilogue(slope)
    x = LAYOUTS[layout](torch.randn(3, 5, dtype=torch.float64)).requires_grad_()

    def run(x, values, bias):
        return functional_call(layer, {"values": values, "bias": bias}, (x,))

    inputs = (x, layer.values, layer.bias)
    options = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(run, inputs, check_batched_forward_grad=True, **options)
    assert torch.autograd.gradgradcheck(run, inputs, check_fwd_over_rev=True, check_batched_grad=True)


def test_gradcheck_of_a_convolution():
    layer = SparseConv2d(2, 4, (2, 3), stride=(1, 2), padding=1, groups=2, density=0.5, dtype=torch.float64)
    layer.epilogue = Epilogue(-0.3)
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)

    def run(x, values, bias):
        return functional_call(layer, {"values": values, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.values, layer.bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (x, layer.values, layer.bias))


@pytest.mark.parametrize("make", [network, lambda: network(nn.Tanh()), images])
@pytest.mark.parametrize("also_plain", [False, True])
def test_a_gradient_penalty(make, also_plain):
    """As in WGAN-GP: the loss holds the norm of a gradient, and the plain output too where asked for."""
    model = make()
    twin = dense(model)
    x = torch.randn(5, 2, 7, 7) if make is images else torch.randn(5, 7)
    gradients = []
    for m in (model, twin):
        inputs = x.double().requires_grad_()
        y = m(inputs)
        (slope,) = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        ((slope.flatten(1).norm(dim=1) - 1).square().mean() + (y.sum() if also_plain else 0)).backward()
        gradients.append(inputs.grad)
    close(*gradients)
    for pair in gradients_of(model, twin):
        close(*pair)


def test_a_penalty_with_dropout_differentiates_what_was_dropped():
    layer = SparseLinear(8, 6, density=0.5, dtype=torch.float64)
    layer.epilogue = Epilogue(0.2, 0.5)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)

    def run(x, values):
        torch.manual_seed(1)
        return functional_call(layer, {"values": values}, (x,)).pow(3)

    assert torch.autograd.gradgradcheck(run, (x, layer.values))


def test_a_penalty_under_autocast_and_in_bfloat16():
    layer = SparseLinear(16, 8, density=0.5)
    twin = layer.to_dense()
    found = []
    for m in (layer, twin):
        x = torch.linspace(-1, 1, 48).view(3, 16).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = m(x).float().square().sum()
        (slope,) = torch.autograd.grad(y, x, create_graph=True)
        slope.square().sum().backward()
        found.append(m.values.grad if m is layer else m.weight.grad.flatten()[layer.topology.keys()])
    torch.testing.assert_close(*found, atol=0.05, rtol=0.05)


def test_an_ordinary_backward_makes_no_graph_and_a_second_one_is_named():
    layer, x = SparseLinear(5, 4, density=0.5), torch.randn(3, 5, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert not slope.requires_grad
    assert layer(x).grad_fn.next_functions
    y = layer(x).square().sum()
    y.backward()
    with pytest.raises(RuntimeError, match="retain_graph"):
        y.backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_that_a_forward_keeps_is_one_input(layout):
    """What is kept for second derivatives is kept anyway: no second copy of the input."""
    layer, kept = SparseLinear(40, 30, density=0.1), []
    x = LAYOUTS[layout](torch.randn(64, 40)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert sum(t.numel() for t in kept if t.dim() == 2) == x.numel()


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("make", [network, lambda: network(nn.Tanh())])
def test_torch_autograd_functional(make, vectorize):
    model = make()
    twin, x = dense(model), torch.randn(2, 7, dtype=torch.float64)
    F = torch.autograd.functional
    for of in (
        lambda m: F.hessian(lambda x: m(x).tanh().square().sum(), x, vectorize=vectorize),
        lambda m: F.jacobian(lambda x: m(x).square(), x, vectorize=vectorize),
        lambda m: F.hvp(lambda x: m(x).tanh().square().sum(), x, torch.ones_like(x))[1],
        lambda m: F.vhp(lambda x: m(x).tanh().square().sum(), x, torch.ones_like(x))[1],
        lambda m: F.jvp(m, x, torch.ones_like(x))[1],
        lambda m: F.vjp(m, x, torch.ones(2, 3, dtype=x.dtype))[1],
    ):
        close(of(model), of(twin))
    close(
        F.jacobian(model, x, vectorize=True, strategy="forward-mode"),
        F.jacobian(twin, x, vectorize=True, strategy="forward-mode"),
    )


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("make", [network, images])
def test_batches_of_output_gradients(make, create_graph):
    model = make()
    twin = dense(model)
    x = torch.randn(*((3, 2, 7, 7) if make is images else (3, 7)), dtype=torch.float64, requires_grad=True)
    directions = torch.randn(4, *model(x).shape, dtype=torch.float64)
    options = {"is_grads_batched": True, "create_graph": create_graph}
    found, wanted = (torch.autograd.grad(m(x), x, directions, **options)[0] for m in (model, twin))
    close(found, wanted)
    if create_graph:
        assert found.requires_grad


# -- torch.func -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7), (7,), (0, 7)])
@pytest.mark.parametrize("make", [network, lambda: network(nn.Tanh())])
def test_transforms_of_the_input(make, shape):
    model = make()
    twin, x = dense(model), torch.randn(shape, dtype=torch.float64)

    def loss(m):
        return lambda x: m(x).tanh().square().sum()

    ways = [
        lambda m: grad(loss(m))(x),
        lambda m: jacrev(m)(x),
        lambda m: jacfwd(m)(x),
        lambda m: hessian(loss(m))(x),
        lambda m: jacrev(jacrev(loss(m)))(x),
        lambda m: jacfwd(jacfwd(loss(m)))(x),
        lambda m: jvp(m, (x,), (x,))[1],
        lambda m: jvp(grad(loss(m)), (x,), (x,))[1],
        lambda m: vjp(m, x)[1](torch.ones_like(m(x)))[0],
        lambda m: grad(lambda x: grad(loss(m))(x).square().sum())(x),
    ]
    if not x.numel():
        ways = ways[:2]  # the dense twin's other ways stop at a batch of none
    elif x.dim() > 1:
        ways += [
            lambda m: vmap(m)(x),
            lambda m: vmap(m, in_dims=1, out_dims=1)(x.mT).mT if x.dim() == 2 else vmap(m, in_dims=1)(x),
            lambda m: vmap(grad(loss(m)))(x),
            lambda m: vmap(hessian(loss(m)))(x),
        ]
    for way in ways:
        close(way(model), way(twin))


def at_places(layer: SparseLinear, gradient: torch.Tensor) -> torch.Tensor:
    """(..., O, I) -> (..., N)."""
    return gradient.flatten(-2)[..., layer.topology.keys()]


def test_transforms_of_the_parameters():
    layer = SparseLinear(6, 4, density=0.4, dtype=torch.float64)
    twin, x = layer.to_dense(), torch.randn(5, 6, dtype=torch.float64)
    held, wanted = ({k: p.detach() for k, p in m.named_parameters()} for m in (layer, twin))

    def loss(m):
        return lambda p, x: functional_call(m, p, (x,)).tanh().square().sum()

    for way in (
        lambda m, p: grad(loss(m))(p, x),
        lambda m, p: vmap(grad(loss(m)), in_dims=(None, 0))(p, x),  # one gradient a sample
        lambda m, p: vmap(grad(loss(m)), in_dims=(None, 0), chunk_size=2)(p, x),
        lambda m, p: jacrev(lambda p: functional_call(m, p, (x,)))(p),
        lambda m, p: jacfwd(lambda p: functional_call(m, p, (x,)))(p),
    ):
        found, right = way(layer, held), way(twin, wanted)
        close(found["values"], at_places(layer, right["weight"]))
        close(found["bias"], right["bias"])
    second = hessian(loss(layer))(held, x)["values"]["values"]
    right = hessian(loss(twin))(wanted, x)["weight"]["weight"].flatten(2).flatten(0, 1)
    keys = layer.topology.keys()
    close(second, right[keys][:, keys])


def test_an_ensemble_over_the_same_places():
    topology = Topology.random((4, 6), 10)
    members = [SparseLinear(6, 4, topology=topology) for _ in range(3)]
    parameters, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")
    x = torch.randn(5, 6)

    def run(parameters, buffers, x):
        return functional_call(base, (parameters, buffers), (x,))

    torch.testing.assert_close(
        vmap(run, in_dims=(0, 0, None))(parameters, buffers, x), torch.stack([m(x) for m in members])
    )
    each = torch.randn(3, 5, 6)
    found = vmap(run)(parameters, buffers, each)
    torch.testing.assert_close(found, torch.stack([m(x) for m, x in zip(members, each, strict=True)]))
    found = vmap(run)({k: p.unsqueeze(1).movedim(0, 0).squeeze(1) for k, p in parameters.items()}, buffers, each.mT.mT)
    torch.testing.assert_close(found, torch.stack([m(x) for m, x in zip(members, each, strict=True)]))


def test_a_step_of_maml():
    """The gradient through an inner step of gradient descent."""
    model = network(nn.Tanh())
    twin = dense(model)
    x, y = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    for m in (model, twin):
        parameters = dict(m.named_parameters())
        loss = (functional_call(m, parameters, (x[:3],)) - y[:3]).square().mean()
        slopes = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        adapted = {k: p - 0.5 * g for (k, p), g in zip(parameters.items(), slopes, strict=True)}
        (functional_call(m, adapted, (x[3:],)) - y[3:]).square().mean().backward()
    for layer, other in ((model[0], twin[0]), (model[2], twin[2])):
        # the twin adapts its zeros too, which the sparse layer does not have
        assert layer.values.grad.abs().sum() > 0
        assert layer.values.grad.shape == at_places(layer, other.weight.grad).shape

    def meta(m, mask=None):
        parameters = {k: p.detach() for k, p in m.named_parameters()}

        def outer(parameters):
            inner = grad(lambda p: (functional_call(m, p, (x[:3],)) - y[:3]).square().mean())(parameters)
            adapted = {k: p - 0.5 * inner[k] * (1 if mask is None else mask.get(k, 1)) for k, p in parameters.items()}
            return (functional_call(m, adapted, (x[3:],)) - y[3:]).square().mean()

        return grad(outer)(parameters)

    masks = {"0.weight": (twin[0].weight != 0).double(), "2.weight": (twin[2].weight != 0).double()}
    found, right = meta(model), meta(twin, masks)
    for at in (0, 2):
        close(found[f"{at}.values"], at_places(model[at], right[f"{at}.weight"]))
        close(found[f"{at}.values"], model[at].values.grad)


def test_forward_mode():
    model = network(nn.Tanh())
    twin, x, t = dense(model), torch.randn(2, 4, 7, dtype=torch.float64), torch.randn(2, 4, 7, dtype=torch.float64)
    with forward_ad.dual_level():
        found, wanted = (forward_ad.unpack_dual(m(forward_ad.make_dual(x, t))).tangent for m in (model, twin))
    close(found, wanted)
    assert forward_ad.unpack_dual(model(x)).tangent is None if forward_ad._current_level >= 0 else True


def test_dropout_in_transforms_follows_the_seed_and_the_randomness():
    layer = SparseLinear(20, 30, density=0.3)
    layer.epilogue = Epilogue(0.0, 0.5)
    x = torch.randn(8, 20)
    torch.manual_seed(3)
    expected = layer(x)
    torch.manual_seed(3)
    torch.testing.assert_close(jvp(layer, (x,), (x,))[0], expected)
    both = torch.stack([x, x])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(both)
    same, other = vmap(layer, randomness="same")(both), vmap(layer, randomness="different")(both)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(other[0], other[1])
    layer.eval()
    torch.testing.assert_close(vmap(layer)(both)[1], layer(x))


def test_transforms_under_autocast():
    layer, x = SparseLinear(20, 30, density=0.3), torch.randn(8, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(vmap(layer)(x), layer(x), atol=0.02, rtol=0.05)
        found = grad(lambda x: layer(x).float().square().sum())(x)
        inputs = x.clone().requires_grad_()
        layer(inputs).float().square().sum().backward()
    torch.testing.assert_close(found, inputs.grad, atol=0.05, rtol=0.05)


def test_a_convolution_in_transforms():
    model = images()
    twin, x = dense(model), torch.randn(3, 2, 7, 7, dtype=torch.float64)
    for way in (
        lambda m: vmap(m)(x),
        lambda m: vmap(m)(x[:, None]),
        lambda m: grad(lambda x: m(x).square().sum())(x),
        lambda m: vmap(grad(lambda x: m(x).square().sum()))(x),
        lambda m: hessian(lambda x: m(x).square().sum())(x[:1]),
        lambda m: jvp(m, (x,), (x,))[1],
    ):
        close(way(model), way(twin))


def test_the_product_of_the_stand_in_too():
    layer = SparseLinear(6, 4, density=0.5, dtype=torch.float64)
    twin, x = layer.to_dense(), torch.randn(3, 6, dtype=torch.float64)
    for way in (
        lambda m: vmap(lambda x: nn.functional.linear(x, m.weight))(x),
        lambda m: jacrev(lambda x: nn.functional.linear(x, m.weight))(x),
    ):
        close(way(layer), way(twin))


def test_layouts_can_be_differentiated_twice_and_transformed():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    for change in (feature_major, row_major, lambda x: row_major(feature_major(x))):
        assert torch.autograd.gradgradcheck(lambda x, change=change: change(x).pow(3), (x,))
        close(vmap(change)(x), x)
        close(jacrev(lambda x, change=change: change(x).pow(2).sum())(x), 2 * x)


def test_attention():
    layers = (SparseLinear(8, 8, density=0.4, dtype=torch.float64) for _ in range(4))
    model = SparseAttention(*layers, num_heads=2, batch_first=True)
    twin, x = dense(model), torch.randn(2, 3, 8, dtype=torch.float64)

    def run(m):
        return lambda x: m(x, x, x, need_weights=True)[0]

    for way in (
        lambda m: torch.autograd.functional.hessian(lambda x: run(m)(x).square().sum(), x),
        lambda m: grad(lambda x: run(m)(x).square().sum())(x),
        lambda m: vmap(run(m))(x),
        lambda m: jvp(run(m), (x,), (x,))[1],
    ):
        close(way(model), way(twin))


# -- who watches ------------------------------------------------------------------------------------------------------


def test_a_watch_is_shown_each_plain_pass_and_none_of_a_transform():
    layer, seen = SparseLinear(6, 4, density=0.5), []
    layer.watch = lambda dz, x: seen.append((dz, x))
    x = torch.randn(3, 6, requires_grad=True)
    grad(lambda x: layer(x).square().sum())(x)
    vmap(layer)(x)
    torch.autograd.grad(layer(x), x, torch.ones(2, 3, 4), is_grads_batched=True)
    assert not seen
    layer(x).square().sum().backward()
    layer(x).square().sum().backward(create_graph=True)
    assert len(seen) == 2
    (dz, inputs), (dz_again, inputs_again) = seen
    torch.testing.assert_close(dz, dz_again)
    assert torch.equal(inputs, inputs_again)
    assert not dz_again.requires_grad
    assert not inputs_again.requires_grad
