"""A stage that compresses, with error feedback."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from noctule.codecs import Codec, RandomK
from noctule.core.exchange import Stage
from noctule.core.finite import all_finite
from noctule.core.remap import Remap


class Compress(Stage):
    """A stage that encodes each tensor plus the residual of earlier exchanges (error feedback, Seide et al. 2014; Karimireddy et
    al. 2019, arXiv 1901.09847).

    The residual, which is owed, is what the codec left out. What was delivered plus what is owed is what was given, key by key,
    whatever the path. A connection that is dropped takes its residual with it, and `forgone` says how much that was.

    Args:
        codec: turns tensors into fewer bytes.
        error_feedback: whether to keep what the codec leaves out for the next exchange (default: only if the codec is biased).
    """

    def __init__(self, codec: Codec, *, error_feedback: bool | None = None) -> None:
        self.codec: Codec = codec
        self.owes = self.error_feedback = not codec.unbiased if error_feedback is None else error_feedback
        self.owed: dict[str, Tensor] = {}
        """Key -> the residual, before any weight of a `Weigh` stage; in float32 at least."""
        self.forgone: dict[str, float] = {}
        """Key -> the sum of the residuals of connections that were dropped."""
        self._rounded: dict[str, Tensor] = {}  # what 16 bits could not hold of the tensors being sent
        if self.owes and isinstance(codec, RandomK) and codec.unbiased:
            raise ValueError(
                f"{codec} scales what it keeps so that the mean is right, and with error feedback what it leaves out would grow "
                "without bound: leave error_feedback out"
            )

    @override
    def send(self, x: Tensor, key: str) -> Tensor:
        """``x`` plus its residual.

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

    @override
    def arrived(self, sent: Tensor, delivered: Tensor, key: str) -> None:
        """Keep the rest; if that is not finite, or this worker had no weight, the residual stays as it was."""
        if self.error_feedback and self.scale > 0.0:
            wide = torch.promote_types(sent.dtype, torch.float32)
            rest = sent.to(wide) - delivered.to(wide)
            if key in self._rounded:
                rest += self._rounded.pop(key)
            if all_finite(rest):
                self.owed[key] = rest if self.scale == 1.0 else rest.div_(self.scale)

    @override
    def release(self) -> dict[str, Tensor]:
        owed, self.owed = self.owed, {}
        return owed

    @override
    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        if key in self.owed:
            owed = self.owed[key]
            self.owed[key] = remap.apply(owed.flatten()).view(shape)
            lost = float(owed.double().sum() - self.owed[key].double().sum())
            self.forgone[key] = self.forgone.get(key, 0.0) + lost

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"owed": dict(self.owed), "forgone": dict(self.forgone)}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.owed, self.forgone = dict(state["owed"]), dict(state["forgone"])

    @override
    def __repr__(self) -> str:
        return f"Compress({self.codec}, error_feedback={self.error_feedback})"
