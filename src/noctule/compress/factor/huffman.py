"""Codes below 256 as bytes of about their entropy: canonical Huffman codes.

Huffman 1952. Every 2048 symbols a block begins, whose length in bits is stored: blocks are decoded side by side in numpy.
"""

import heapq
import struct

import numpy as np
import torch
from torch import Tensor

LONGEST = 16
"""Bits of a code at most."""
BLOCK = 2048
_HEAD = struct.Struct("<QH")


def entropy_bytes(codes_N: Tensor) -> float:
    """The least that any code of single symbols takes for these, from their frequencies.

    >>> entropy_bytes(torch.tensor([0, 1, 0, 1, 0, 1, 0, 1], dtype=torch.uint8))
    1.0
    """
    counts = np.bincount(codes_N.cpu().numpy())
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8) + 0.0 if len(counts) else 0.0


def pack(codes_N: Tensor, codes: int) -> bytes:
    """The codes, each below ``codes``, as bytes: number of symbols, lengths of the codes and of the blocks, bits.

    Raises:
        ValueError: not uint8 in one dimension, or a code is too high.

    >>> unpack(pack(torch.tensor([2, 0, 2], dtype=torch.uint8), 3)).tolist()
    [2, 0, 2]
    """
    if codes_N.dtype is not torch.uint8 or codes_N.dim() != 1 or not 1 <= codes <= 256:
        raise ValueError(
            f"pack takes one-dimensional uint8 and from 1 to 256 codes, got {codes_N.dtype} of shape {tuple(codes_N.shape)} "
            f"and {codes}"
        )
    x = codes_N.cpu().numpy()
    if len(x) and x.max() >= codes:
        raise ValueError(f"the code {x.max()} is not below {codes}")
    lengths = _lengths(np.bincount(x, minlength=codes))
    values = _canonical(lengths)
    sizes = [int(lengths[part].sum()) for part in np.split(x, range(BLOCK, len(x), BLOCK)) if len(part)]
    bits = [_bits(part, lengths, values) for part in np.split(x, range(2**18, len(x), 2**18))]
    body = np.packbits(np.concatenate(bits)).tobytes()
    head = _HEAD.pack(len(x), codes) + lengths.astype(np.uint8).tobytes() + np.array(sizes, "<u2").tobytes()
    return head + body


def unpack(packed: bytes) -> Tensor:
    """The codes (N,) uint8 again.

    Raises:
        ValueError: the bytes are not what `pack` makes.
    """
    torn = ValueError(f"these {len(packed)} bytes are torn, or not from pack()")
    if len(packed) < _HEAD.size:
        raise torn
    n, codes = _HEAD.unpack_from(packed)
    blocks, body = -(-n // BLOCK), _HEAD.size + codes
    if not 1 <= codes <= 256 or len(packed) < body + 2 * blocks:
        raise torn
    lengths = np.frombuffer(packed, np.uint8, codes, _HEAD.size).astype(np.int64)
    sizes = np.frombuffer(packed, "<u2", blocks, body).astype(np.int64)
    ends = sizes.cumsum()
    total = int(ends[-1]) if blocks else 0
    used = lengths[lengths > 0]
    if len(packed) != body + 2 * blocks + -(-total // 8) or (lengths > LONGEST).any() or (2.0**-used).sum() > 1.0:
        raise torn
    symbol, length = _table(lengths)
    # the last block runs on to the end of its line
    data = np.frombuffer(packed + bytes(BLOCK * LONGEST // 8 + 4), np.uint8)[body + 2 * blocks :].astype(np.uint32)
    out, at = np.empty((blocks, BLOCK), np.uint8), ends - sizes
    last = n - (blocks - 1) * BLOCK
    for k in range(BLOCK if blocks > 1 else n):
        if k == last and at[-1] != ends[-1]:
            raise torn
        byte = at >> 3
        window = data[byte] << 16 | data[byte + 1] << 8 | data[byte + 2]
        window = (window >> (8 - (at & 7)).astype(np.uint32)) & 0xFFFF
        out[:, k] = symbol[window]
        at = at + length[window]
    whole = blocks if last == BLOCK or blocks <= 1 else blocks - 1
    if (at[:whole] != ends[:whole]).any():
        raise torn
    return torch.from_numpy(out.reshape(-1)[:n].copy())


def _lengths(counts: np.ndarray) -> np.ndarray:
    """Bits of each symbol's code, 0 where it does not occur; counts are flattened until no code is too long."""
    while True:
        lengths = np.zeros(len(counts), np.int64)
        heap: list[tuple[int, int, tuple[int, ...]]] = [
            (int(count), k, (k,)) for k, count in enumerate(counts) if count
        ]
        if len(heap) == 1:
            lengths[heap[0][1]] = 1
        heapq.heapify(heap)
        while len(heap) > 1:
            a, b = heapq.heappop(heap), heapq.heappop(heap)
            lengths[[*a[2], *b[2]]] += 1
            heapq.heappush(heap, (a[0] + b[0], a[1], a[2] + b[2]))
        if lengths.max(initial=0) <= LONGEST:
            return lengths
        counts = np.where(counts > 0, counts // 2 + 1, 0)


def _canonical(lengths: np.ndarray) -> np.ndarray:
    """The codes that follow from their lengths: in the order of length, then of symbol."""
    values, value, before = np.zeros(len(lengths), np.int64), 0, 0
    for k in np.lexsort((np.arange(len(lengths)), lengths)):
        if lengths[k]:
            value <<= int(lengths[k]) - before
            values[k], value, before = value, value + 1, int(lengths[k])
    return values


def _bits(x: np.ndarray, lengths: np.ndarray, values: np.ndarray) -> np.ndarray:
    sizes = lengths[x]
    ends = sizes.cumsum()
    left = np.repeat(ends, sizes) - 1 - np.arange(int(ends[-1]) if len(ends) else 0)
    return (np.repeat(values[x], sizes) >> left & 1).astype(np.uint8)


def _table(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbol and length of the code that begins each of the 2^16 windows."""
    symbol, length = np.zeros(1 << LONGEST, np.uint8), np.zeros(1 << LONGEST, np.int64)
    values = _canonical(lengths)
    for k in lengths.nonzero()[0]:
        first, many = values[k] << (LONGEST - lengths[k]), 1 << (LONGEST - lengths[k])
        symbol[first : first + many], length[first : first + many] = k, lengths[k]
    return symbol, length
