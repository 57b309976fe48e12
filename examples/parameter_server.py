"""Two workers that do not wait for each other, at a parameter server. Needs pyzmq: pip install 'noctule[parameter-server]'."""

from functools import partial
from threading import Thread

import torch
from sklearn.datasets import load_digits
from torch import nn

from noctule import attach, mlp
from noctule.parallel import PushPull
from noctule.parallel.server.listen import serve

pixels, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
pixels = (pixels.float() - 8) / 8
torch.manual_seed(0)
models = [mlp(64, 128, 10) for _ in range(2)]


def work(rank: int, ticket) -> None:
    """Train on half of the data; the weights come from the server."""
    model, order = models[rank], torch.arange(rank, len(pixels), 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  # between two pulls; the server's is the one that counts
    method = PushPull(ticket, bound=8)  # at most eight pushes ahead of the slower worker
    with attach(model, optimizer, method):
        for _ in range(4):
            for batch in order.split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(pixels[batch]), digits[batch]).backward()
                optimizer.step()  # then it pushes its gradient and pulls the weights
    print(f"worker {rank}: staleness {method.staleness}")


# Here the workers are threads. On other machines: ticket.save(path) at the server, Ticket.load(path) at the worker.
server = serve(partial(torch.optim.Adagrad, lr=0.02), workers=2)
threads = [Thread(target=work, args=(rank, server.ticket(rank))) for rank in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
server.close()
models[0].eval()
print(f"{(models[0](pixels).argmax(1) == digits).float().mean():.1%} right after four passes")
