"""Linear layers that are none by class: Hugging Face's ``Conv1D``, and weights that a module of torch keeps as bare parameters."""

import sys
from importlib import import_module

import torch
from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the ``Conv1D`` of `transformers`, which need not be installed to find out."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.split(".")[0] == "transformers"


def note_for_hugging_face(model: nn.Module) -> None:
    """Where it is a model of `transformers`, or holds one, have its config say which layers are sparse."""
    if "transformers.modeling_utils" in sys.modules:
        import_module("noctule.sparse.layers.hugging_face").note_sparse_layers(model)


def linear_of(conv: nn.Module) -> nn.Linear:
    """A ``Conv1D``, whose weight is (in, out), as ``nn.Linear`` on the same memory."""
    weight_IO = conv.get_parameter("weight")
    weight_OI = nn.Parameter(weight_IO.detach().t(), weight_IO.requires_grad)
    return linear_on(weight_OI, conv.get_parameter("bias")).train(conv.training)


def conv1d_of(linear: nn.Linear, kind: type[nn.Module]) -> nn.Module:
    """The same layer as a ``Conv1D`` again, ``kind`` being its class."""
    with torch.device("meta"):
        conv = kind(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().t().contiguous(), linear.weight.requires_grad)
    conv.bias = linear.bias
    return conv.train(linear.training)


def linear_on(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """An ``nn.Linear`` that holds these parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight
    linear.register_parameter("bias", bias)
    return linear


def part_of(parameter: nn.Parameter, rows: slice | int) -> nn.Parameter:
    """Some rows of a parameter, or one slice, as one of its own, on the same memory."""
    return nn.Parameter(parameter.detach()[rows], parameter.requires_grad)
