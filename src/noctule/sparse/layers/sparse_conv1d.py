"""A one-dimensional convolution that stores, computes and learns its non-zeros only."""

from typing import Any, Self

from torch import Tensor, nn
from typing_extensions import override

from noctule.sparse.layers.sparse_conv2d import SparseConv2d
from noctule.sparse.layers.stand_in import StandIn


class SparseConv1d(nn.Module):
    """A drop-in for ``nn.Conv1d``: a `SparseConv2d` on images that are one row high.

    Args:
        conv2d: the convolution, whose kernel is (1, K).
    """

    padding_mode = "zeros"

    def __init__(self, conv2d: nn.Conv2d | SparseConv2d) -> None:
        super().__init__()
        self.conv2d = conv2d
        dense = conv2d if isinstance(conv2d, nn.Conv2d) else conv2d.geometry
        self.kernel_size, self.stride, self.dilation = dense.kernel_size[1:], dense.stride[1:], dense.dilation[1:]
        self.padding = conv2d.padding if isinstance(conv2d.padding, str) else conv2d.padding[1:]  # type: ignore[index]
        self.in_channels, self.out_channels, self.groups = dense.in_channels, dense.out_channels, dense.groups

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) -> (B, O, L'), or the same without a batch."""
        return self.conv2d(x.unsqueeze(-2)).squeeze(-2)

    @property
    def weight(self) -> Tensor:
        """A stand-in for the dense weight (O, C / G, K), for other people's code: it has no numbers."""
        return StandIn(
            next(self.conv2d.parameters()), (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        )

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias (O,)."""
        return self.conv2d.bias  # type: ignore[return-value]

    @classmethod
    def from_dense(cls, dense: nn.Conv1d, conv2d: nn.Conv2d | SparseConv2d) -> Self:
        """A dense convolution with this in its place."""
        return cls(conv2d).train(dense.training)

    def to_dense(self) -> nn.Conv1d:
        """An ``nn.Conv1d`` with the same function, zeros included."""
        inner = self.conv2d.to_dense() if isinstance(self.conv2d, SparseConv2d) else self.conv2d
        names = ("kernel_size", "stride", "padding", "dilation", "groups")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        dense = nn.Conv1d(self.in_channels, self.out_channels, **options, bias=inner.bias is not None, device="meta")
        dense.weight = nn.Parameter(inner.weight.detach().squeeze(2), inner.weight.requires_grad)
        dense.bias = inner.bias
        return dense.train(self.training)


def conv2d_of(dense: nn.Conv1d) -> nn.Conv2d:
    """An ``nn.Conv1d`` as a convolution of images one row high, on the same memory."""
    options: dict[str, Any] = {name: (1, *getattr(dense, name)) for name in ("kernel_size", "stride", "dilation")}
    options["padding"] = dense.padding if isinstance(dense.padding, str) else (0, *dense.padding)
    options |= {"groups": dense.groups, "padding_mode": dense.padding_mode, "bias": dense.bias is not None}
    conv2d = nn.Conv2d(dense.in_channels, dense.out_channels, **options, device="meta")
    conv2d.weight = nn.Parameter(dense.weight.detach().unsqueeze(2), dense.weight.requires_grad)
    conv2d.bias = dense.bias
    return conv2d.train(dense.training)
