"""A method of your own, here one that centralises gradients, beside one of the library.

Hongwei Yong et al. 2020, "Gradient Centralization" (arXiv 2004.01461): the mean of each row is taken from the gradient of a matrix.
Differs from the paper: rows of a sparse layer have their mean over the weights that exist.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from noctule import Method, SparseLinear, ToSparse, attach, convert_, mlp, param_groups, set_


class CentralisedGradients(Method):
    """Takes from each sparse layer's gradient the mean of its row, before the optimizer steps."""

    def begin(self, model: nn.Module, optimizers) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, SparseLinear)]

    def before_step(self) -> None:  # gradients are complete, weights have not moved
        for layer in self.layers:
            gradient, rows = layer.values.grad, layer.topology.rows().long()
            count = torch.zeros(layer.out_features).index_add_(0, rows, torch.ones_like(gradient))
            total = torch.zeros(layer.out_features).index_add_(0, rows, gradient)
            gradient -= (total / count.clamp(min=1))[rows]


pixels, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
pixels = (pixels.float() - 8) / 8
for name, methods in {"plain": [], "centralised": [CentralisedGradients()]}.items():
    torch.manual_seed(0)
    model = convert_(mlp(64, 256, 256, 10), ToSparse(density=0.1)).model
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1, momentum=0.9)
    with attach(model, optimizer, *methods, set_(every=50)):  # methods run in this order before a step
        for _ in range(8):
            for batch in torch.randperm(1400).split(64):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(pixels[batch]), digits[batch])
                loss.backward()
                optimizer.step()
    model.eval()
    accuracy = (model(pixels[1400:]).argmax(1) == digits[1400:]).float().mean()
    print(f"{name:>12}: loss {loss.item():.4f}, {accuracy:.1%} of the test set right")
