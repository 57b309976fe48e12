"""The noise scale of gradients whose signal and noise are known."""

import pytest
import torch

from exchange_cases import together
from noctule.channel import Channel
from noctule.exchange import NoiseScale

SIGNAL = torch.linspace(-1.0, 1.0, 200)


@pytest.mark.parametrize("deviation", [0.5, 3.0])
def test_it_is_the_variance_over_the_squared_gradient(deviation):
    samples, workers = 4, 3

    def work(path):
        scale = NoiseScale(Channel(path=path), samples=samples, workers=workers, smoothing=0.995)
        generator = torch.Generator().manual_seed(path.rank)
        assert scale.batch is None
        for _ in range(600):
            noise = torch.randn(samples, 200, generator=generator).mean(0) * deviation
            parts = (SIGNAL + noise).split([150, 50])
            scale(list(parts), ["x", "y"])
        return scale.batch

    expected = 200 * deviation**2 / float(SIGNAL.square().sum())
    for found in together(workers, work):
        assert found == pytest.approx(expected, rel=0.15)


def test_the_exchange_is_left_as_it_is_and_an_overflow_does_not_count():
    def work(path):
        scale = NoiseScale(Channel(path=path), samples=1, workers=2)
        (found,) = scale([torch.full((3,), float(path.rank))], ["x"])
        before = scale.state_dict()
        (bad,) = scale([torch.full((3,), torch.inf)], ["x"])
        assert torch.isinf(bad).all()
        assert scale.state_dict()["signal"] == before["signal"]
        other = NoiseScale(Channel(path=path), samples=1, workers=2)
        other.load_state_dict(before)
        assert other.batch == scale.batch
        return found.tolist(), repr(scale)

    assert together(2, work) == [([0.5] * 3, "NoiseScale(Channel(path=Local, aggregate=mean))")] * 2


def test_pure_noise_has_no_end():
    def work(path):
        scale = NoiseScale(Channel(path=path), samples=1, workers=2)
        scale([torch.full((3,), 1.0 - 2.0 * path.rank)], ["x"])
        return scale.batch

    assert together(2, work) == [float("inf")] * 2


@pytest.mark.parametrize("options", [{"samples": 0}, {"workers": 1}, {"smoothing": 1.0}])
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="compares one worker's gradient"):
        NoiseScale(None, **{"samples": 1, "workers": 2, **options})
