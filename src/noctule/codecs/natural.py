"""Powers of two, in one byte: a sign and an exponent.

Horvath, Ho, Horvath, Sahu, Canini, Richtarik: Natural Compression for Distributed Deep Learning, 2022 (arXiv 1905.10988).

Differs from the paper: 8 bits instead of 9. The code counts exponents from a floor of the bucket, and reaches down to 2^-125 of
the bucket's largest number.
"""

import math
import zlib
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from noctule.codecs.steps import buckets, check_bucket, code_for, draw_seed, flat
from noctule.core.codec import Layout, Payload

_PLAIN, _DEFLATED = 0, 1


@dataclass(frozen=True)
class NaturalCompression:
    """Rounds to one of the two powers of two around a number, by chance, so that the mean is the number: 8 bits each.

    The second moment is at most 9/8 of the tensor's. What lies below the smallest code (2^-125 of the bucket's largest number, and
    never less than 2^-126) becomes that code or zero, by chance too, in steps of 2^-23 of it: so denormals are seldom more
    than zero, and their mean is right. Magnitudes over 2^127 may become inf, as the power above them is none of float32. A
    bucket with inf or NaN decodes to NaN.

    Args:
        bucket: elements that share a floor, of one byte.
        entropy: deflate the codes (on the CPU, and never to more than one byte above their number); gradients take about 4 bits.

    >>> codec = NaturalCompression()
    >>> codec.decode(codec.encode(torch.tensor([0.0, 0.5, -4.0]))).tolist()
    [0.0, 0.5, -4.0]
    """

    bucket: int = 1024
    _: KW_ONLY
    entropy: bool = False
    unbiased: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_bucket(self.bucket)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """A byte for each element and for each bucket."""
        codes, floors = code_for(x.device).natural_encode(flat(x), self.bucket, draw_seed(generator))
        return Payload((floors, _deflate(codes) if self.entropy else codes), tuple(x.shape), x.dtype)

    def decode(self, payload: Payload) -> Tensor:
        """Powers of two and zeros."""
        floors, codes = payload.parts
        if self.entropy:
            codes = _inflate(codes, math.prod(payload.shape))
        return code_for(codes.device).natural_decode(codes, floors, self.bucket).to(payload.dtype).view(payload.shape)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Floors and codes."""
        n = math.prod(shape)
        return (torch.uint8, buckets(n, self.bucket)), (torch.uint8, None if self.entropy else n)


def _deflate(codes: Tensor) -> Tensor:
    """One byte for whether the rest is deflated, then the shorter of both.

    Codes hardly repeat in any order but runs of zeros, so only these are looked for: faster than zlib's own search and shorter.
    """
    plain = codes.cpu().numpy().tobytes()
    deflater = zlib.compressobj(1, strategy=zlib.Z_RLE)
    deflated = deflater.compress(plain) + deflater.flush()
    if len(deflated) >= codes.numel():
        return torch.cat([codes.new_tensor([_PLAIN]), codes])
    return torch.frombuffer(bytearray([_DEFLATED]) + deflated, dtype=torch.uint8).to(codes.device)


def _inflate(wire: Tensor, n: int) -> Tensor:
    """The codes again.

    Raises:
        ValueError: these are not n codes.
    """
    how = int(wire[0]) if wire.numel() else None
    if how == _PLAIN and wire.numel() == n + 1:
        return wire[1:]
    if how == _DEFLATED:
        inflater, deflated = zlib.decompressobj(), wire[1:].cpu().numpy().tobytes()
        try:
            plain = inflater.decompress(deflated, n + 1)  # no more, however much there is
        except zlib.error as error:
            raise ValueError(f"the wire is torn: {len(deflated)} bytes are not {n} deflated codes ({error})") from error
        if len(plain) == n and inflater.eof and not inflater.unused_data:
            return torch.frombuffer(bytearray(plain), dtype=torch.uint8).to(wire.device)
    raise ValueError(f"the wire is torn: {wire.numel()} bytes are not {n} codes")
