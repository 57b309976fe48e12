"""What does not go together is refused before anything starts."""

import pytest
import torch
from torch import nn

from noctule.cli.main import main
from noctule.exchange import EverySync
from noctule.parallel import DiLoCo
from noctule.team import Strategy
from noctule.team.building import codec, method


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"meet": 0}, "at least one step"),
        ({"strategy": "sync", "meet": 5}, "use diloco or local"),
        ({"strategy": "ssp", "codec": "powersgd"}, "use bf16, natural or topk"),
        ({"strategy": "diloco", "outer_rate": 0.0}, "outer_rate is above 0"),
        ({"strategy": "diloco", "outer_momentum": 1.0}, "outer_momentum from 0 to less than 1"),
        ({"strategy": "ssp", "bound": -1}, "bound is at least 0"),
        ({"strategy": "downpour", "server_rate": 0.0}, "server_rate above 0"),
        ({"strategy": "downpour", "shards": 0}, "shards at least 1"),
    ],
)
def test_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Strategy(**options)


def test_what_workers_attach():
    assert isinstance(method(Strategy(), None), EverySync)
    local = method(Strategy(strategy="local", meet=7), None)
    assert isinstance(local, DiLoCo)
    assert local.every == Strategy(strategy="local", meet=7).meet_every == 7
    assert Strategy(strategy="diloco").meet_every == 100
    assert [Strategy(strategy=name).timeout_seconds for name in ("sync", "diloco")] == [30.0, 129.0]
    assert [Strategy(strategy=name, bound=5).staleness_bound for name in ("downpour", "ssp", "bsp")] == [None, 5, 0]
    assert codec("none") is codec("powersgd") is None


@pytest.mark.parametrize(
    ("options", "rate", "momentum"),
    [
        ({"strategy": "diloco"}, 0.7, 0.9),
        ({"strategy": "diloco", "outer_rate": 0.5, "outer_momentum": 0.0}, 0.5, 0.0),
        ({"strategy": "local", "outer_rate": 0.5, "outer_momentum": 0.3}, 1.0, 0.0),
    ],
)
def test_the_outer_optimizer_is_what_was_asked_for(options, rate, momentum):
    (group,) = method(Strategy(**options), None).outer([nn.Parameter(torch.zeros(2))]).param_groups
    assert (group["lr"], group["momentum"], group["nesterov"]) == (rate, momentum, momentum > 0.0)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--codec", "natural"], "--codec needs --workers"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--workers", "2", "--meet", "3"], "use diloco or local"),
        (["--workers", "2", "--strategy", "asynchronous"], "invalid choice"),
    ],
)
def test_a_wrong_command_line_leaves_no_trace(words, text, capsys, tmp_path):
    assert main(["run", "sparse_mlp", "--out", str(tmp_path / "run"), *words]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_under_torchrun_a_run_is_named(monkeypatch, capsys, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["run", "sparse_mlp"]) == 2
    assert "under torchrun say --out" in capsys.readouterr().err
    assert main(["run", "sparse_mlp", "--out", str(tmp_path / "run"), "--workers", "2"]) == 2
    assert "leave it out under torchrun" in capsys.readouterr().err
