"""Whatever wraps an exchange has every member of it: a member that is new cannot be forgotten."""

from inspect import signature

import pytest
import torch

from noctule.core.exchange import Cost, Exchange, Wrapped
from noctule.core.remap import Remap
from noctule.exchange import Auto, LinkEstimate, NoiseScale, PowerSGD
from noctule.team.elastic import Elastic

IN_PARTS = {
    "begin",
    "corrects",
    "corrected",
    "finished",
}  # an exchange in several calls, which are calls of the wrapper itself
MEMBERS = [name for name in vars(Exchange) if name == "__call__" or not name.startswith("_")]
ARGUMENTS = {
    "tensors": [torch.ones(2)],
    "keys": ["x"],
    "message": b"",
    "key": "x",
    "remap": Remap(torch.arange(2), 2),
    "shape": (2,),
}


class Inner(Exchange):
    """Notes which of its members are used, each of which says what the default does not."""

    def __init__(self):
        self.used = set()

    def used_and(self, name, value):
        self.used.add(name)
        return value

    def __call__(self, tensors, keys):
        return self.used_and("__call__", list(tensors))

    def share(self, message):
        return self.used_and("share", [message])

    @property
    def at_once(self):
        return self.used_and("at_once", value=True)

    @property
    def counts(self):
        return self.used_and("counts", value=False)

    def groups(self):
        return self.used_and("groups", ("group",))

    def rehearse(self, tensors, keys):
        return self.used_and("rehearse", Cost(0.0, 1.0, 1))

    def release(self):
        return self.used_and("release", {"x": torch.ones(2)})

    def remapped(self, key, remap, shape):
        self.used.add("remapped")

    def state_dict(self):
        return self.used_and("state_dict", {"kept": 1})

    def load_state_dict(self, state):
        assert state == {"kept": 1}
        self.used.add("load_state_dict")


class Plain(Wrapped):
    """A wrapper of a user's own."""

    def __init__(self, inner):
        self._inner = inner

    @property
    def inner(self):
        return self._inner


class Team:
    member, generation, broken = 0, 1, False

    def check(self, *, leave_for_new_group):
        pass


WRAPPERS = {
    "a user's own": Plain,
    "NoiseScale": lambda inner: NoiseScale(inner, samples=lambda: (1, 2)),
    "Elastic": lambda inner: Elastic(Team(), lambda: inner),
    "Auto": lambda inner: Auto({"plain": inner}, probe=lambda: LinkEstimate(0.0, 1.0), turns=0),
    "PowerSGD": lambda inner: PowerSGD(1, inner=inner),
}


def value(exchange, name):
    member = getattr(exchange, name)
    if not callable(member):
        return member
    arguments = {**ARGUMENTS, "state": exchange.state_dict()} if name == "load_state_dict" else ARGUMENTS
    found = member(*(arguments[parameter] for parameter in signature(member).parameters))
    return exchange.inner if name == "load_state_dict" else found  # an `Elastic` restores when there is a group


@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in IN_PARTS])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_member_is_that_of_the_exchange_within(wrapper, name):
    inner = Inner()
    wrapped = WRAPPERS[wrapper](inner)
    if wrapper == "Elastic":
        assert wrapped.inner is inner
    found = value(wrapped, name)
    if (wrapper, name) == ("PowerSGD", "at_once"):  # it takes rounds, whatever it is made of
        assert found
        return
    assert name in inner.used
    if name in ("at_once", "counts", "groups", "share"):
        assert found == value(Inner(), name)


def test_a_wrapper_sees_every_part_of_an_exchange_in_several_calls():
    wrapped = Plain(WRAPPERS["Auto"](Inner()))
    assert wrapped.begin(ARGUMENTS["tensors"], ["x"]) is wrapped
    assert not wrapped.corrects
