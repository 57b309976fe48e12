"""What the workers of `noctule bench together` do; each function is given its rank and their number."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from noctule.core.convert import convert_
from noctule.core.method import Method
from noctule.core.optim import param_groups
from noctule.data import Batches, Dataset, load, standardize
from noctule.exchange.group import TRAFFIC
from noctule.models import mlp
from noctule.recipes.training import falling_rate, falling_rewire
from noctule.sparse.layers import FuseEpilogue, ToSparse
from noctule.team import Team, as_member_of
from noctule.team.group import GroupTeam
from noctule.team.strategies import made
from noctule.team.strategy import GroupStrategy
from noctule.train.fit import Fitted, evaluate, fit

HIDDEN = {"dense": (300, 100), "sparse": (1000, 1000)}
DENSITY, LEARNING_RATE, WEIGHT_DECAY, DROPOUT, EVERY, FRACTION = 0.045, 0.002, 0.01, 0.15, 200, 0.3


class InGroup:
    """A `Rendezvous` of workers that are in a group already and lose no member."""

    called = lost = stopped = False

    def form(self) -> None:
        """They are in it."""

    def again(self) -> bool:
        """No."""
        return False


class Enough(Exception):
    """The network is as good as it was to be."""


@dataclass
class Reached(Method):
    """Scores the network every so many steps; the first time it is good enough counts.

    Given before the method that keeps workers together, it hears of a step after that has: where they have just met it finds the
    same on all of them.
    """

    validation: Dataset
    every: int
    accuracy: float
    stop: bool
    """Whether the training ends there, with `Enough`."""

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
                if self.stop:
                    raise Enough
            self.spent += time.perf_counter() - at


def network(kind: str, features: int, classes: int, seed: int) -> tuple[nn.Module, Optimizer]:
    """The dense or the truly sparse MLP, made alike everywhere."""
    torch.manual_seed(seed)
    model: nn.Module = mlp(features, *HIDDEN[kind], classes, dropout=DROPOUT)
    if kind == "sparse":
        model = convert_(convert_(model, ToSparse(density=DENSITY)).model, FuseEpilogue()).model
    groups = param_groups(model, weight_decay=WEIGHT_DECAY)
    return model, torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)


@dataclass
class Trained:
    """What a training left; `fitted` is None where it ended with `Enough`."""

    model: nn.Module
    test: Dataset
    steps: int
    fitted: Fitted | None
    reached: tuple[int, float] | None
    sent_bytes: int
    exchange_seconds: float
    seconds: float


def train(rank: int, plan: dict[str, Any], *, stop: bool) -> Trained:
    """Train as the plan says, alone or together on the same batches."""
    splits = standardize(load(plan["data"], data_dir=plan["data_dir"] and Path(plan["data_dir"]), seed=plan["seed"]))
    batches = Batches(splits.train, plan["batch"], seed=plan["seed"])
    steps = plan["epochs"] * len(batches)
    strategy = made(plan["strategy"])
    assert isinstance(strategy, GroupStrategy)
    team = GroupTeam(InGroup(), member=rank, strategy=strategy) if plan["strategy"] else Team()
    with as_member_of(team):
        if isinstance(team, GroupTeam):
            team.form()
        model, optimizer = network(plan["kind"], splits.train.features, splits.train.classes, plan["seed"])
        assert splits.validation is not None
        reached = Reached(splits.validation, plan["look_every"], plan["reach"], stop)
        moving = (
            falling_rewire("gse", fraction=FRACTION, every=EVERY, steps=steps, seed=plan["seed"])
            if plan["kind"] == "sparse"
            else ()
        )
        methods = [reached, *moving, *team.methods(steps=steps)]
        fitted, sent, waited, started = None, TRAFFIC.sent_bytes, TRAFFIC.seconds, time.perf_counter()
        with suppress(Enough):
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
    spent = (TRAFFIC.sent_bytes - sent, TRAFFIC.seconds - waited, time.perf_counter() - started)
    return Trained(model, splits.test, steps, fitted, reached.found, *spent)


def trained(rank: int, world: int, plan: dict[str, Any]) -> dict[str, Any]:
    """The outcome of a training for this worker."""
    outcome = train(rank, plan, stop=False)
    assert outcome.fitted is not None
    outcome.model.load_state_dict(outcome.fitted.best_state)
    return {
        "accuracy": evaluate(outcome.model, outcome.test)[1],
        "validation_accuracy": outcome.fitted.best_accuracy,
        "best_epoch": outcome.fitted.best_epoch,
        "steps": outcome.steps,
        "weights": sum(p.numel() for p in outcome.model.parameters()),
        "reached": outcome.reached,
        "sent_bytes_per_step": outcome.sent_bytes / outcome.steps,
        "exchange_share": outcome.exchange_seconds / outcome.seconds,
        "seconds": round(outcome.seconds, 2),
    }


def raced(rank: int, world: int, plan: dict[str, Any]) -> tuple[int, float] | None:
    """After how many steps and seconds the network was good enough, where the training ends; it is looked at when workers meet."""
    meet = made(plan["strategy"]).meet_every
    return train(rank, {**plan, "look_every": -(-plan["look_every"] // meet) * meet}, stop=True).reached


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
