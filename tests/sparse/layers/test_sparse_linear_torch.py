"""A sparse layer among torch's tools: compile, checkpointing, saved-tensor hooks, functional calls, data-parallel training."""

import copy
import multiprocessing

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import FileStore
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from noctule.core.convert import convert_
from noctule.core.method import attach
from noctule.core.remap import exchange
from noctule.kernels import Epilogue
from noctule.sparse.layers import FuseEpilogue, SparseLinear
from noctule.sparse.layers.operators import compiled_product
from noctule.sparse.rewire import gse, set_


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        SparseLinear(30, 20, density=0.2),
        nn.LeakyReLU(0.1),
        nn.Dropout(dropout),
        SparseLinear(20, 5, density=0.5, bias=False),
    )
    return convert_(model, FuseEpilogue()).model


def step(run, model: nn.Module, x: torch.Tensor):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.pow(2).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- torch.compile ------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield lambda model, **options: torch.compile(model, fullgraph=True, **{"backend": "aot_eager", **options})
    torch.compiler.reset()


def test_compiled_is_eager(compiled):
    model = network()
    run = compiled(model)
    for shape in ((17, 30), (4, 30), (2, 3, 30), (30,)):
        x = torch.randn(shape)
        assert equal(step(run, model, x), step(model, model, x))
    with torch.no_grad():
        assert torch.equal(run(x), model(x))


