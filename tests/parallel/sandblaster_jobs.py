"""A small problem in portions, the loop that solves it, and what real workers do with it."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noctule.parallel import Sandblaster, coordinate
from noctule.parallel.sandblaster.coordinator import Coordinator
from noctule.transport.messages import read, write
from noctule.transport.ticket import Ticket

SAMPLES = 24
WOLFE = partial(torch.optim.LBFGS, line_search_fn="strong_wolfe")


def network(seed: int = 0, width: int = 5, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return model


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return x.to(dtype), torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], dim=1).to(dtype)


def loss_of(model: nn.Module, portions: int, dtype: torch.dtype = torch.float64) -> Callable[[int], Tensor]:
    """The closure: of one portion the share in the mean over the batch."""
    x, y = batch(dtype)
    cut = list(zip(x.tensor_split(portions), y.tensor_split(portions), strict=True))

    def closure(portion: int) -> Tensor:
        inputs, targets = cut[portion]
        loss = (model(inputs) - targets).square().sum() / SAMPLES
        loss.backward()
        return loss

    return closure


def train(
    ticket: Ticket,
    *,
    portions: int,
    steps: int,
    seconds: Callable[[int, int], float] = lambda _step, _portion: 0.0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[list[float], list[Tensor]]:
    """The losses and the last weights of a worker, which needs so many seconds longer for a portion."""
    model = network(seed=ticket.worker, dtype=dtype)  # each its own: worker 0's count
    optimizer = Sandblaster(model.named_parameters(), ticket, portions=portions, **options)
    closure = loss_of(model, portions, dtype)

    losses: list[float] = []

    def slowly(portion: int) -> Tensor:
        time.sleep(seconds(len(losses), portion))
        return closure(portion)

    while len(losses) < steps:
        losses.append(optimizer.step(slowly))
    optimizer.close()
    return losses, [p.detach().clone() for p in model.parameters()]


def alone(optimizer: Any, *, portions: int, steps: int) -> tuple[list[float], list[Tensor]]:
    """One worker."""
    with coordinate(optimizer) as server:
        return train(server.ticket(0), portions=portions, steps=steps)


def work(
    rank: int,
    world: int,
    ticket: str,
    seconds: Sequence[float],
    steps: int,
    portions: int,
    timeout_seconds: float = 60.0,
) -> dict[str, Any]:
    """What a process does, that needs its own number of seconds for a portion."""
    began = time.monotonic()
    losses, weights = train(
        Ticket.load(ticket.format(rank)),
        portions=portions,
        steps=steps,
        seconds=lambda *_: seconds[rank],
        timeout_seconds=timeout_seconds,
    )
    return {"losses": losses, "weights": weights, "seconds": time.monotonic() - began}


def run_coordinator(rank: int, world: int, folder: str, options: dict[str, Any], workers: int) -> None:
    """Until this process is killed."""
    with coordinate(partial(WOLFE, **options), folder=folder) as server:
        for worker in range(workers):
            server.ticket(worker).save(Path(folder, f"worker-{worker}.json"))
        while True:
            time.sleep(1)


class Actor:
    """A worker without sockets, which makes one move at a time: its requests go to a coordinator directly."""

    def __init__(self, coordinator: Coordinator, worker: int, portions: int, inbox: dict[int, list[Any]]) -> None:
        self.coordinator, self.worker, self.portions, self.inbox = coordinator, worker, portions, inbox
        self.steps, self.version, self.serial, self.did = 0, -1, 0, None
        self.model = network(seed=worker)
        self.closure = loss_of(self.model, portions)
        self.portion: int | None = None
        self.losses: list[float] = []
        self.asked = False

    def flat(self, gradients: bool) -> bytes:
        found = [p.grad if gradients else p.detach() for p in self.model.parameters()]
        return torch.cat([x.flatten() for x in found if x is not None]).numpy().tobytes()

    def send(self, header: dict[str, Any], tensors: Sequence[bytes] = ()) -> None:
        self.serial += 1
        frames = write({**header, "serial": self.serial}, tensors)
        for route, answer in self.coordinator.handle(self.worker, b"%d" % self.worker, frames):
            self.inbox[int(route)].append(answer)

    def move(self) -> None:
        """Read the replies; else finish a portion; else ask for one."""
        while self.inbox[self.worker]:
            answer, found = read(self.inbox[self.worker].pop(0))
            if answer["serial"] != self.serial or "wait" in answer:
                continue
            self.asked = False
            assert "error" not in answer, answer
            if answer.get("lost") or answer.get("seed"):
                facts = {"portions": str(self.portions)}
                header = {"kind": "join", "dtype": "float64", "portions": self.portions, "facts": facts}
                self.asked = True
                return self.send(header, [self.flat(gradients=False)] if answer.get("seed") else [])
            if found:
                flat = torch.frombuffer(bytearray(found[0]), dtype=torch.float64)
                torch.nn.utils.vector_to_parameters(flat, self.model.parameters())
                self.version = answer["version"]
            if "loss" in answer:
                self.losses.append(answer["loss"])
                self.steps += 1
            self.portion = answer.get("portion")
        if self.asked:
            return None
        header: dict[str, Any] = {"kind": "work", "step": self.steps, "has": self.version}
        tensors = []
        if self.portion is not None:
            self.model.zero_grad()
            loss = self.closure(self.portion)
            header["did"] = {"version": self.version, "portion": self.portion, "loss": float(loss.detach())}
            tensors, self.portion = [self.flat(gradients=True)], None
        self.asked = True
        return self.send(header, tensors)
