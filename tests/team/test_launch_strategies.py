"""A strategy is what its name and options say, wherever they come from; what cannot be is refused before anything starts."""

import json

import pytest
import torch
from torch import nn

from noctule.cli.main import main
from noctule.core.errors import UsageError
from noctule.exchange import EverySync
from noctule.parallel import DiLoCo
from noctule.team import strategies
from noctule.team.building import codec
from noctule.team.strategies import made, names, workers_and_strategy
from noctule.team.strategies.diloco import Diloco


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"strategy": "difoco"}, "did you mean diloco"),
        ({"strategy": "sink"}, "there is no strategy sink"),
        ({"strategy": ["sync"]}, "there is no strategy"),
        ({"strategy": "sync", "bound": 9}, "sync has no --bound: it is an option of ssp"),
        ({"strategy": "sync", "meet": 1}, "sync has no --meet"),
        ({"strategy": "diloco", "outer_rat": 1.0}, "did you mean --outer-rate"),
        ({"strategy": "ssp", "codec": "powersgd"}, "ssp has no codec 'powersgd'"),
        ({"strategy": "sync", "codec": "natrual"}, "did you mean natural"),
        ({"strategy": "diloco", "meet": "often"}, "the option meet of diloco is int, got 'often'"),
        ({"strategy": "diloco", "meet": True}, "the option meet of diloco is int, got True"),
        ({"strategy": "local", "meet": 0}, "at least one step"),
        ({"strategy": "downpour", "meet": 0}, "at least one step"),
        ({"strategy": "diloco", "outer_rate": 0.0}, "outer_rate is above 0"),
        ({"strategy": "diloco", "outer_momentum": 1.0}, "outer_momentum from 0 to less than 1"),
        ({"strategy": "ssp", "bound": -1}, "bound is at least 0"),
        ({"strategy": "downpour", "server_rate": 0.0}, "server_rate above 0"),
        ({"strategy": "downpour", "shards": 0}, "shards is at least 1"),
        ({"strategy": "diloco", "meet": 5, "fragments": 6}, "fragments is from 1 to meet"),
        ({"strategy": "diloco", "meet": 5, "overlap": 6}, "overlap from 0 to meet"),
        ({"strategy": "diloco", "blend": 1.0}, "blend from 0 to less than 1"),
        ({"strategy": "sync", "per_machine": -1}, "per_machine is at least 0"),
        ({"strategy": "sync", "per_machine": 2, "codec": "auto"}, "a codec other than auto"),
        ({"strategy": "gossip", "meet": 0}, "at least one step"),
        ({"strategy": "gossip", "graph": "rings"}, "did you mean ring"),
        ({"strategy": "sandblaster", "history": 0}, "history at least 1"),
    ],
)
def test_refused(options, text):
    with pytest.raises(UsageError, match=text):
        made(options)