def test_a_rewired_layer_is_not_compiled_again_and_seen(compiled):
    model, x = network(), torch.randn(17, 30)
    run = compiled(model)
    before = step(run, model, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            for layer in (model[0], model[3]):
                layer.remap_(*exchange(layer.topology, torch.arange(9), layer.topology.missing(9)), new=0.5)
            after = step(run, model, x)
            assert equal(after, step(model, model, x))
            assert not torch.equal(before[0], after[0])
            before = after


def test_compiled_dropout_follows_the_seed_and_the_mode(compiled):
    model, x = network(dropout=0.5), torch.randn(64, 30)
    run = compiled(model)
    torch.manual_seed(3)
    first, second = step(run, model, x), step(run, model, x)
    torch.manual_seed(3)
    assert equal(first, step(run, model, x))
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(3)
    assert equal(first, step(model, model, x))  # drawn as in eager mode where the backend draws as torch does
    model.eval()
    assert torch.equal(run(x), model(x))


def test_the_default_backend(compiled):
    model, x = network(dropout=0.5), torch.randn(8, 30)
    run = compiled(model, backend="inductor")
    torch.manual_seed(3)
    first = step(run, model, x)
    torch.manual_seed(3)
    assert equal(first, step(run, model, x))
    model.eval()
    for a, b in zip(step(run, model, x), step(model, model, x)):
        torch.testing.assert_close(a, b)


def test_compiled_in_other_dtypes_and_under_autocast(compiled):
    model, x = network().double(), torch.randn(5, 30, dtype=torch.float64)
    assert equal(step(compiled(model), model, x), step(model, model, x))
    model, x = network(), torch.randn(5, 30)
    run = compiled(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(x).dtype == torch.bfloat16
        assert equal(step(run, model, x), step(model, model, x))


def test_frozen_parts_of_a_compiled_layer(compiled):
    model, x = network(), torch.randn(5, 30)
    model[0].requires_grad_(False)
    run = compiled(model)
    run(x).sum().backward()
    gradient = model[3].values.grad.clone()
    assert model[0].values.grad is None
    model.zero_grad()
    model(x).sum().backward()
    assert torch.equal(model[3].values.grad, gradient)


def test_a_watched_layer_refuses_a_whole_graph_and_falls_back_without(compiled):
    model, x, seen = network(), torch.randn(5, 30), []
    model[0].watch = lambda dz, x: seen.append(dz)
    with pytest.raises(Exception, match=r"watches this layer's gradients|Observed exception"):
        compiled(model)(x)
    torch.compile(model, backend="aot_eager")(x).sum().backward()
    assert len(seen) == 1


# -- what stands round a layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout(reentrant):
    model, x = network(dropout=0.5), torch.randn(17, 30)

    def run(y):
        return checkpoint(model, y, use_reentrant=reentrant)

    torch.manual_seed(3)
    plain = step(model, model, x)
    torch.manual_seed(3)
    assert equal(plain, step(run, model, x))


def test_saved_tensor_hooks_see_the_input():
    layer, packed = SparseLinear(30, 20, density=0.2), []

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor.double()

    def unpack(tensor):
        return tensor.float() if tensor.dtype == torch.float64 else tensor

    x = torch.randn(7, 30)
    expected = step(layer, layer, x)
    with saved_tensors_hooks(pack, unpack):
        assert equal(step(layer, layer, x), expected)
    assert (30, 7) in packed


def test_module_hooks():
    layer, x, seen = SparseLinear(30, 20, density=0.2), torch.randn(7, 30), []
    layer.register_forward_hook(lambda module, args, y: seen.append("forward"))
    layer.register_full_backward_pre_hook(lambda module, dy: seen.append(dy[0].shape))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append((dx[0].shape, dy[0].shape)))
    layer.values.register_hook(lambda gradient: seen.append(gradient.shape) or gradient * 2)
    plain = copy.deepcopy(layer)
    doubled = step(layer, layer, x)[2]
    assert seen == ["forward", (7, 20), (120,), ((7, 30), (7, 20))]
    plain._forward_hooks.clear()
    plain._backward_hooks.clear()
    plain._backward_pre_hooks.clear()
    plain.values._backward_hooks = None
    assert torch.equal(step(plain, plain, x)[2] * 2, doubled)


def test_functional_calls_take_other_values():
    layer, x = SparseLinear(30, 20, density=0.2), torch.randn(7, 30)
    other = SparseLinear(30, 20, topology=layer.topology)
    assert torch.equal(torch.func.functional_call(layer, dict(other.named_parameters()), (x,)), other(x))


def test_a_compiled_layer_is_not_differentiated_twice(compiled):
    model, x = network(), torch.randn(7, 30, requires_grad=True)
    (slope,) = torch.autograd.grad(compiled(model)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        slope.sum().backward()


def test_the_operator_passes_torchs_own_checks_and_is_not_differentiated_twice():
    layer, x = SparseLinear(6, 5, density=0.5), torch.randn(3, 6, requires_grad=True)
    for places in ([layer.topology.handle], [layer.topology.row_ptr, layer.topology.columns]):
        arguments = x, layer.values, layer.bias, places, torch.zeros((), dtype=torch.int64), 5, 0.5, 0.0
        torch.library.opcheck(compiled_product, arguments)
    y, *_ = compiled_product(*arguments)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd formula"):
        slope.square().sum().backward()


def test_transforms_inside_a_compiled_function_are_right_or_refused(compiled):
    model, x = network(), torch.randn(4, 30)

    def loss(x):
        return model(x).square().sum()

    for run in (
        lambda x: torch.func.grad(loss)(x),
        lambda x: torch.func.vmap(model)(x[:, None]),
        lambda x: torch.func.hessian(loss)(x[:2]),
    ):
        try:
            found = torch.compile(run, backend="aot_eager")(x)
        except RuntimeError as refused:
            assert "functorch transforms" in str(refused) or "vmap" in str(refused)  # noqa: PT017
            continue
        torch.testing.assert_close(found, run(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_accumulation_under_autocast_with_a_scaler(dtype):
    model, x = network(), torch.randn(7, 30)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x.to(dtype)).float().pow(2).mean()
    scaler.scale(loss).backward()
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    for p, old in zip(model.parameters(), before):
        torch.testing.assert_close(p.detach(), old - 0.1 * p.grad)


# -- data-parallel ------------------------------------------------------------------------------------------------


def train(model: nn.Module, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in parts:
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 30, generator=generator) for _ in range(3)]


def rank_of_two(rank: int, path: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=FileStore(path, 2), rank=rank, world_size=2)
    halves = [x[4 * rank : 4 * rank + 4] for x in batches()]
    trained = [p.numpy() for p in train(DistributedDataParallel(network()), halves)]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="differ from rank to rank"):
        attach(model, optimizer, gse(every=100))
    wrapped = DistributedDataParallel(model)
    with attach(model, optimizer, set_(every=1, seed=3)):
        for x in halves:
            optimizer.zero_grad()
            wrapped(x).pow(2).mean().backward()
            optimizer.step()
    results.put((rank, trained, model[0].topology.keys().numpy()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_one_rank_is_none(tmp_path):
    alone = train(network(), batches())
    torch.distributed.init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        assert equal(train(DistributedDataParallel(network()), batches()), alone)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=rank_of_two, args=(r, str(tmp_path / "store"), results)) for r in range(2)]
    for process in ranks:
        process.start()
    (_, first, places), (_, second, same_places) = sorted((results.get(timeout=60) for _ in ranks), key=lambda r: r[0])
    for process in ranks:
        process.join(60)
    assert (places == same_places).all()  # random growth under one seed moves alike everywhere
    assert (places != network()[0].topology.keys().numpy()).any()
    alone = train(network(), batches())
    for a, b, one in zip(first, second, alone):
        assert (a == b).all()
        torch.testing.assert_close(torch.from_numpy(a), one, atol=1e-6, rtol=1e-5)


def test_epilogues_do_not_stop_it(tmp_path):
    torch.distributed.init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = network(dropout=0.3)
        assert model[0].epilogue == Epilogue(0.1, 0.3)
        wrapped = DistributedDataParallel(model)
        assert all(torch.isfinite(p).all() for p in train(wrapped, batches()))
        assert list(wrapped.module.state_dict()) == [
            "0.values",
            "0.bias",
            "0._extra_state",
            "3.values",
            "3._extra_state",
        ]
    finally:
        torch.distributed.destroy_process_group()
