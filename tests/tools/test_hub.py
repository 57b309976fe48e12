"""Models of the caller's own class that come and go through huggingface_hub's mixin and safetensors' own functions."""

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from noctule import SparseLinear

hub = pytest.importorskip("huggingface_hub")
X = torch.randn(4, 20)


class Net(nn.Module, hub.PyTorchModelHubMixin):
    def __init__(self, width: int = 30):
        super().__init__()
        self.layers = nn.Sequential(
            SparseLinear(20, width, density=0.2), nn.ReLU(), SparseLinear(width, 3, density=0.5)
        )

    def forward(self, x):
        return self.layers(x)


def test_a_mixin_saves_and_loads(tmp_path):
    net = Net(width=12)
    net.save_pretrained(tmp_path)
    assert torch.equal(Net.from_pretrained(tmp_path)(X), net(X))


def test_a_safetensors_file(tmp_path):
    net, other = Net(), Net()
    save_model(net, str(tmp_path / "net.safetensors"))
    assert load_model(other, str(tmp_path / "net.safetensors")) == (set(), [])
    assert torch.equal(other(X), net(X))
