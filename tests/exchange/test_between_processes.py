"""Channels over real process groups: the same laws as between threads, inside DDP, and with peers that fail."""

import process_jobs as jobs
import pytest
import torch

from exchange_cases import given
from noctule.core.aggregate import mean
from noctule.testing.processes import Workers

WORLD = 4


@pytest.fixture(scope="module")
def workers():
    with Workers(WORLD) as group:
        yield group


@pytest.mark.parametrize("path", jobs.PATHS)
def test_everyone_gets_the_mean(workers, path):
    expected = mean([given(rank) for rank in range(WORLD)])
    for found in workers.call(jobs.averaged, path):
        for x, right in zip(found, expected, strict=True):
            assert x.shape == right.shape
            torch.testing.assert_close(x, right)


@pytest.mark.parametrize("path", jobs.PATHS)
def test_there_may_be_nothing_to_exchange(workers, path):
    assert all(workers.call(jobs.nothing, path))


@pytest.mark.parametrize("path", jobs.PATHS)
def test_double_stays_double(workers, path):
    expected = sum(given(rank)[0].double() / 3 for rank in range(WORLD)) / WORLD
    for x, y in workers.call(jobs.in_double, path):
        torch.testing.assert_close(x, expected, atol=1e-15, rtol=1e-15)
        assert y.dtype is torch.bfloat16


@pytest.mark.parametrize("path", jobs.PATHS)
def test_weights_count(workers, path):
    for x, y in workers.call(jobs.weighed, path):
        torch.testing.assert_close(x, torch.full((3,), (1 + 4 + 9) / 6))
        torch.testing.assert_close(y, torch.ones(2))


def check_conserved(found, calls):
    world = len(found)
    for at in range(len(given(0))):
        sent = sum(given(rank, call)[at].double() for rank in range(world) for call in calls)
        owed = sum(each["owed"][at].double() for each in found)
        delivered = sum(got[at].double() for got in found[0]["got"]) * world
        torch.testing.assert_close(delivered + owed, sent, atol=1e-5 * len(calls), rtol=1e-5)


@pytest.mark.parametrize("codec", jobs.CODECS)
@pytest.mark.parametrize("path", ["AllGather", "TwoPhase"])
def test_delivered_and_owed_are_what_was_given(workers, path, codec):
    check_conserved(workers.call(jobs.conserved, path, codec, 4), range(4))


@pytest.mark.parametrize("codec", jobs.CODECS)
@pytest.mark.parametrize("path", ["AllGather", "TwoPhase"])
def test_over_a_skipped_step_debts_stay_and_nothing_is_lost(workers, path, codec):
    everyone = workers.call(jobs.overflown, path, codec)
    assert all(each["kept"] for each in everyone)
    check_conserved(everyone, (0, 2, 3))


def test_nothing_is_lost_when_tensors_are_cut_anew(workers):
    check_conserved(workers.call(jobs.cut_anew), range(3))


@pytest.mark.parametrize("codec", jobs.CODECS)
@pytest.mark.parametrize("path", ["AllGather", "TwoPhase"])
def test_all_workers_get_the_same_bits(workers, path, codec):
    first, *others = workers.call(jobs.numbers, path, codec)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_words_of_any_length(workers):
    for paths in workers.call(jobs.said):
        for words in paths:
            assert words == ["", "one", "zwölf", "x" * 1000]


@pytest.mark.parametrize(
    ("how", "path", "sparse"),
    [
        ("every sync", "AllGather", False),
        ("every sync", "TwoPhase", True),
        ("every sync", "AllReduce", True),
        ("ddp", "AllGather", True),
        ("ddp", "TwoPhase", False),
        ("ddp", "AllReduce", False),
    ],
)
def test_all_workers_are_one_on_the_union(workers, how, path, sparse):
    everyone = workers.call(jobs.trained, how, path, sparse)
    for each in everyone:
        for a, b in zip(each["found"], each["expected"], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(each["found"], everyone[0]["found"], strict=True))


def test_compressed_training_in_ddp(workers):
    everyone = workers.call(jobs.compressed_in_ddp)
    for each in everyone:
        assert sum(each["losses"][-5:]) < 0.97 * sum(each["losses"][:5])
        assert each["keys"] == each["names"]
        assert all(torch.equal(a, b) for a, b in zip(each["weights"], everyone[0]["weights"], strict=True))


@pytest.mark.parametrize("megabytes", [0.0, 25.0])
def test_candidates_take_turns_in_ddp_and_nothing_is_lost(workers, megabytes):
    steps = 24
    everyone = workers.call(jobs.chosen_in_ddp, megabytes, steps)
    for each in everyone:
        assert each["settled"]
        assert each["calls"] == steps
        assert set(each["tried"]) == {"plain", "half", "low rank"}
        assert each["tried"] == everyone[0]["tried"]
        assert each["tried"][-1] == "plain"
        assert each["owed"] == 0
        for name, got in each["got"].items():
            assert torch.equal(got, everyone[0]["got"][name])
            sent = steps * sum(other["given"][name] for other in everyone)
            torch.testing.assert_close(WORLD * got, sent, atol=1e-3, rtol=1e-4)


