"""What a sparse layer does in torch's own operations, for programs that can hold no other: TorchScript, ONNX and graphs of fx.

They hold the values and their places, and write the zeros out when they run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from noctule.core.topology import Topology
from noctule.kernels import Epilogue
from noctule.sparse.layers.foreign import conv1d_of


def dense_weight(values: Tensor, topology: Topology, shape: tuple[int, ...]) -> Tensor:
    """The weight with its zeros, of values (N,)."""
    with _unrecorded():
        keys = topology.keys()
    return values.new_zeros(topology.places).scatter(0, keys, values).view(shape)


def dense_epilogue(y: Tensor, epilogue: Epilogue, training: bool) -> Tensor:
    """Activation and dropout, the latter drawn by torch."""
    if epilogue.slope != 1.0:
        y = F.relu(y) if epilogue.slope == 0.0 else F.leaky_relu(y, epilogue.slope)
    return F.dropout(y, epilogue.dropout, training) if epilogue.dropout else y


def twin_of(layer: Any) -> nn.Module:
    """The dense module with the function of a sparse layer: its twin, then activation and dropout if these were fused."""
    dense, epilogue = layer.to_dense(), layer.epilogue
    if layer.origin is not None and isinstance(dense, nn.Linear):
        dense = conv1d_of(dense, layer.origin)
    after: list[nn.Module] = []
    if epilogue.slope != 1.0:
        after.append(nn.ReLU() if epilogue.slope == 0.0 else nn.LeakyReLU(epilogue.slope))
    if epilogue.dropout:
        after.append(nn.Dropout(epilogue.dropout))
    return nn.Sequential(dense, *after).train(layer.training) if after else dense


def dense_convolution(x: Tensor, values: Tensor, bias: Tensor | None, topology: Topology, geometry: Any) -> Tensor:
    """(B, C, H, W) or (C, H, W) -> the output, of a `Geometry`."""
    weight = dense_weight(values, topology, geometry.weight_shape)
    bias = None if bias is None else bias.to(weight.dtype)
    return F.conv2d(_padded(x, geometry), weight, bias, geometry.stride, 0, geometry.dilation, geometry.groups)


def dense_convolution_gradients(
    x_BCHW: Tensor, values: Tensor, dy_BOHW: Tensor, topology: Topology, geometry: Any, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dx (B, C, H, W) and dvalues (N,) where they are needed, which can be differentiated again."""
    g, x, weight = geometry, _padded(x_BCHW, geometry), dense_weight(values, topology, geometry.weight_shape)
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy_BOHW, x, weight, None, g.stride, (0, 0), g.dilation, False, (0, 0), g.groups, (*needs, False)
    )
    (top, _), (left, _) = g.padding
    high, wide = x_BCHW.shape[2:]
    return (
        dx.narrow(2, top, high).narrow(3, left, wide) if needs[0] else None,
        dweight.reshape(-1).index_select(0, topology.keys()) if needs[1] else None,
    )


def _padded(x: Tensor, geometry: Any) -> Tensor:
    high, wide = geometry.padding
    return F.pad(x, (*wide, *high)) if any((*wide, *high)) else x


@contextmanager
def _unrecorded() -> Iterator[None]:
    """What is computed in here enters the program as a constant."""
    torch_c: Any = torch._C
    tracing = torch_c._get_tracing_state()
    torch_c._set_tracing_state(None)
    try:
        with _disable_current_modes():
            yield
    finally:
        torch_c._set_tracing_state(tracing)
