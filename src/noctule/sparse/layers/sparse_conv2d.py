"""A two-dimensional convolution that stores, computes and learns its non-zeros only."""

from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from noctule import kernels
from noctule.core.topology import Topology
from noctule.kernels import Epilogue
from noctule.sparse.layers.compiled_convolution import compiled_convolution, packed
from noctule.sparse.layers.convolution import Framed, Geometry, Pair, shifted, sparse_convolution
from noctule.sparse.layers.dense_twin import dense_convolution, dense_epilogue, twin_of
from noctule.sparse.layers.derivatives import epilogue_on
from noctule.sparse.layers.operators import places_now
from noctule.sparse.layers.sparse_layer import SparseLayer
from noctule.sparse.layers.stand_in import StandIn
from noctule.sparse.layers.surroundings import eager, transformed, written_down
from noctule.sparse.pattern import chosen_places


class SparseConv2d(SparseLayer):
    """A convolution over the stored places of its kernels alone: a drop-in for ``nn.Conv2d`` in time and memory O(N).

    Its parameters are ``values`` (N,), in the order of ``topology``, whose shape is that of the weight as a matrix,
    (O, C / G x KH x KW), and ``bias`` (O,). Outputs are a view of a feature-major result, (O, H, W, B) with the batch
    innermost, which the next sparse layer reads with one copy. The first values are uniform within ``1 / sqrt(N / O)``.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: (KH, KW), or one number for both; so too stride and dilation.
        padding: zeros on both sides of height and width, or "same" or "valid".
        groups: G; channels are cut into so many groups that do not see each other.
        density: the share of the places that is stored, in (0, 1]; give this, or ``weights``, or ``topology``.
        weights: how many weights are stored.
        topology: which places are stored.
        bias: whether there is one.
        generator: where the random places and values come from.

    >>> layer = SparseConv2d(64, 128, 3, padding=1, density=0.05)
    >>> layer(torch.randn(8, 64, 14, 14)).shape, layer.weights
    (torch.Size([8, 128, 14, 14]), 3686)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | Literal["same", "valid"] = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        *,
        density: float | None = None,
        weights: int | None = None,
        topology: Topology | None = None,
        bias: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = _geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        topology, device = chosen_places(geometry.shape, density, weights, topology, generator=generator, device=device)
        super().__init__(topology, bias=bias, generator=generator, device=device, dtype=dtype)
        self.geometry, self.padding = geometry, padding

    @property
    def in_channels(self) -> int:
        """C."""
        return self.geometry.in_channels

    @property
    def out_channels(self) -> int:
        """O."""
        return self.geometry.out_channels

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H', W'), or the same without a batch."""
        if not eager(x):
            return self._elsewhere(x)
        x_BCHW, values = self._factors(x)
        epilogue = self._epilogue_now(self.epilogue)
        y_BOHW = sparse_convolution(x_BCHW, values, self.bias, self.topology, self.geometry, epilogue, self.watch)
        return y_BOHW if x.dim() == 4 else y_BOHW[0]

    def _elsewhere(self, x: Tensor) -> Tensor:
        """The same in graphs, transforms and traces, and for unusual inputs."""
        if written_down(x):
            y = dense_convolution(x, self.values, self.bias, self.topology, self.geometry)
            return dense_epilogue(y, self.epilogue, self.training)
        x_BCHW, values = self._factors(x)
        if torch.compiler.is_compiling():
            seed, dropout = self._compiled_dropout(self.epilogue)
            places, geometry = places_now(self.topology), packed(self.geometry)
            y_OHWB, *_ = compiled_convolution(
                x_BCHW, values, self.bias, places, seed, geometry, self.epilogue.slope, dropout
            )
            y_BOHW = y_OHWB.permute(3, 0, 1, 2)
        elif transformed():
            z_BOHW = dense_convolution(x_BCHW, values, self.bias, self.topology, self.geometry)
            y_OHWB = epilogue_on(z_BOHW.permute(1, 2, 3, 0), self.epilogue, self.training)
            y_BOHW = y_OHWB.permute(3, 0, 1, 2)
        else:
            epilogue = self._epilogue_now(self.epilogue)
            y_BOHW = sparse_convolution(x_BCHW, values, self.bias, self.topology, self.geometry, epilogue, self.watch)
        return y_BOHW if x.dim() == 4 else y_BOHW[0]

    @override
    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) or (C, H, W) -> (B, C, H, W) and the values (N,)."""
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"expected images of {self.in_channels} channels, (B, C, H, W), got shape {tuple(x.shape)}"
            )
        return super()._factors(x if x.dim() == 4 else x[None])

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` takes instead, which can hold torch's own modules only."""
        return twin_of(self)

    @property
    def weight(self) -> Tensor:
        """A stand-in for the dense weight (O, C / G, KH, KW), for other people's code: it has no numbers."""
        g = self.geometry
        return StandIn(self.values, (g.out_channels, g.in_channels // g.groups, *g.kernel_size))

    @torch.no_grad()
    @override
    def respond(self, x: Framed) -> Tensor:
        """A framed input -> (O, L, W' B), through the activation, without dropout."""
        places = shifted(self.topology, self.geometry, x.image, x.data.shape[1])
        return kernels.spmm(places, self.values, places.rows_of(x.data), self.bias, Epilogue(self.epilogue.slope))[0]

    @override
    def gradient_at(self, topology: Topology, dy: Tensor, x: Framed) -> Tensor:
        """The gradient at any places, of dy (O, L, W' B) and a framed input."""
        places = shifted(topology, self.geometry, x.image, x.data.shape[1])
        return kernels.sddmm(places, dy, places.rows_of(x.data))

    @override
    def gradient_rows(self, start: int, stop: int, dy: Tensor, x: Framed) -> Tensor:
        """Rows of the dense gradient, of dy (O, L, W' B) and a framed input."""
        whole = Topology.from_keys(
            self.topology.shape, torch.arange(start * self.topology.shape[1], stop * self.topology.shape[1])
        )
        return self.gradient_at(whole.to(dy.device), dy, x).view(stop - start, -1)

    @classmethod
    @override
    def _like(cls, dense: nn.Conv2d, topology: Topology) -> Self:
        if dense.padding_mode != "zeros":
            raise ValueError(f"only padding with zeros is supported, got padding_mode={dense.padding_mode!r}")
        return cls(
            dense.in_channels,
            dense.out_channels,
            _pair(dense.kernel_size),
            _pair(dense.stride),
            dense.padding,  # type: ignore[arg-type]
            _pair(dense.dilation),
            dense.groups,
            topology=topology,
            bias=dense.bias is not None,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )

    @override
    def to_dense(self) -> nn.Conv2d:
        """An ``nn.Conv2d`` with the same function (without the epilogue), zeros included."""
        g = self.geometry
        dense = nn.Conv2d(
            g.in_channels,
            g.out_channels,
            g.kernel_size,
            g.stride,
            self.padding,
            g.dilation,
            g.groups,
            bias=self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )
        return self._give_weights(dense)

    @override
    def _take_shape(self, topology: Topology) -> None:
        g, (out_channels, columns) = self.geometry, topology.shape
        if topology.shape == g.shape:
            return
        places = g.kernel_size[0] * g.kernel_size[1]
        if g.groups > 1 or columns % places:
            raise ValueError(
                f"a convolution of shape {g.shape} ({g.groups} groups, kernel {g.kernel_size}) cannot become one of shape "
                f"{topology.shape}: only one without groups can, by whole channels"
            )
        self.geometry = replace(g, in_channels=columns // places, out_channels=out_channels)

    @override
    def extra_repr(self) -> str:
        g = self.geometry
        text = (
            f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, stride={g.stride}, padding={self.padding}"
        )
        text += f", dilation={g.dilation}" if g.dilation != (1, 1) else ""
        text += f", groups={g.groups}" if g.groups > 1 else ""
        return f"{text}, {self._text()}"


def _geometry(
    in_channels: int, out_channels: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Geometry:
    kernel, strides, dilations = _pair(kernel_size), _pair(stride), _pair(dilation)
    if min(*kernel, *strides, *dilations) < 1:
        raise ValueError(f"kernel_size, stride and dilation must be at least 1, got {kernel}, {strides}, {dilations}")
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(f"{in_channels} and {out_channels} channels cannot be cut into {groups} groups")
    if padding == "same":
        if strides != (1, 1):
            raise ValueError(f"padding='same' goes with stride 1 only, got {strides}")
        total = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        numbers = (0, 0) if padding == "valid" else _pair(padding)
        if min(numbers) < 0:
            raise ValueError(f"padding must be at least 0, got {padding}")
        pads = tuple((p, p) for p in numbers)
    return Geometry(in_channels, out_channels, kernel, strides, pads, dilations, groups)  # type: ignore[arg-type]


def _pair(x: Any) -> Pair:
    return (x, x) if isinstance(x, int) else (int(x[0]), int(x[1]))