def test_sharded_workers_are_one_on_the_union(workers):
    for each in workers.call(jobs.sharded, "exact", 1):
        assert each["parts"] == ["", "0", "2", "4"]
        for a, b in zip(each["found"], each["expected"], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_compressed_training_in_fsdp(workers):
    everyone = workers.call(jobs.sharded, "natural", 10)
    for each in everyone:
        assert sum(each["losses"][-5:]) < 0.97 * sum(each["losses"][:5])
        assert each["owed"] > 0
        assert each["losses"] == everyone[0]["losses"]


def test_resuming_in_fsdp_is_never_having_stopped(workers):
    assert all(workers.call(jobs.resumed_in_fsdp))


@pytest.mark.parametrize("megabytes", [0.0, 0.003, 25.0])
def test_a_pass_in_ddp_is_delivered_as_a_whole_or_not_at_all(workers, megabytes):
    for each in workers.call(jobs.overflown_in_ddp, megabytes):
        assert each == [False, False, True, False, False, True]


def test_a_pass_in_ddp_of_which_one_exchange_fails_changes_nothing(workers):
    for each in workers.call(jobs.failed_once_in_ddp):
        assert each == [False, False, True, False, False]


def test_over_a_plain_pass_in_ddp_that_is_not_finite_what_was_owed_still_is(workers):
    assert workers.call(jobs.owed_over_a_plain_pass) == [[["1.bias"], []]] * WORLD


@pytest.mark.parametrize("path", jobs.PATHS)
def test_means_of_sixteen_bits_do_not_overflow(workers, path):
    expected = torch.full((3,), 4e4, dtype=torch.float16).tolist()
    assert workers.call(jobs.near_the_largest, path) == [expected] * WORLD


@pytest.mark.parametrize("layer", [2, 4])
def test_a_pass_in_fsdp_is_delivered_as_a_whole_or_not_at_all(workers, layer):
    for each in workers.call(jobs.overflown_in_fsdp, layer):
        assert each.pop("2") == [True] * 3
        assert each.pop("failed") == [True] * 3
        assert each.pop("0") == []
        assert not any(any(kept) for kept in each.values())


def test_a_model_that_is_not_sharded_is_refused(workers):
    assert all("call torch.distributed.fsdp.fully_shard" in text for text in workers.call(jobs.not_sharded))


def test_one_process_group_for_ddp_and_the_exchange_is_refused(workers):
    for own, *shared in workers.call(jobs.one_group_for_both):
        assert own == "taken"
        assert all("one of its own" in text for text in shared)


def test_an_error_in_the_hook_comes_out_of_backward(workers):
    assert all("others are at another one" in text for text in workers.call(jobs.an_error_in_the_hook))


def test_tensors_of_other_shapes_are_told(workers):
    found = workers.call(jobs.other_shapes)
    assert all("worker" in text and "bytes" in text for text in found), found


def test_after_an_exchange_that_a_worker_left_debts_are_as_before():
    with Workers(4, group_timeout_seconds=20.0) as workers:
        for text, lost in workers.call(jobs.cannot_be_made):  # nobody is lost, and to try again would not help
            assert "could not make its message" in text
            assert "no kernel for this" in text
            assert not lost
        workers.form_group()
        for path, encodings in (("TwoPhase", 4), ("AllGather", 5)):
            *survivors, _ = workers.begin(jobs.lost_midway, path, encodings).outcomes()
            assert survivors == [{"calls": 2, "kept": True}] * len(survivors)
            workers.form_group()
        check_conserved(workers.call(jobs.conserved, "TwoPhase", "half", 4), range(4))


def test_two_workers_send_once_and_one_that_dies_is_told_to_the_other():
    with Workers(2, group_timeout_seconds=20.0) as pair:
        for path in jobs.PATHS:
            for numbers in (1000, 300_000):  # as one small message, and as a large one
                for found in pair.call(jobs.of_a_size, path, numbers):
                    assert found["same"]
                    assert found["sent"] == pytest.approx(found["price"], abs=40)
                    assert found["price"] == 4 * numbers
                    assert found["rounds"] == 1 + (path == "AllReduce" and numbers > 1000)
        check_conserved(pair.call(jobs.conserved, "TwoPhase", "half", 4), range(4))
        running = pair.begin(jobs.a_peer_that_is_gone)
        pair.kill(1)
        survivor = running.outcomes()[0]
    assert "could not finish all_gather" in str(survivor)
    assert "A worker has died or left" in str(survivor)


@pytest.mark.parametrize("method", ["rigl", "gse", "ctre"])
def test_growth_in_ddp_is_that_of_one_worker_on_all_batches_with_no_sync_and_a_skipped_step(workers, method):
    alone = jobs.grown_in_ddp(0, 1, method, skipped=False)
    for found in workers.call(jobs.grown_in_ddp, method, True):
        assert found == alone


def test_the_state_of_a_zero_redundancy_optimizer_follows_where_it_is(workers):
    assert workers.call(jobs.with_sharded_state) == [0.0] * WORLD
