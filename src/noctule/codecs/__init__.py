"""How does a tensor become fewer bytes? Codecs for the wire, for memory and for the disk."""

from noctule.codecs.affine import Affine
from noctule.codecs.cast import Cast
from noctule.codecs.dithering import NaturalDithering
from noctule.codecs.lowrank import LowRank
from noctule.codecs.natural import NaturalCompression
from noctule.codecs.qsgd import QSGD
from noctule.codecs.randomk import RandomK
from noctule.codecs.signs import SignSGD
from noctule.codecs.terngrad import TernGrad
from noctule.codecs.topk import TopK
from noctule.core.codec import Codec, Payload, pack, unpack
from noctule.core.exact import Exact

__all__ = [
    "QSGD",
    "Affine",
    "Cast",
    "Codec",
    "Exact",
    "LowRank",
    "NaturalCompression",
    "NaturalDithering",
    "Payload",
    "RandomK",
    "SignSGD",
    "TernGrad",
    "TopK",
    "pack",
    "unpack",
]
