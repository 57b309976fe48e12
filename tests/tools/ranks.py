"""What the workers of the tests of torch's distributed tools do."""

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from noctule import SparseLinear, attach, set_

X = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(SparseLinear(40, 30, density=0.2), nn.ReLU(), SparseLinear(30, 5, density=0.5))


def steps(model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def sharded(seed=0):
    model = build(seed)
    mesh = init_device_mesh("cpu", (2,))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def fixed_connections(rank, workers, folder):
    """Trains, saves, trains on; the other half of the training again from the checkpoint."""
    model, optimizer = sharded()
    steps(model, optimizer, 3)
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
    steps(model, optimizer, 3)
    other, other_optimizer = sharded(seed=0)
    steps(other, other_optimizer, 1)
    state, optimizer_state = get_state_dict(other, other_optimizer)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(other, other_optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    steps(other, other_optimizer, 3)
    return model(X).detach(), other(X).detach()


def other_places(rank, workers, folder):
    """A checkpoint of other places than those of the sharded values."""
    model, _ = sharded(seed=1)
    state = model.state_dict()
    dcp.load({"model": state}, checkpoint_id=folder)
    model.load_state_dict(state)
    return model(X).detach()


def moving_connections(rank, workers):
    """What attach says to connections of sharded values that are to move."""
    model, optimizer = sharded()
    try:
        attach(model, optimizer, set_(every=1)).close()
    except ValueError as error:
        return str(error)
    return "not refused"


def places_of_their_own(rank, workers, methods):
    """What DistributedDataParallel or attach says where the ranks drew different places."""
    model = DistributedDataParallel(build(seed=rank))
    try:
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), *([set_(every=1)] if methods else [])).close()
    except ValueError as error:
        return str(error)
    return "not refused"
