"""A convolution as a sparse product: each non-zero is a shifted multiply-add of whole rows of an image.

Images are feature-major, (C, H, W, B) with the batch innermost. Place (o, c, i, j) of the kernel then adds w times the row
(c, h SH + i DH, ...) of the padded image to the row (o, h) of the output, for W x B numbers on end: the sparse product of
`noctule.kernels` on rows that overlap. No im2col is made; what is made is one copy of the image with zeros round it, cut into
phases where the convolution strides. The way back is the same product over the kernel turned round.

Shapes: B batch, C channels in, O out, G groups, N stored weights, L lines (rows of the output), M rows of the frame.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional as F

from noctule import kernels
from noctule.core.topology import Places, Topology, Transposed, column_dtype
from noctule.kernels import Epilogue, Frame, Kept
from noctule.sparse.layers.dense_twin import dense_convolution_gradients
from noctule.sparse.layers.derivatives import epilogue_slopes
from noctule.sparse.layers.surroundings import first_order, has_storage

Pair = tuple[int, int]

MOST_SIZES = 4
"""Sizes of images for which a topology keeps its shifted places: those of training, evaluation and their last batches."""


@dataclass(frozen=True)
class Geometry:
    """What a convolution is besides its weights."""

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    """Zeros above and below, left and right."""
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def shape(self) -> Pair:
        """Of the weight as a matrix: (O, C / G x KH x KW)."""
        return self.out_channels, self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Of the dense weight, (O, C / G, KH, KW)."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def output_size(self, size: Pair) -> Pair:
        """(H, W) of the output.

        Raises:
            ValueError: the kernel is larger than the padded image.
        """
        high, wide = (
            (size[k] + sum(self.padding[k]) - self.dilation[k] * (self.kernel_size[k] - 1) - 1) // self.stride[k] + 1
            for k in (0, 1)
        )
        if min(high, wide) < 1:
            raise ValueError(
                f"a kernel of {self.kernel_size} (dilation {self.dilation}) does not fit an image of {size} "
                f"with padding {self.padding}"
            )
        return high, wide

    def steps(self, axis: int) -> Tensor:
        """Where the kernel's places lie along an axis, in pixels of the padded image."""
        return torch.arange(self.kernel_size[axis], device="cpu") * self.dilation[axis]


