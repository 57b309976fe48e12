"""Tensors as fewer bytes, for the wire, for memory and for the disk."""

from noctule.codecs.base import Codec, Payload
from noctule.codecs.cast import Cast

__all__ = ["Cast", "Codec", "Payload"]
