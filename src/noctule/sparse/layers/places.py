"""The places of a sparse weight as one float tensor of small numbers, which survives what tools do to a state dict.

Tools clone a state dict's tensors, cast them to half precision, cut them into shards, and average those of several workers or
epochs: all of them, or those of floating point only. What happens to the values happens so to their places, which are digits from
0 to 2047: exact in float16, in sums and weighted means of equal ones. Means over other places are found by a checksum. How many
digits there are depends on the shape and the number of weights only.
"""

import zlib
from weakref import ref

import torch
from torch import Tensor

from noctule.core.topology import Topology, column_dtype

_FORMAT = 1
_BITS, _BASE = 11, 2048
_HEADER = (("format", 1), ("checksum", 3), ("rows", 3), ("columns", 3), ("weights", 6))
"""What stands before the weights of each row and the column of each weight, and in how many digits."""
_HEADER_DIGITS = sum(digits for _, digits in _HEADER)


def to_tensor(topology: Topology) -> Tensor:
    """The places as digits, float32, where the topology is.

    >>> topology = Topology.from_places((2, 3), torch.tensor([0, 1]), torch.tensor([2, 1]))
    >>> to_tensor(topology).shape, from_tensor(to_tensor(topology).half()) == topology
    (torch.Size([20]), True)
    """
    numbers = torch.cat([topology.row_ptr.diff().to(torch.int32), topology.columns.to(torch.int32)])
    digits = _digits(topology.shape[1])
    body = torch.stack([(numbers >> _BITS * place) % _BASE for place in range(digits)], 1).to(torch.int16).flatten()
    fields = {"rows": topology.shape[0], "columns": topology.shape[1], "weights": topology.size}
    head = {"format": _FORMAT, "checksum": _checksum(fields, body), **fields}
    header = [(head[name] >> _BITS * place) % _BASE for name, count in _HEADER for place in range(count)]
    return torch.cat([torch.tensor(header, dtype=torch.float32, device=body.device), body.float()])


def from_tensor(places: Tensor) -> Topology:
    """The inverse of `to_tensor`, of a tensor of any type of numbers; what is given is not trusted.

    Raises:
        ValueError: these are not the places that a sparse layer gave, or such places mixed with others.
    """
    shape = fields_of(places)
    header, body = _whole(places).split([_HEADER_DIGITS, places.numel() - _HEADER_DIGITS])
    digits = _digits(shape["columns"])
    if (
        body.numel() != (shape["rows"] + shape["weights"]) * digits
        or _checksum(shape, body) != _read(header)["checksum"]
    ):
        raise ValueError(_MIXED)
    numbers = torch.zeros(shape["rows"] + shape["weights"], dtype=torch.int32, device="cpu")
    for place, digit in enumerate(body.view(-1, digits).unbind(1)):
        numbers |= digit.to(torch.int32) << _BITS * place
    counts, columns = numbers.split([shape["rows"], shape["weights"]])
    row_ptr = torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.to(torch.int64).cumsum(0)])
    state = {
        "shape": [shape["rows"], shape["columns"]],
        "row_ptr": row_ptr,
        "columns": columns.to(column_dtype(shape["columns"])),
    }
    return Topology.from_state_dict(state).to(places.device)


def fields_of(places: Tensor) -> dict[str, int]:
    """The numbers of ``rows``, ``columns`` and ``weights`` that places as digits say.

    Raises:
        ValueError: these are no such digits.
    """
    if places.numel() < _HEADER_DIGITS or places.dim() != 1:
        raise ValueError(_MIXED)
    head = _read(_whole(places[:_HEADER_DIGITS]))
    if head["format"] != _FORMAT:
        raise ValueError(
            f"not the places of a sparse layer, or in the format {head['format']}, of a newer version of Noctule than this: "
            f"this one reads the format {_FORMAT}"
        )
    return {name: head[name] for name in ("rows", "columns", "weights")}


class Given:
    """The places in state dicts of a layer that are still around: like the values there they are the layer's own, not copies."""

    def __init__(self) -> None:
        self._kept: list[tuple[ref[Tensor], int]] = []

    def add(self, places: Tensor) -> Tensor:
        """These are given now."""
        self._kept = [(given, version) for given, version in self._kept if given() is not None]
        self._kept.append((ref(places), places._version))
        return places

    def check(self, topology: Topology) -> bool:
        """Raise RuntimeError where some were written to and the layer has others; else whether there are any."""
        around = [
            (given, version)
            for given, version in ((given(), version) for given, version in self._kept)
            if given is not None
        ]
        if any(given._version != version and not torch.equal(given, to_tensor(topology)) for given, version in around):
            raise RuntimeError(
                "the places in a state dict of this layer were written to, as torch.distributed.checkpoint does, and with them "
                "the values, which belong to these places: call model.load_state_dict(state) with it before the model is used"
            )
        self._kept = [(ref(given), given._version) for given, _ in around]
        return bool(around)

    def moved(self, topology: Topology) -> None:
        """Where the layer has other places now, and as many, so have they."""
        if around := [given for kept, _ in self._kept if (given := kept()) is not None]:
            places = to_tensor(topology)
            same = [
                given for given in around if given.shape == places.shape
            ]  # else values are a new tensor, and these the old one's
            self._kept = [(ref(given.copy_(places)), given._version) for given in same]


_MIXED = (
    "not the places that a sparse layer gave: they are damaged or cast to a type that cannot hold them (bfloat16), or were "
    "averaged with those of a model whose places are others. Numbers of different places cannot be averaged slot by slot: "
    "merge() does it by place, and ExponentialAverage follows places that move"
)


def _digits(most: int) -> int:
    """How many digits hold each number from 0 to this one."""
    return max(1, -(-most.bit_length() // _BITS))


def _read(header: Tensor) -> dict[str, int]:
    numbers, start = {}, 0
    for name, count in _HEADER:
        numbers[name] = sum(
            digit << _BITS * place for place, digit in enumerate(header[start : start + count].tolist())
        )
        start += count
    return numbers


def _whole(places: Tensor) -> Tensor:
    """The digits as int16 on the CPU, where they are whole numbers still, or nearly so after a mean of many."""
    digits = places.detach().cpu()
    if digits.is_floating_point():
        exact = digits.to(torch.promote_types(digits.dtype, torch.float32))
        digits = exact.round()
        if not bool(((exact - digits).abs() < _ROUNDING).all()):  # NaN too
            raise ValueError(_MIXED)
    if digits.numel() and not (int(digits.min()) >= 0 and int(digits.max()) < _BASE):
        raise ValueError(_MIXED)
    return digits.to(torch.int16)


_ROUNDING = 0.3
"""How far a moving average of ten thousand equal numbers may drift, in float32 and with a decay of 0.9999."""


def _checksum(fields: dict[str, int], body: Tensor) -> int:
    start = zlib.crc32(repr(tuple(sorted(fields.items()))).encode())
    return zlib.crc32(body.cpu().numpy().tobytes(), start)
