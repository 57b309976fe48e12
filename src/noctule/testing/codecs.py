"""The laws of a codec: call `check_codec` in a test of your own codec."""

import math

import torch
from torch import Tensor

from noctule.codecs import Codec, Payload, pack, unpack

SHAPES = ((), (0,), (1,), (7,), (3, 0, 2), (33, 40), (2, 3, 1500))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_codec(
    codec: Codec,
    *,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    device: torch.device | str = "cpu",
    draws: int = 600,
    sigmas: float = 5.0,
) -> None:
    """Check the laws of a codec on random tensors from fixed seeds.

    Args:
        codec: the codec under test.
        shapes: of the tensors.
        dtypes: of the tensors.
        device: of the tensors; generators are the CPU's.
        draws: encodings of one small tensor, whose mean must be the tensor if the codec claims to be unbiased.
        sigmas: tolerance of the mean, in standard errors.

    Raises:
        AssertionError: a law is broken; the text says which.
    """
    assert isinstance(codec, Codec), f"{codec!r} lacks encode, decode, layout or unbiased"
    for number, shape in enumerate(shapes):
        for dtype in dtypes:
            x = torch.randn(shape, generator=_generator(number)).to(device, dtype)
            _check_wire(codec, x)
            _check_wrong_wires(codec, x)
            _check_not_finite(codec, x)
            zeros = torch.zeros_like(x)
            assert bool((_there_and_back(codec, zeros) == 0).all()), f"{codec} does not decode zeros {shape} to zeros"
    if codec.unbiased:
        check_unbiased(codec, torch.randn(6, 8, generator=_generator(0)).to(device), draws=draws, sigmas=sigmas)


def check_unbiased(codec: Codec, x: Tensor, *, draws: int, sigmas: float) -> Tensor:
    """Check that the mean of many decodings is the tensor, element by element; returns their mean square error."""
    generator, exact = _generator(0), x.double()
    total, squares, largest = torch.zeros_like(exact), torch.zeros_like(exact), 0.0
    for _ in range(draws):
        error = codec.decode(codec.encode(x, generator)).double() - exact
        total, squares, largest = total + error, squares + error**2, max(largest, float(error.abs().max()))
    mean, mean_square = total / draws, squares / draws
    # Bernstein: rare large errors may not have occurred yet
    allowed = sigmas * (mean_square / draws).sqrt() + sigmas**2 * largest / draws + 1e-6 * exact.abs().amax()
    worst = (mean.abs() / allowed.clamp(min=1e-300)).max()
    assert bool((mean.abs() <= allowed).all()), (
        f"{codec} is biased: a mean of {draws} is {worst:.2f} times off what it may be"
    )
    return mean_square


def _check_wire(codec: Codec, x: Tensor) -> None:
    """Check shapes, dtypes, numbers of bytes and repeatability of an encoding."""
    before, about = x.clone(), f"{codec} on {x.dtype} of shape {tuple(x.shape)}"
    payload = codec.encode(x, _generator(1))
    assert _equal(x, before), f"{about}: encoding changes the tensor"
    assert (payload.shape, payload.dtype) == (tuple(x.shape), x.dtype), (
        f"{about}: the payload says shape {payload.shape} and {payload.dtype}"
    )
    layout = codec.layout(tuple(x.shape), x.dtype)
    assert sum(count is None for _, count in layout) <= 1, f"{about}: the layout has more than one variable part"
    assert len(layout) == len(payload.parts), f"{about}: {len(payload.parts)} parts, {len(layout)} in the layout"
    for part, (kind, count) in zip(payload.parts, layout):
        assert part.dim() == 1, f"{about}: a part of {part.dim()} dimensions"
        assert part.is_contiguous(), f"{about}: a part that is not contiguous"
        assert part.device == x.device, f"{about}: a part on {part.device}"
        assert part.dtype is kind, f"{about}: a part of {part.dtype}, the layout says {kind}"
        assert count in (None, part.numel()), f"{about}: a part of {part.numel()} elements, the layout says {count}"
    wire = pack(payload)
    assert wire.numel() == payload.nbytes, f"{about}: {payload.nbytes} bytes by the payload, {wire.numel()} on the wire"
    again = unpack(codec, wire, payload.shape, payload.dtype)
    for part, other in zip(payload.parts, again.parts):
        assert _equal(part, other), f"{about}: unpacking does not give what was packed"
    y = codec.decode(payload)
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device), (
        f"{about}: decodes to {y.dtype} {tuple(y.shape)}"
    )
    assert _equal(codec.decode(again), y), f"{about}: decodes to something else after the wire"
    assert _equal(pack(codec.encode(x, _generator(1))), wire), f"{about}: other bytes from the same generator"
    if x.dim() == 2:
        laid_out = x.t().contiguous().t()
        assert _equal(pack(codec.encode(laid_out, _generator(1))), wire), (
            f"{about}: other bytes if it is not contiguous"
        )


def _check_wrong_wires(codec: Codec, x: Tensor) -> None:
    """Check that too short and too long wires are refused, and random bytes refused or decoded."""
    about = f"{codec} on {x.dtype} of shape {tuple(x.shape)}"
    wire = pack(codec.encode(x, _generator(1)))
    for wrong in (wire[:-1], torch.cat([wire, wire.new_zeros(1)])):
        if wrong.numel() == wire.numel():
            continue
        try:
            codec.decode(unpack(codec, wrong, tuple(x.shape), x.dtype))
        except ValueError:
            continue
        raise AssertionError(f"{about}: {wrong.numel()} bytes are taken for {wire.numel()}")
    noise = torch.randint(0, 256, wire.shape, dtype=torch.uint8, generator=_generator(2)).to(wire.device)
    try:
        y = codec.decode(unpack(codec, noise, tuple(x.shape), x.dtype))
    except ValueError:
        return
    assert (y.shape, y.dtype) == (x.shape, x.dtype), f"{about}: random bytes decode to {y.dtype} {tuple(y.shape)}"


def _check_not_finite(codec: Codec, x: Tensor) -> None:
    for value in (math.inf, -math.inf, math.nan):
        for at in {0, x.numel() // 2, x.numel() - 1} if x.numel() else ():
            y = x.clone()
            y.view(-1)[at] = value
            seen = not bool(_there_and_back(codec, y).isfinite().all())
            assert seen, f"{codec}: {value} at {at} of {x.numel()} elements vanishes"


def _there_and_back(codec: Codec, x: Tensor) -> Tensor:
    payload = codec.encode(x, _generator(1))
    return codec.decode(Payload(payload.parts, payload.shape, payload.dtype))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal bits, NaN included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
