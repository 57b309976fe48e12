"""Two levels are one mean: exact without a codec, with one nothing is lost, and only leaders send between machines."""

import hierarchical_jobs as jobs
import pytest
import torch

from exchange_cases import given
from noctule.exchange.hierarchical import machine_name
from noctule.testing.processes import Workers

WORLD, LEADERS = 5, (0, 2)


@pytest.fixture(scope="module")
def workers():
    with Workers(WORLD) as group:
        yield group


def test_who_is_where(workers, monkeypatch):
    for rank, found in enumerate(workers.call(jobs.places)):
        assert found == {"members": [[0, 1, 3], [2, 4]], "mine": rank in (2, 4), "leaders": [0, 2]}
    for name in ("GROUP_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert machine_name(3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [machine_name(rank) for rank in range(4)] == ["0", "0", "1", "1"]
    monkeypatch.setenv("GROUP_RANK", "7")
    assert machine_name(3) == "7"


@pytest.mark.parametrize("between", jobs.PATHS)
def test_the_weighted_mean_of_all(workers, between):
    everyone = workers.call(jobs.averaged, between)
    for found in everyone:
        for at, x in enumerate(found[:-1]):
            expected = sum(rank * given(rank)[at].double() for rank in range(WORLD)) / 10
            assert x.shape == expected.shape
            torch.testing.assert_close(x.double(), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found[-1], torch.full((3,), 3.0, dtype=torch.float64))
        assert all(torch.equal(a, b) for a, b in zip(found, everyone[0], strict=True))


@pytest.mark.parametrize("codec", jobs.CODECS)
@pytest.mark.parametrize("between", ["AllGather", "TwoPhase"])
def test_delivered_and_owed_are_what_was_given(workers, between, codec):
    everyone = workers.call(jobs.conserved, between, codec, 4)
    for at in range(len(given(0))):
        sent = sum(given(rank, call)[at].double() for rank in range(WORLD) for call in range(4))
        owed = sum(each["owed"][at].double() for each in everyone)
        delivered = sum(got[at].double() for got in everyone[0]["got"]) * WORLD
        torch.testing.assert_close(delivered + owed, sent, atol=5e-5, rtol=1e-5)
    for each in everyone[1:]:
        for got, first in zip(each["got"], everyone[0]["got"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))
    for rank, each in enumerate(everyone):
        assert any(bool(x.any()) for x in each["owed"]) == (rank in LEADERS)
        assert (each["sent"] > 0) == (each["price"] > 0) == (rank in LEADERS)
        assert each["sent"] == pytest.approx(4 * each["price"], abs=4 * 30)  # and a few numbers with each


@pytest.mark.parametrize("between", ["AllGather", "TwoPhase"])
def test_over_a_skipped_step_debts_stay_and_nothing_is_lost(workers, between):
    everyone = workers.call(jobs.overflown, between)
    assert all(each["kept"] for each in everyone)
    for at in range(len(given(0))):
        sent = sum(given(rank, call)[at].double() for rank in range(WORLD) for call in (0, 2, 3))
        owed = sum(each["owed"][at].double() for each in everyone)
        delivered = sum(got[at].double() for got in everyone[0]["got"]) * WORLD
        torch.testing.assert_close(delivered + owed, sent, atol=5e-5, rtol=1e-5)


def test_a_worker_at_another_exchange_is_told_to_all(workers):
    assert all("others are at another one" in text for text in workers.call(jobs.out_of_step))


def test_what_cannot_be_is_refused(workers):
    for path, aggregate in workers.call(jobs.refused):
        assert "first worker of a machine has a path" in path
        assert "which median cannot be had from" in aggregate
