"""An average beside each strategy is the average of the weights of that worker, by place."""

from average_jobs import beside_gossip, largest_difference
from push_pull_jobs import MOMENTUM
from push_pull_jobs import together as at_once

from exchange_cases import together
from noctule.codecs import TopK
from noctule.core.exchange import Channel
from noctule.exchange import Compress, EverySync
from noctule.parallel import DiLoCo, PushPull
from noctule.parallel.server.listen import serve
from noctule.testing.processes import Workers


def test_beside_diloco():
    for found in together(2, lambda path: largest_difference(DiLoCo(Channel(path=path), every=3), rank=path.rank)):
        assert found < 1e-6


def test_beside_compressed_gradients():
    def work(path) -> float:
        channel = Channel(Compress(TopK(0.3), error_feedback=True), path=path)
        return largest_difference(EverySync(channel), rank=path.rank)

    for found in together(2, work):
        assert found < 1e-6


def test_beside_gossip():
    with Workers(2) as workers:
        for found in workers.call(beside_gossip):
            assert found < 1e-6


def test_beside_a_parameter_server():
    with serve(MOMENTUM, shards=2, workers=2) as server:
        jobs = [
            lambda n=n: largest_difference(PushPull(server.ticket(n)), rank=n, seed=n, moves=n == 0) for n in range(2)
        ]
        for found in at_once(jobs):
            assert found < 1e-6
