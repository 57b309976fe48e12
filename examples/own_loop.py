"""A sparse network in a loop of your own, beside its dense twin: accuracy, weights and seconds."""

import time

import torch
from sklearn.datasets import load_digits
from torch import nn

from noctule import ToSparse, attach, convert_, mlp, param_groups, set_

torch.manual_seed(0)
pixels, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
pixels = (pixels.float() - 8) / 8
order = torch.randperm(len(pixels))
train, test = order[:1400], order[1400:]


def trained(model: nn.Module, *methods) -> None:
    """Train, then print what came of it."""
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.002)
    start = time.perf_counter()
    with attach(model, optimizer, *methods):
        for _ in range(20):
            for batch in train[torch.randperm(len(train))].split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(pixels[batch]), digits[batch]).backward()
                optimizer.step()
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        accuracy = (model(pixels[test]).argmax(1) == digits[test]).float().mean()
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{weights:8,} weights  {accuracy:.1%} of the test set right  {seconds:.1f} s")


print("dense")
trained(mlp(64, 512, 512, 10))
print("sparse, a third of each layer's weakest connections moves every 50 steps")
sparse = mlp(64, 512, 512, 10)
print(convert_(sparse, ToSparse(density=0.05)))
trained(sparse, set_(every=50, fraction=0.3))
