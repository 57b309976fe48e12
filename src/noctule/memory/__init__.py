"""How does a training step need less memory? Saved activations in fewer bits, or computed again."""

from noctule.memory.bound import AdaptiveBound
from noctule.memory.saved import Saved, compress_saved

__all__ = ["AdaptiveBound", "Saved", "compress_saved"]
