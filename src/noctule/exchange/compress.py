"""Send fewer bytes, and later what they left out."""

from typing import Any

import torch
from torch import Tensor

from noctule.codecs import Codec, RandomK
from noctule.core.exchange import Stage
from noctule.core.finite import all_finite
from noctule.core.remap import Remap


class Compress(Stage):
    """Encodes what is left of earlier exchanges together with what is new (error feedback, Seide et al. 2014; Karimireddy et al.
    2019, arXiv 1901.09847).

    Conservation: what was delivered plus what is owed is what was given, key by key, whatever the path; a connection that is
    dropped takes what it was owed with it, and `forgone` says how much that was.

    Args:
        codec: what turns tensors into fewer bytes.
        error_feedback: whether to keep what the codec leaves out for the next exchange (default: only a biased codec needs it).
    """

    def __init__(self, codec: Codec, *, error_feedback: bool | None = None) -> None:
        """Nothing is owed yet."""
        self.codec: Codec = codec
        self.owes = self.error_feedback = not codec.unbiased if error_feedback is None else error_feedback
        self.owed: dict[str, Tensor] = {}
        """Key -> what of it is still to be sent, whatever a `Weigh` before this stage makes of it; in float32 at least."""
        self.forgone: dict[str, float] = {}
        """Key -> the sum of what was owed to connections that are gone."""
        self._rounded: dict[str, Tensor] = {}  # what 16 bits could not hold of what is under way
        if self.owes and isinstance(codec, RandomK) and codec.unbiased:
            raise ValueError(
                f"{codec} scales what it keeps so that the mean is right, and with error feedback what it leaves out would grow "
                "without bound: leave error_feedback out"
            )

    def send(self, x: Tensor, key: str) -> Tensor:
        """``x`` and what is owed.

        Raises:
            ValueError: the tensor has another shape than before.
        """
        self._rounded.pop(key, None)
        if not self.error_feedback or key not in self.owed:
            return x
        owed = self.owed[key]
        if owed.shape != x.shape:
            raise ValueError(
                f"{key!r} has the shape {tuple(x.shape)} but is owed {tuple(owed.shape)}: tell the channel of changed places "
                "(EverySync does), or load the state that belongs to this model"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        exact = torch.add(x.to(wide), owed.to(x.device, wide), alpha=self.scale)
        sent = exact.to(x.dtype)
        if sent.dtype != wide:
            self._rounded[key] = exact - sent
        return sent

    def arrived(self, sent: Tensor, delivered: Tensor, key: str) -> None:
        """The rest is owed; where it is not finite, or counted nothing, nobody has taken it, and what was owed before still is."""
        if self.error_feedback and self.scale > 0.0:
            wide = torch.promote_types(sent.dtype, torch.float32)
            rest = sent.to(wide) - delivered.to(wide)
            if key in self._rounded:
                rest += self._rounded.pop(key)
            if all_finite(rest):
                self.owed[key] = rest if self.scale == 1.0 else rest.div_(self.scale)

    def release(self) -> dict[str, Tensor]:
        """What is owed; from now on it is not."""
        owed, self.owed = self.owed, {}
        return owed

    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        """What is owed follows its connections."""
        if key in self.owed:
            owed = self.owed[key]
            self.owed[key] = remap.apply(owed.flatten()).view(shape)
            lost = float(owed.double().sum() - self.owed[key].double().sum())
            self.forgone[key] = self.forgone.get(key, 0.0) + lost

    def state_dict(self) -> dict[str, Any]:
        """What is owed and forgone."""
        return {"owed": dict(self.owed), "forgone": dict(self.forgone)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.owed, self.forgone = dict(state["owed"]), dict(state["forgone"])

    def __repr__(self) -> str:
        """The codec, and whether what it leaves out is kept."""
        return f"Compress({self.codec}, error_feedback={self.error_feedback})"
