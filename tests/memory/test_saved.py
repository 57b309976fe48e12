"""compress_saved: gradients close to those of plain autograd, and what is left alone, shared, restored and refused."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from noctule.core.convert import convert_
from noctule.memory import compress_saved
from noctule.models import resnet
from noctule.sparse.layers import ToSparse


def gradients(model, x, *, loss=torch.sum, forward=None, **options):
    model.zero_grad()
    forward = forward or model
    if "off" in options:
        out, saved = loss(forward(x)), None
    else:
        with compress_saved(**options) as saved:
            out = loss(forward(x))
    out.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), saved


def close(a, b, within):
    assert float((a - b).norm() / b.norm()) < within


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1152, 4),
    )


def squares(y):
    return (y**2).mean()


@pytest.mark.parametrize(("bits", "within"), [(8, 0.02), (4, 0.3)])
@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_are_close(bits, within, recompute):
    model, x = convolutional(), torch.randn(8, 3, 16, 16)
    exact, _ = gradients(model, x, loss=squares, off=True)
    found, saved = gradients(model, x, loss=squares, bits=bits, recompute=recompute)
    close(found, exact, within)
    assert not torch.equal(found, exact)
    assert saved.recomputed == recompute
    assert saved.bytes_before > 3.5 * saved.bytes_kept
    assert saved.left["needs no gradient"] >= 1
    assert saved.left["a parameter"] >= 3
    assert "times fewer" in str(saved)


def test_a_residual_network():
    model, x = resnet((1, 28, 28), 10, depth=8), torch.randn(8, 784)
    exact, _ = gradients(model, x, loss=squares, off=True)
    found, saved = gradients(model, x, loss=squares)
    close(found, exact, 0.03)
    assert saved.recomputed == 4


def test_recomputing_loses_nothing_more_than_the_norms_input():
    """With what is kept of the input exact, so is what is computed again."""
    model, x = convolutional()[:4], torch.randint(-1, 2, (8, 3, 16, 16)).float()
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(-1, 2, model[0].weight.shape))
        model[0].bias.zero_()
    exact, _ = gradients(model, x, loss=squares, off=True)
    close(gradients(model, x, loss=squares, recompute=True, bits=8)[0], exact, 5e-3)


def test_off_leaves_no_trace():
    model, x = convolutional(), torch.randn(8, 3, 16, 16)
    before, _ = gradients(copy.deepcopy(model), x, off=True)
    gradients(copy.deepcopy(model), x)
    after, _ = gradients(copy.deepcopy(model), x, off=True)
    assert torch.equal(before, after)


# -- a wrong dedup ------------------------------------------------------------------------------------------------


def test_an_address_that_is_used_again_is_another_tensor():
    """Without the weak storage reference (keyed by address) the second activation would be the first one."""
    room = bytearray(4 * 4096)

    class Filled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w, value):
            ctx.value = value
            return torch.frombuffer(room, dtype=torch.float32).fill_(value * float(w))

        @staticmethod
        def backward(ctx, dy):
            return ctx.value * dy.sum(), None

    w = torch.ones((), requires_grad=True)
    losses, addresses = [], set()
    with compress_saved() as saved:
        for value in (1.0, 2.0, 3.0):
            x = Filled.apply(w, value)
            addresses.add(x.data_ptr())
            losses.append((x * x).sum())
            del x
    assert len(addresses) == 1
    assert saved.tensors == 3
    found = [float(torch.autograd.grad(loss, w)[0]) for loss in losses]
    assert found == pytest.approx([2 * 4096 * value**2 for value in (1.0, 2.0, 3.0)], rel=1e-4)


def test_a_storage_is_compressed_once():
    x = torch.randn(64, 64, requires_grad=True) * 1
    with compress_saved() as saved:
        loss = (x.sigmoid() * x).sum() + (x.view(-1) * x.t().reshape(-1)).sum() + (x * x).sum()
    loss.backward()
    assert saved.tensors == 3  # x, its sigmoid, and the copy of its transpose
    assert saved.bytes_before == 3 * x.nbytes


def test_versions_and_offsets_are_other_tensors():
    w = torch.ones((), requires_grad=True)
    x = (w * torch.arange(1.0, 8193.0)).requires_grad_()
    with compress_saved(least_bytes=0) as saved:
        low, high = x[:4096], x[4096:]
        loss = (low * low).sum() - (high * high).sum()
    (found,) = torch.autograd.grad(loss, w)
    n = torch.arange(1.0, 8193.0).double()
    assert float(found) == pytest.approx(float(2 * (n[:4096] ** 2).sum() - 2 * (n[4096:] ** 2).sum()), rel=1e-3)
    assert saved.tensors == 2


def test_after_a_change_in_place_it_is_another_tensor():
    w, n = torch.ones((), requires_grad=True), torch.arange(1.0, 4097.0)
    with compress_saved() as saved:
        y = w * n
        first = y * y  # keeps what is packed
        y.mul_(3.0)
        second = (y * y).sum()
    (found,) = torch.autograd.grad(second, w)
    assert float(found) == pytest.approx(18 * float((n.double() ** 2).sum()), rel=1e-3)
    assert saved.tensors == 2
    assert first.grad_fn is not None


# -- wrong strides ------------------------------------------------------------------------------------------------

STRIDED = {
    "transposed": lambda x: x.t(),
    "channels last": lambda x: x.view(8, 8, 8, 32).contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.view(16, 32, 32).permute(2, 0, 1),
    "every second column": lambda x: x[:, ::2],
    "some columns": lambda x: x[:, 3:90],
    "with gaps and transposed": lambda x: x[:, ::2].t(),
    "with a size of one": lambda x: x.as_strided((128, 1, 128), (128, 7, 1)),
}


@pytest.mark.parametrize("name", STRIDED)
def test_strides_are_restored(name):
    x = STRIDED[name](torch.randn(128, 128, requires_grad=True) * 1)
    seen = []

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sum()

        @staticmethod
        def backward(ctx, dy):
            seen.extend(ctx.saved_tensors)
            return dy.expand(seen[0].shape)

    with compress_saved() as saved:
        loss = Save.apply(x)
    loss.backward()
    assert saved.tensors == 1
    assert seen[0].shape == x.shape
    assert seen[0].stride() == x.stride()
    assert float((seen[0] - x).detach().abs().max()) < 0.03


def test_overlapping_elements_are_left_alone():
    x = (torch.randn(64, 1, requires_grad=True) * 1).expand(64, 64)
    with compress_saved() as saved:
        (x * x).sum().backward()
    assert saved.left["its elements overlap"] == 2


# -- changed in place ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"least_bytes": 1 << 30}], ids=["compressed", "left alone"])
def test_a_change_in_place_raises(options):
    x = torch.randn(64, 64, requires_grad=True)
    with compress_saved(**options):
        y = x.sigmoid()
        loss = y.sum()
        y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_change_in_place_of_what_is_computed_again_raises():
    model, x = convolutional(), torch.randn(8, 3, 16, 16)
    with compress_saved():
        y = model[:3](x)
        loss = model[3](y).sum()
        y.detach().mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_that_moved_raises():
    model, x = convolutional(), torch.randn(8, 3, 16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with compress_saved():
        loss = model(x).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- left alone ---------------------------------------------------------------------------------------------------


def test_what_is_left_alone():
    x = torch.randn(64, 64, requires_grad=True)
    active = x * 1
    weight = nn.Parameter(torch.randn(64, 64))
    with compress_saved() as saved:
        out = active.double() * active.double()  # float64
        out = out + active[:2, :2].sum() * active[:2, :2].sum()  # small
        out = out + (active / 0.0).nan_to_num(0.0) * 1
        hurt = active.masked_fill(active > 1, torch.inf)
        out = out + (hurt * hurt).nan_to_num(0.0)  # not finite
        out = out + active @ weight.t()  # a view of a parameter
        out = out + active * torch.ones(64, 64)  # data
    out.sum().backward()
    assert {"torch.float64", "small", "not finite", "a parameter", "needs no gradient"} <= set(saved.left)
    assert saved.tensors == 1


def test_autocast():
    model, x = convolutional(), torch.randn(8, 3, 16, 16)

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    exact, _ = gradients(model, x, loss=squares, forward=forward, off=True)
    found, saved = gradients(model, x, loss=squares, forward=forward)
    close(found, exact, 0.1)
    assert saved.tensors >= 3
    assert not any(name.startswith("torch.") for name in saved.left)


def test_sparse_layers():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 4))
    model = convert_(model, ToSparse(density=0.3)).model
    x = torch.randn(100, 64)
    exact, _ = gradients(model, x, loss=squares, off=True)
    found, saved = gradients(model, x, loss=squares)
    close(found, exact, 0.02)
    assert saved.tensors >= 2


# -- with other tools ---------------------------------------------------------------------------------------------


def test_checkpoint():
    model, x = convolutional(), torch.randn(8, 3, 16, 16)
    exact, _ = gradients(copy.deepcopy(model), x, loss=squares, off=True)
    found, saved = gradients(
        model, x, loss=squares, forward=lambda x: checkpoint_sequential(model, 3, x, use_reentrant=False)
    )
    close(found, exact, 0.02)
    assert saved.tensors >= 1
    with compress_saved():
        loss = squares(checkpoint(model, x, use_reentrant=False))
        model.zero_grad()
        loss.backward()  # the second forward pass runs within the block
    close(torch.cat([p.grad.flatten() for p in model.parameters()]), exact, 0.02)


def test_nested():
    x = torch.randn(64, 64, requires_grad=True) * 1
    with compress_saved() as outer:
        y = x.sigmoid()
        with compress_saved(bits=4) as inner:
            z = y.tanh()
        loss = z.exp().sum()
    loss.backward()
    assert (outer.tensors, inner.tensors) == (2, 1)
    assert inner.bytes_kept < 0.6 * outer.bytes_kept / 2


def test_second_derivatives():
    x = torch.randn(64, 64, requires_grad=True)

    def second(y):
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    exact = second((x * 1).sigmoid())
    with compress_saved():
        y = (x * 1).sigmoid()
    close(second(y), exact, 0.05)


def test_memory_is_freed():
    x = torch.randn(512, 512, requires_grad=True)
    with compress_saved():
        loss = (x * 1).sigmoid().sum()
    del loss
    gc.collect()
    assert not [
        t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype is torch.uint8 and t.numel() == 512 * 512
    ]


def test_bad_arguments():
    for options in ({"bits": 3}, {"bits": 16}, {"least_bytes": -1}):
        with pytest.raises(ValueError, match="must be"), compress_saved(**options):
            pass
