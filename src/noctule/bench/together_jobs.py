"""What the workers of `noctule bench together` do; each function is given its rank and their number."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from noctule.convert import convert_
from noctule.data import Batches, Dataset, load, standardize
from noctule.exchange.group import TRAFFIC
from noctule.launch import Strategy, Team, as_member_of
from noctule.launch.together import Together
from noctule.layers import FuseEpilogue, ToSparse
from noctule.loop import evaluate, fit
from noctule.method import Method
from noctule.models import mlp
from noctule.optim import param_groups
from noctule.recipes.training import falling_rate, settling

HIDDEN = {"dense": (300, 100), "sparse": (1000, 1000)}
DENSITY, LEARNING_RATE, WEIGHT_DECAY, DROPOUT, EVERY, FRACTION = 0.045, 0.002, 0.01, 0.15, 200, 0.3


class InGroup:
    """A `Rendezvous` of workers that are in a group already and lose nobody."""

    called = stopped = False

    def form(self) -> None:
        """They are in it."""

    def again(self) -> bool:
        """No."""
        return False


@dataclass
class Reached(Method):
    """Scores the network every so many steps; the first time it is good enough counts."""

    validation: Dataset
    every: int
    accuracy: float
    stop: bool = False
    """Whether the training may end there."""

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """The clock starts."""
        self.model, self.steps, self.spent = model, 0, 0.0
        self.started = time.perf_counter()
        self.found: tuple[int, float] | None = None

    def after_step(self) -> None:
        """Score, without counting the time it takes."""
        self.steps += 1
        if self.found is None and self.steps % self.every == 0:
            at = time.perf_counter()
            if evaluate(self.model, self.validation)[1] >= self.accuracy:
                self.found = self.steps, at - self.started - self.spent
            self.spent += time.perf_counter() - at


def network(kind: str, features: int, classes: int, seed: int) -> tuple[nn.Module, Optimizer]:
    """The dense or the truly sparse MLP, made alike everywhere."""
    torch.manual_seed(seed)
    model: nn.Module = mlp(features, *HIDDEN[kind], classes, dropout=DROPOUT)
    if kind == "sparse":
        model = convert_(convert_(model, ToSparse(density=DENSITY)).model, FuseEpilogue()).model
    groups = param_groups(model, weight_decay=WEIGHT_DECAY)
    return model, torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)


def trained(rank: int, world: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Train as the plan says, alone or together on the same batches; the outcome of this worker."""
    splits = standardize(load(plan["data"], data_dir=plan["data_dir"] and Path(plan["data_dir"]), seed=plan["seed"]))
    batches = Batches(splits.train, plan["batch"], seed=plan["seed"])
    steps = plan["epochs"] * len(batches)
    team = Together(InGroup(), member=rank, strategy=Strategy(**plan["strategy"])) if plan["strategy"] else Team()
    with as_member_of(team):
        if isinstance(team, Together):
            team.form()
        model, optimizer = network(plan["kind"], splits.train.features, splits.train.classes, plan["seed"])
        reached = Reached(splits.validation, plan["look_every"], plan["reach"])
        moving = (
            settling("gse", fraction=FRACTION, every=EVERY, steps=steps, seed=plan["seed"])
            if plan["kind"] == "sparse"
            else ()
        )
        methods = [reached, *moving, *team.methods(steps=steps)]
        sent, waited, started = TRAFFIC.sent_bytes, TRAFFIC.seconds, time.perf_counter()
        fitted = team.train(
            lambda: fit(
                model,
                optimizer,
                team.share(batches),
                validation=splits.validation,
                epochs=plan["epochs"],
                methods=methods,
                scheduler=falling_rate(optimizer, steps),
            )
        )
        seconds = time.perf_counter() - started
    model.load_state_dict(fitted.best_state)
    numbers = sum(p.numel() for p in model.parameters())
    return {
        "accuracy": evaluate(model, splits.test)[1],
        "validation_accuracy": fitted.best_accuracy,
        "best_epoch": fitted.best_epoch,
        "steps": steps,
        "weights": numbers,
        "reached": None if reached.found is None else list(reached.found),
        "sent_bytes_per_step": (TRAFFIC.sent_bytes - sent) / steps,
        "exchange_share": (TRAFFIC.seconds - waited) / seconds,
        "seconds": round(seconds, 2),
    }


def plain_steps(rank: int, world: int, plan: dict[str, Any], count: int) -> list[float]:
    """Seconds of some steps of torch's own DistributedDataParallel, in fp32."""
    splits = standardize(load(plan["data"], data_dir=plan["data_dir"] and Path(plan["data_dir"]), seed=plan["seed"]))
    batches = Batches(splits.train, plan["batch"], seed=plan["seed"])
    model, _ = network(plan["kind"], splits.train.features, splits.train.classes, plan["seed"])
    wrapped = DistributedDataParallel(model)
    optimizer, taken = torch.optim.AdamW(wrapped.parameters(), lr=LEARNING_RATE, fused=True), []
    for _, (inputs, targets) in zip(range(count + 2), batches.epoch(0, part=(rank, world)), strict=False):
        dist.barrier()
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(wrapped(inputs), targets).backward()
        optimizer.step()
        taken.append(time.perf_counter() - started)
    return taken[2:]