class Shifted(Places):
    """The places of a convolution as `Places`, over the frame of images of one size."""

    def __init__(self, topology: Topology, geometry: Geometry, image: Pair, frames: "_Frames") -> None:
        self.geometry, self.image, self.output = geometry, image, geometry.output_size(image)
        self.frame, self.back = frames.frame, frames.back
        self._frames, self._topology = frames, ref(topology)
        (sh, sw), (high, wide) = geometry.stride, (geometry.steps(k).tolist() for k in (0, 1))
        frame = frames.frame
        place = torch.tensor(
            [[frame.row((h % sh, w % sw), h // sh, w // sw) for w in wide] for h in high], device="cpu"
        )
        sources = (geometry.in_channels - 1) * frame.rows + int(place.max()) + 1
        channel, i, j = self._kernel_places(topology)
        self.shape = (geometry.out_channels, sources)
        self.row_ptr, self.size = topology.row_ptr, topology.size
        self.columns = (channel * frame.rows + place.to(topology.device)[i, j]).to(column_dtype(sources))

    @cached_property
    def transposed(self) -> Transposed:
        """For each residue and channel of the input, the rows of the output's gradient that it takes."""
        geometry, back, frames = self.geometry, self.back, self._frames
        topology = self._topology()
        assert topology is not None
        device, pointer = topology.device, topology.row_ptr.dtype
        channel, i, j = self._kernel_places(topology)
        residue_high, residue_wide = (r.to(device) for r in frames.residues)
        down, right = (shift.to(device) for shift in frames.shifts)
        to = (residue_high[i] * geometry.stride[1] + residue_wide[j]) * geometry.in_channels + channel
        read = topology.rows() * back.rows + (down[i] + back.top) * back.wide + right[j] + back.left
        last = int(frames.shifts[0].max() + back.top) * back.wide + int(frames.shifts[1].max() + back.left)
        sources = (geometry.out_channels - 1) * back.rows + last + 1
        slots = torch.argsort(to, stable=True)
        rows = geometry.stride[0] * geometry.stride[1] * geometry.in_channels
        row_ptr = torch.zeros(rows + 1, dtype=pointer, device=device)
        row_ptr[1:] = torch.bincount(to, minlength=rows).cumsum(0)
        return Transposed(row_ptr, read[slots].to(column_dtype(sources)), slots.to(pointer), sources)

    @property
    def nbytes(self) -> int:
        """Bytes of the indices that are not the topology's own."""
        return self.columns.nbytes + sum(t.nbytes for t in self.__dict__.get("transposed", ())[:3])

    def rows_of(self, frame: Tensor) -> Tensor:
        """What the product reads of a frame (C M, B): overlapping rows (rows, L, W' B)."""
        return _overlapping(frame, self.shape[1], self.frame.wide, self.output)

    def back_rows_of(self, frame: Tensor) -> Tensor:
        """What the way back reads of the framed gradient (O M, B)."""
        return _overlapping(frame, self.transposed.sources, self.back.wide, self._residue_size)

    def apart(self, dx: Tensor) -> Tensor:
        """What comes back, by residue and channel, put together to images (B, C, H, W)."""
        (sh, sw), channels, (high, wide) = self.geometry.stride, self.geometry.in_channels, self._residue_size
        dx = dx.view(sh, sw, channels, high, wide, -1).permute(2, 3, 0, 4, 1, 5)
        dx = dx.reshape(channels, high * sh, wide * sw, -1)
        return dx[:, : self.image[0], : self.image[1]].permute(3, 0, 1, 2)

    @property
    def _residue_size(self) -> Pair:
        """Every SH-th row and SW-th column of the image are so many."""
        (sh, sw), (high, wide) = self.geometry.stride, self.image
        return -(-high // sh), -(-wide // sw)

    def _kernel_places(self, topology: Topology) -> tuple[Tensor, Tensor, Tensor]:
        """Channel of the input, row and column in the kernel of each place."""
        geometry, columns = self.geometry, topology.columns.to(torch.int64)
        kh, kw = geometry.kernel_size
        channel = columns // (kh * kw)
        if geometry.groups > 1:
            group = topology.rows() // (geometry.out_channels // geometry.groups)
            channel += group * (geometry.in_channels // geometry.groups)
        return channel, columns // kw % kh, columns % kw


def shifted(topology: Topology, geometry: Geometry, image: Pair, batch: int) -> Shifted:
    """The places of a topology over images of one size; made in O(N) and kept with the topology."""
    frames = _frames(geometry, image, batch)
    key = (geometry, image, frames.frame, frames.back)
    if key not in topology.derived:
        while len(topology.derived) >= MOST_SIZES:
            del topology.derived[next(iter(topology.derived))]
        topology.derived[key] = Shifted(topology, geometry, image, frames)
    return topology.derived[key]


class _Frames(NamedTuple):
    frame: Frame
    """Where the image lies."""
    back: Frame
    """Where the output's gradient lies on the way back."""
    shifts: tuple[Tensor, Tensor]
    """For each row (and column) of the kernel: output t of its residue reads row t + shift of the gradient."""
    residues: tuple[Tensor, Tensor]
    """For each row (and column) of the kernel: which of every SH-th rows of the image it reaches."""


@lru_cache(maxsize=256)
def _frames(geometry: Geometry, image: Pair, batch: int) -> _Frames:
    output = geometry.output_size(image)
    sides, back, shifts, residues = [], [], [], []
    for k in (0, 1):
        stride, before, at = geometry.stride[k], geometry.padding[k][0], geometry.steps(k)
        phase = at % stride
        first = torch.div(before - phase + stride - 1, stride, rounding_mode="floor")
        shift = first - torch.div(at, stride, rounding_mode="floor")
        least, most = int(shift.min()), int(shift.max())
        sides.append(output[k] + int(at[-1]) // stride)
        back.append((-least, most - least - (-image[k] // stride)))
        shifts.append(shift)
        residues.append(first * stride + phase - before)
    (top, high), (left, wide) = back
    frame = Frame(geometry.padding[0][0], geometry.padding[1][0], geometry.stride, sides[0], sides[1])
    return _Frames(
        frame.spread(batch),
        Frame(top, left, (1, 1), high, wide).spread(batch),
        (shifts[0], shifts[1]),
        (residues[0], residues[1]),
    )


def _overlapping(frame: Tensor, rows: int, wide: int, output: Pair) -> Tensor:
    batch = frame.shape[1]
    return frame.as_strided((rows, output[0], output[1] * batch), (batch, wide * batch, 1), frame.storage_offset())


@dataclass(frozen=True, eq=False)
class Framed:
    """Images as a convolution reads them; what ``watch`` is shown as the input."""

    data: Tensor
    """(C M, B)."""
    image: Pair

    def images(self, geometry: Geometry) -> Tensor:
        """The images again, (B, C, H, W)."""
        frame = _frames(geometry, self.image, self.data.shape[1]).frame
        (ph, pw), channels = frame.phases, geometry.in_channels
        x = self.data.reshape(channels, frame.rows, -1)[:, : ph * pw * frame.high * frame.wide]
        x = x.reshape(channels, ph, pw, frame.high, frame.wide, -1).permute(0, 3, 1, 4, 2, 5)
        x = x.reshape(channels, frame.high * ph, frame.wide * pw, -1)
        part = x[:, frame.top : frame.top + self.image[0], frame.left : frame.left + self.image[1]]
        beyond = (0, self.image[1] - part.shape[2], 0, self.image[0] - part.shape[1])
        return F.pad(part, (0, 0, *beyond)).permute(
            3, 0, 1, 2
        )  # pixels that no kernel place reaches are not in the frame


class SparseConvolution(torch.autograd.Function):
    """y (B, O, H', W') = epilogue(x (B, C, H, W) * W + bias); what it returns is a view of a feature-major (O, H', W', B).

    Where the input needs a gradient, the frame is returned too: a second output, through which second derivatives find their way
    to ``x`` without another copy of it. They are those of the dense convolution.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BCHW: Tensor,
        values: Tensor,
        bias: Tensor | None,
        topology: Topology,
        geometry: Geometry,
        epilogue: Epilogue,
        watch: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Keep the framed input and two bits for each output at most."""
        y, kept, frame = convolve(topology, geometry, values, bias, x_BCHW, epilogue, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(frame, values, kept.positive, kept.kept)
        ctx.topology, ctx.geometry, ctx.epilogue, ctx.watch = topology, geometry, epilogue, watch
        ctx.image, ctx.has_bias = (x_BCHW.shape[2], x_BCHW.shape[3]), bias is not None
        y = y.data  # not as a view of something in here, which an in-place ReLU may not touch
        if not ctx.needs_input_grad[0]:
            return y
        ctx.set_materialize_grads(False)
        return y, frame

    @staticmethod
    def backward(ctx: Any, dy_BOHW: Tensor | None, dframe: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The three gradients; ``watch`` is shown what they are made of."""
        frame, values, positive, kept = ctx.saved_tensors
        needs_x, needs_values, needs_bias, *_ = ctx.needs_input_grad
        needs, state = (needs_x, needs_values, needs_bias and ctx.has_bias), Kept(ctx.epilogue, positive, kept)
        dx = dvalues = dbias = None
        if dy_BOHW is not None:
            backward = convolve_backward if first_order(dy_BOHW) else _dense_backward
            dz, dx, dvalues, dbias = backward(
                ctx.topology, ctx.geometry, values, frame, ctx.image, dy_BOHW, state, needs
            )
            if ctx.watch is not None and has_storage(dz):
                ctx.watch(dz.detach(), Framed(frame.detach(), ctx.image))
        if dframe is not None:
            later = Framed(dframe, ctx.image).images(ctx.geometry)
            dx = later if dx is None else dx + later
        return dx, dvalues, dbias, None, None, None, None


def sparse_convolution(
    x_BCHW: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Topology,
    geometry: Geometry,
    epilogue: Epilogue,
    watch: Any,
) -> Tensor:
    """y (B, O, H', W') of a `SparseConvolution`."""
    y: Any = SparseConvolution.apply(x_BCHW, values, bias, topology, geometry, epilogue, watch)
    return y if isinstance(y, Tensor) else y[0]


def convolve(
    topology: Topology,
    geometry: Geometry,
    values: Tensor,
    bias: Tensor | None,
    x_BCHW: Tensor,
    epilogue: Epilogue,
    *,
    keep: bool,
) -> tuple[Tensor, Kept, Tensor]:
    """The output (B, O, H', W'), what its epilogue's backward needs, and the framed input."""
    batch = x_BCHW.shape[0]
    places = shifted(topology, geometry, (x_BCHW.shape[2], x_BCHW.shape[3]), batch)
    frame = kernels.place(x_BCHW, places.frame)
    y, kept = kernels.spmm(places, values, places.rows_of(frame), bias, epilogue, keep=keep)
    return y.view(geometry.out_channels, *places.output, batch).permute(3, 0, 1, 2), kept, frame


def convolve_backward(
    topology: Topology,
    geometry: Geometry,
    values: Tensor,
    frame: Tensor,
    image: Pair,
    dy_BOHW: Tensor,
    kept: Kept,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dz (O, L, W' B), and of what is needed dx (B, C, H, W), dvalues (N,), dbias (O,)."""
    needs_x, needs_values, needs_bias = needs
    places = shifted(topology, geometry, image, frame.shape[1])
    dy = feature_major(dy_BOHW)
    dz, dbias = kernels.epilogue_backward(dy, kept, bias=needs_bias and not needs_values)
    dvalues = dx = None
    if needs_values:
        dvalues, dbias = kernels.gradients(places, dz, places.rows_of(frame), bias=needs_bias)
    if needs_x:
        back = kernels.place(images(dz, places.output), places.back)
        dx = places.apart(kernels.spmm_t(places, values, places.back_rows_of(back)))
    return dz, dx, dvalues, dbias


def _dense_backward(
    topology: Topology,
    geometry: Geometry,
    values: Tensor,
    frame: Tensor,
    image: Pair,
    dy_BOHW: Tensor,
    kept: Kept,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The same as `convolve_backward`, of the dense convolution: it can be differentiated again."""
    batch, rows, high, wide = dy_BOHW.shape
    dz = dy_BOHW.permute(1, 2, 3, 0).reshape(rows, high, wide * batch)
    if kept.changed:
        dz = dz * epilogue_slopes(kept, dz)
    dz_BOHW = dz.reshape(rows, high, wide, batch).permute(3, 0, 1, 2)
    x = Framed(frame, image).images(geometry)
    dx, dvalues = dense_convolution_gradients(x, values, dz_BOHW, topology, geometry, needs[:2])
    return dz, dx, dvalues, dz.sum((1, 2)) if needs[2] else None


def feature_major(y_BOHW: Tensor) -> Tensor:
    """(O, H, W B), the batch innermost: a view where it already lies so, else a copy."""
    y = y_BOHW.permute(1, 2, 3, 0)
    if not y.is_contiguous():
        batch, channels, high, wide = y_BOHW.shape
        y = kernels.place(y_BOHW, Frame(0, 0, (1, 1), high, wide)).view(channels, high, wide, batch)
    return y.flatten(2)


def images(y: Tensor, size: Pair) -> Tensor:
    """(B, O, H, W) of a feature-major (O, H, W B)."""
    return y.view(y.shape[0], *size, -1).permute(3, 0, 1, 2)
