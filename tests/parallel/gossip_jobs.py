"""What the workers of `test_gossip` do; each function is given its rank and their number."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from noctule import ToSparse, convert_, set_
from noctule.codecs import NaturalCompression, TopK
from noctule.core.method import attach
from noctule.exchange import own_group
from noctule.parallel.gossip import Gossip
from noctule.parallel.graphs import complete, random, ring, torus

GRAPHS = {"ring": ring, "torus": torus, "random": random, "complete": complete}
CODECS = {"none": None, "natural": NaturalCompression(), "top": TopK(0.1)}
RATES = {"none": None, "natural": 0.8, "top": 0.2}


def network(*, sparse: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))
    return convert_(model, ToSparse(density=0.4)).model if sparse else model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@functools.cache
def _some(count: int) -> Any:
    return own_group(range(count))


def apart(model: nn.Module, rank: int) -> None:
    """Where a worker's steps may have taken it."""
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator)


def consensus(rank: int, world: int, graph: str, codec: str, meetings: int, count: int) -> dict[str, Any] | None:
    """The weights before and after each of some meetings of the first ``count`` workers."""
    group = _some(count)
    if rank >= count:
        return None
    model = network()
    method = Gossip(GRAPHS[graph], codec=CODECS[codec], rate=RATES[codec], group=group)
    with attach(model, sgd(model), method):
        apart(model, rank)
        found = [flat(model)]
        for _ in range(meetings):
            before = method.group.sent_bytes
            method.now()
            found.append(flat(model))
        sent = method.group.sent_bytes - before
        public = {
            str(worker): torch.cat([x.flatten() for x in copies.values()]) for worker, copies in method.public.items()
        }
        method.settle()
    return {"weights": torch.stack(found), "sent": sent, "public": public, "settled": flat(model)}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, start: int, stop: int) -> list[float]:
    losses = []
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(1000 * rank + step)
        x = torch.randn(16, 12, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3].tanh()).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def resumed(rank: int, world: int, codec: str) -> dict[str, Any]:
    def made() -> Any:
        model = network()
        method = Gossip(ring, every=2, codec=CODECS[codec], rate=RATES[codec])
        return model, (optimizer := sgd(model)), attach(model, optimizer, method)

    whole, optimizer, session = made()
    with session:
        losses = train(whole, optimizer, rank, 0, 40)
    first, optimizer, session = made()
    with session:
        train(first, optimizer, rank, 0, 11)
        kept = session.state_dict(), optimizer.state_dict(), first.state_dict()
        kept = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, kept)
    second, optimizer, session = made()
    with session:
        second.load_state_dict(kept[2])
        optimizer.load_state_dict(kept[1])
        session.load_state_dict(kept[0])
        train(second, optimizer, rank, 11, 40)
    return {"whole": flat(whole), "resumed": flat(second), "losses": losses}


def moving(rank: int, world: int, codec: str, alike: bool) -> dict[str, Any] | str:
    model = network(sparse=True)
    optimizer, method = sgd(model), Gossip(ring, every=2, codec=CODECS[codec], rate=RATES[codec])
    try:
        with attach(model, optimizer, method, set_(every=4, seed=1)):
            # the same batches, so that the same connections go, or other ones
            train(model, optimizer, 0 if alike else rank, 0, 16)
            method.settle()
    except ValueError as error:
        return str(error)
    except RuntimeError as error:
        return str(error)
    return {"weights": flat(model)}


def said(what: Any) -> str:
    try:
        what()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def wrong(rank: int, world: int) -> dict[str, str]:
    """One mistake after another."""
    found = {
        "no rate": said(lambda: Gossip(codec=CODECS["top"])),
        "far": said(lambda: Gossip(rate=1.5)),
        "every": said(lambda: Gossip(every=0)),
    }

    def with_random_graph() -> None:
        model = network()
        with attach(model, sgd(model), Gossip(GRAPHS["random"], codec=CODECS["top"], rate=0.2)) as session:
            for _ in range(3):
                session.methods[0].now()

    def with_another_graph() -> None:
        model = network()
        with attach(model, sgd(model), Gossip(ring if rank else torus)) as session:
            session.methods[0].now()

    def began_elsewhere() -> None:
        model = network()
        apart(model, rank)
        with attach(model, sgd(model), Gossip(codec=CODECS["top"], rate=0.2)) as session:
            session.methods[0].now()

    def another_meeting() -> None:
        model = network()
        with attach(model, sgd(model), method := Gossip()):
            method.now()
            method.meetings += rank == 1
            method.now()

    def of_another_worker() -> None:
        model = network()
        with attach(model, sgd(model), method := Gossip(codec=CODECS["top"], rate=0.2)):
            state = method.state_dict()
            state["public"]["99"] = state["public"].pop(str(rank))
            method.load_state_dict(state)

    tries = (with_random_graph, with_another_graph, began_elsewhere, another_meeting, of_another_worker)
    return found | {what.__name__: said(what) for what in tries}


def until_the_end(rank: int, world: int, meetings: int) -> str:
    model = network()
    with attach(model, sgd(model), method := Gossip()):
        return said(lambda: [method.now() for _ in range(meetings)])
