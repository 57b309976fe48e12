"""Two workers over a slow link, gradients compressed to 8 bits with error feedback.

    torchrun --nproc-per-node 2 examples/two_workers.py

Over a link of 100 Mbit/s that is made on this machine (Linux, root):

    python -m noctule.testing.link --workers 2 --megabits 100 --delay-ms 5 -- python examples/two_workers.py
"""

import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

from noctule import attach, mlp
from noctule.exchange import AllReduce, Channel, Compress, EverySync, NaturalCompression, TwoPhase

dist.init_process_group("gloo")
rank, workers = dist.get_rank(), dist.get_world_size()
pixels, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
pixels, mine = (pixels.float() - 8) / 8, slice(rank, None, workers)  # each worker trains on its part

CHANNELS = {
    "float32": lambda: Channel(path=AllReduce()),
    "8 bits": lambda: Channel(Compress(NaturalCompression()), path=TwoPhase()),
}
for name, channel in CHANNELS.items():
    torch.manual_seed(0)  # every worker starts from the same weights
    model = mlp(64, 512, 512, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with attach(model, optimizer, EverySync(channel())):
        start = time.perf_counter()
        for batch in torch.arange(len(pixels))[mine][:640].repeat(2).split(32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(pixels[batch]), digits[batch])
            loss.backward()  # ends with the exchange
            optimizer.step()
        seconds = (time.perf_counter() - start) / 40
    if rank == 0:
        print(f"{name:>8}: {1e3 * seconds:.1f} ms a step, loss {loss.item():.3f}")
dist.destroy_process_group()
