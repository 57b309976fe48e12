"""The noise scale of gradients whose signal and noise are known."""

import pytest
import torch

from exchange_cases import together
from noctule.core.exchange import Channel
from noctule.exchange import NoiseScale, Weigh

SIGNAL = torch.linspace(-1.0, 1.0, 200)


@pytest.mark.parametrize("deviation", [0.5, 3.0])
def test_it_is_the_variance_over_the_squared_gradient(deviation):
    """Also of workers with unequal batches, of which one has none at times."""
    workers = 3

    def work(path):
        weigh = Weigh(0.0)
        scale = NoiseScale(
            Channel(weigh, path=path), samples=lambda: (weigh.n, weigh.mean * workers), smoothing=0.995, most_time=1.0
        )
        generator = torch.Generator().manual_seed(path.rank)
        assert scale.batch is None
        for step in range(600):
            samples = 4 if step % 2 else 2 + path.rank
            weigh.n = 0.0 if path.rank == 1 and step % 10 == 0 else samples
            noise = torch.randn(samples, 200, generator=generator).mean(0) * deviation
            parts = (SIGNAL + noise).split([150, 50])
            scale(list(parts), ["x", "y"])
        assert scale.measured == (540 if path.rank == 1 else 600)
        return scale.batch

    expected = 200 * deviation**2 / float(SIGNAL.square().sum())
    for found in together(workers, work):
        assert found == pytest.approx(expected, rel=0.15)


def test_the_exchange_is_left_as_it_is_and_an_overflow_does_not_count():
    def work(path):
        scale = NoiseScale(Channel(path=path), samples=lambda: (1, 2), most_time=1.0)
        (found,) = scale([torch.full((3,), float(path.rank))], ["x"])
        before = scale.state_dict()
        (bad,) = scale([torch.full((3,), torch.inf)], ["x"])
        assert torch.isinf(bad).all()
        assert scale.state_dict()["signal"] == before["signal"]
        other = NoiseScale(Channel(path=path), samples=lambda: (1, 2))
        other.load_state_dict(before)
        assert other.batch == scale.batch
        return found.tolist(), repr(scale)

    assert together(2, work) == [([0.5] * 3, "NoiseScale(Channel(path=Local, aggregate=mean))")] * 2


def test_pure_noise_has_no_end():
    def work(path):
        scale = NoiseScale(Channel(path=path), samples=lambda: (1, 2))
        scale([torch.full((3,), 1.0 - 2.0 * path.rank)], ["x"])
        return scale.batch

    assert together(2, work) == [float("inf")] * 2


def test_nothing_is_learned_where_there_are_no_others():
    def work(path):
        scale = NoiseScale(Channel(path=path), samples=lambda: (4, 4), most_time=1.0)
        scale([torch.ones(3)], ["x"])
        return scale.batch

    assert together(1, work) == [None]


def test_it_takes_no_more_than_its_share_of_the_time():
    now = taken = 0.0

    def samples():
        nonlocal now, taken
        now, taken = now + 0.5, taken + 0.5
        return 1, 2

    def work(path):
        nonlocal now
        scale = NoiseScale(Channel(path=path), samples=samples, most_time=0.1, clock=lambda: now)
        for _ in range(1000):
            scale([torch.ones(3)], ["x"])
            now += 1.0  # the rest of the step

    together(1, work)
    assert taken / now == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("options", [{"smoothing": 1.0}, {"most_time": 0.0}])
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match=r"smoothing lies in \(0, 1\)"):
        NoiseScale(None, samples=lambda: (1, 2), **options)
