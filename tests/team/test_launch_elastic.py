"""An exchange that is made anew with its group, and what it kept."""

import pytest
import torch

from noctule.codecs import TopK
from noctule.core.errors import LostWorkerError
from noctule.core.exchange import Channel
from noctule.core.remap import Remap
from noctule.exchange import Compress, Local
from noctule.team.elastic import Elastic


class Alone:
    def __init__(self, member=0):
        self.member, self.generation, self.broken, self.called = member, 1, False, False

    def check(self, *, leave_for_new_group):
        if self.called and leave_for_new_group:
            raise LostWorkerError("a new group")


def make():
    return Channel(Compress(TopK(0.25)), path=Local.together(1)[0])


def test_a_new_group_has_a_new_exchange_and_what_is_kept_comes_with_the_state():
    team = Alone()
    elastic = Elastic(team, make)
    assert elastic.state_dict() == {}
    elastic([torch.tensor([4.0, 3.0, 2.0, 1.0])], ["x"])
    state, first = elastic.state_dict(), elastic.inner
    elastic.forget()
    team.generation += 1
    assert elastic.inner is not first
    assert not elastic.release()
    elastic.load_state_dict(state)
    assert elastic.state_dict() is state  # also before anybody needs the group
    assert elastic.release()["x"].tolist() == [0.0, 3.0, 2.0, 1.0]


def test_what_another_worker_owes_stays_with_it():
    donor, joiner = Elastic(Alone(0), make), Elastic(Alone(1), make)
    for _ in range(3):
        donor([torch.tensor([4.0, 3.0, 2.0, 1.0])], ["x"])
    joiner.load_state_dict(donor.state_dict())
    assert not joiner.release()
    assert joiner.inner.calls == 3


def test_the_team_hears_that_its_group_is_no_more():
    team = Alone()
    elastic = Elastic(team, make)
    team.called = True
    for speak in (lambda: elastic.share(b""), lambda: elastic([torch.ones(4)], ["x"])):
        team.broken = False
        with pytest.raises(LostWorkerError, match="a new group"):
            speak()
        assert team.broken
    team.broken = False
    assert Elastic(team, make, leave_for_new_group=False).share(b"x") == [b"x"]
    assert not team.broken


def test_a_worker_that_takes_over_places_makes_no_exchange_before_the_others_do():
    """Making one can be a collective call: where it makes process groups, the others would wait for it, or it for them."""
    made = []
    elastic = Elastic(Alone(), lambda: made.append(make()) or made[-1])
    elastic.remapped("x", Remap(torch.arange(4), 4), (4,))
    assert not made
    elastic([torch.tensor([4.0, 3.0, 2.0, 1.0])], ["x"])
    assert len(made) == 1
