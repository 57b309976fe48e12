"""Which layer gets how many bits, said once for all or by name."""

from collections.abc import Mapping

from torch import nn

from noctule.compress.quantize.numbers import check_bits
from noctule.core.convert import Leave

Bits = int | Mapping[str, int]
"""8, 4 or 1, or a mapping from names of layers; layers that it does not name stay as they are."""


def check(bits: Bits) -> None:
    """Refuse numbers of bits that weights cannot have."""
    for each in [bits] if isinstance(bits, int) else bits.values():
        check_bits(each)


def check_names(bits: Bits, modules: Mapping[str, nn.Module]) -> None:
    """Refuse bits for layers of another model."""
    if not isinstance(bits, int) and bits and not any(name in modules for name in bits):
        raise ValueError(f"bits= is of another model: this one has no {', '.join([*bits][:8])}")


def bits_for(bits: Bits, name: str) -> int:
    """The bits of a layer; raises `Leave` where it has none."""
    if isinstance(bits, int):
        return bits
    if name not in bits:
        raise Leave("bits= does not name it")
    return bits[name]