def test_a_strategy_refuses_what_it_cannot_be_by_itself():
    with pytest.raises(ValueError, match="did you mean natural"):
        Diloco(codec="natrual")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Diloco(bound=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", names())
def test_a_strategy_is_its_facts_and_a_file_of_its_name(name):
    strategy = made({"strategy": name})
    assert strategy.name == name
    assert made(json.loads(json.dumps(strategy.facts()))) == strategy
    assert strategy.changed() == {"strategy": name}
    assert made(strategy.changed()) == strategy


def test_a_run_that_kept_its_options_flat_is_resumed_as_it_was():
    together = {"workers": 2, "strategy": "diloco", "meet": 20}
    assert workers_and_strategy(together) == (2, Diloco(meet=20))
    assert workers_and_strategy({"workers": 3, "codec": "natural"}) == (3, made({"codec": "natural"}))
    assert workers_and_strategy({}) == (None, made({}))


def test_what_workers_attach():
    (sync,) = made({}).methods(None, None, rewire_every=None)
    assert isinstance(sync, EverySync)
    strategy = made({"strategy": "local", "meet": 7})
    (local,) = strategy.methods(None, None, rewire_every=None)
    assert isinstance(local, DiLoCo)
    assert local.every == strategy.meet_every == 7
    assert strategy.rewire_every(8) == 14
    assert made({"strategy": "diloco"}).meet_every == 100
    assert [made({"strategy": name}).timeout_seconds for name in ("sync", "diloco")] == [30.0, 129.0]
    assert [made({"strategy": name}).pushes_ahead for name in ("downpour", "ssp", "bsp", "wasap")] == [None, 3, 0, None]
    assert made({"strategy": "ssp", "bound": 5}).pushes_ahead == 5
    assert codec("none") is None
    with pytest.raises(KeyError):
        codec("powersgd")


@pytest.mark.parametrize(
    ("options", "rate", "momentum"),
    [
        ({"strategy": "diloco"}, 0.7, 0.9),
        ({"strategy": "diloco", "outer_rate": 0.5, "outer_momentum": 0.0}, 0.5, 0.0),
        ({"strategy": "local"}, 1.0, 0.0),
    ],
)
def test_the_outer_optimizer_is_what_was_asked_for(options, rate, momentum):
    (method,) = made(options).methods(None, None, rewire_every=None)
    (group,) = method.outer([nn.Parameter(torch.zeros(2))]).param_groups
    assert (group["lr"], group["momentum"], group["nesterov"]) == (rate, momentum, momentum > 0.0)


@pytest.mark.parametrize(("name", "rule"), [("ssp", torch.optim.Adagrad), ("wasap", torch.optim.SGD)])
def test_the_servers_optimizer_has_the_rate_that_was_asked_for(name, rule):
    optimizer = made({"strategy": name, "server_rate": 0.25}).optimizer([nn.Parameter(torch.zeros(2))])
    assert type(optimizer) is rule
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--codec", "natural"], "--codec needs --workers"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--workers", "2", "--meet", "3"], "sync has no --meet: it is an option of bsp, diloco"),
        (["--workers", "2", "--strategy", "sync", "--bound=9"], "sync has no --bound: it is an option of ssp"),
        (["--workers", "2", "--strategy", "difoco"], "did you mean diloco"),
        (["--workers", "2", "--strategy", "local", "--codec", "bf61"], "did you mean bf16"),
        (["--workers", "2", "--strategy"], "expected one argument"),
    ],
)
def test_a_wrong_command_line_leaves_no_trace(words, text, capsys, tmp_path):
    assert main(["run", "sparse_mlp", "--out", str(tmp_path / "run"), *words]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_lists_the_strategies_and_shows_the_options_of_one(capsys):
    shown = []
    for words in ([], ["--strategy", "ssp"]):
        with pytest.raises(SystemExit):
            main(["run", "sparse_mlp", *words, "--help"])
        shown.append(capsys.readouterr().out)
    assert all(f"{name}: " in " ".join(shown[0].split()) for name in names())
    assert "say --strategy NAME --help" in " ".join(shown[0].split())
    assert "--bound" not in shown[0]
    assert "--bound INT" in shown[1]
    assert "how many pushes a worker may be ahead" in " ".join(shown[1].split())
    assert "--server-rate" in shown[1]  # what the family has


@pytest.mark.parametrize(
    ("together", "text"),
    [
        ({"workers": 2, "strategy": "sink"}, "there is no strategy sink"),
        ({"workers": 2, "strategy": "diloco", "bound": 3}, "diloco has no --bound"),
        ({"workers": 2, "codec": "natrual"}, "did you mean natural"),
        ({"workers": "two"}, "--workers must be at least 1"),
    ],
)
def test_a_run_of_a_strategy_that_cannot_be_is_not_resumed(together, text, capsys, tmp_path):
    about = {"recipe": "sparse_mlp", "options": {}, "together": together}
    (tmp_path / "run.json").write_text(json.dumps(about))
    assert main(["run", "--resume", str(tmp_path)]) == 2
    found = capsys.readouterr().err
    assert text in found
    assert "run.json" in found
    assert "Traceback" not in found


def test_under_torchrun_a_run_is_named(monkeypatch, capsys, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["run", "sparse_mlp"]) == 2
    assert "under torchrun say --out" in capsys.readouterr().err
    for words in (["--workers", "2"], ["--strategy", "ssp"]):
        assert main(["run", "sparse_mlp", "--out", str(tmp_path / "run"), *words]) == 2
        assert "leave it out under torchrun" in capsys.readouterr().err


LAZY = '''
from dataclasses import dataclass
from typing import ClassVar

from noctule.team.strategy import GroupStrategy


@dataclass(frozen=True, kw_only=True)
class Lazy(GroupStrategy):
    """Nothing at all.

    Args:
        naps: how many.
    """

    name: ClassVar[str] = "lazy"
    naps: int = 1

    def exchange(self, weigh): ...
    def methods(self, exchange, member, *, rewire_every):
        return ()
'''


def test_one_new_file_is_one_new_strategy(tmp_path, monkeypatch, capsys):
    (tmp_path / "lazy.py").write_text(LAZY)
    monkeypatch.setattr(strategies, "__path__", [*strategies.__path__, str(tmp_path)])
    assert made({"strategy": "lazy", "naps": 3}).naps == 3
    assert main(["run", "sparse_mlp", "--workers", "2", "--strategy", "lasy"]) == 2
    assert "did you mean lazy" in capsys.readouterr().err
    assert main(["run", "sparse_mlp", "--workers", "2", "--naps", "2"]) == 2
    assert "sync has no --naps: it is an option of lazy" in capsys.readouterr().err
