"""Copies of a sparse layer that are written to from it, such as averages of weights: noticed where its places have moved away.

`copy.deepcopy` of a model is how averages (`torch.optim.swa_utils.AveragedModel`), teachers and target networks begin, which
are then updated number by number. As soon as the connections of the model move, that would pair numbers of different places.
A copy that is only kept, is trained by itself or comes from a state dict is none of this, and one that follows is right.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor

SAMPLE = 256
"""Numbers of a copy that are compared to see whether it was written to."""


@dataclass(frozen=True)
class Written:
    """Whether a tensor has been written to since: by its version, and by a sample of its numbers where `.data` hides that."""

    version: int
    sample: Tensor

    @classmethod
    def since(cls, x: Tensor) -> "Written":
        """Begin to look."""
        return cls(x._version, _sample(x).clone())

    def __call__(self, x: Tensor) -> bool:
        """Whether it was."""
        return x._version != self.version or not torch.equal(_sample(x), self.sample)


class Kinship:
    """What a sparse layer knows of its copies and of the layer that it is a copy of."""

    def __init__(self) -> None:
        self.copies: WeakSet[Any] = WeakSet()
        self.origin: ref[Any] | None = None
        self.written: Written | None = None
        """In a copy whose origin has other places by now."""

    def copied(self, layer: Any, copy: Any) -> None:
        """A copy of a layer was made."""
        self.copies.add(copy)
        copy.kinship.origin = ref(layer)
        if not copy.values.is_meta and copy.values.requires_grad:
            own = ref(copy)
            copy.values.register_post_accumulate_grad_hook(lambda _: _leave(own()))

    def leave(self) -> None:
        """This copy lives its own life: it is trained, moved or follows by itself."""
        origin = self.origin and self.origin()
        if origin is not None:
            for copy in [copy for copy in origin.kinship.copies if copy.kinship is self]:
                origin.kinship.copies.discard(copy)
        self.origin = self.written = None

    def loaded(self, layer: Any) -> None:
        """This copy got numbers of its own places."""
        origin = self.origin and self.origin()
        self.written = None
        if origin is not None and origin.topology != layer.topology and not layer.values.is_meta:
            self.written, layer.unverified = Written.since(layer.values.detach()), True

    def moved(self, layer: Any) -> bool:
        """The layer's places changed; whether there are copies that do not have these."""
        for copy in self.copies:
            if copy.topology == layer.topology:
                copy.kinship.written = None
            elif copy.kinship.written is None and not copy.values.is_meta:
                copy.kinship.written = Written.since(copy.values.detach())
                copy.unverified = True
        return any(copy.kinship.written is not None for copy in self.copies)

    def check(self, layer: Any) -> bool:
        """Raise RuntimeError where a copy mixes numbers of different places; else whether one could still come to."""
        near = [copy for copy in (layer, *self.copies) if copy.kinship.written is not None]
        if any(copy.kinship.written(copy.values.detach()) for copy in near):
            raise RuntimeError(
                f"a copy of a {type(layer).__name__} was written to after the layer's connections had moved: its numbers belong "
                "to the places of before, so an average (AveragedModel, EMA, a target network) would mix different places. "
                "Attach ExponentialAverage(decay), whose model follows, or call noctule.follow(copy, model) before connections "
                "move. A copy that is to be on its own gets its numbers by load_state_dict, or is made anew by copy.deepcopy"
            )
        return bool(near)


def _leave(copy: Any) -> None:
    if copy is not None:
        copy.kinship.leave()


def _sample(x: Tensor) -> Tensor:
    flat = x.flatten()
    return flat[:: max(1, flat.numel() // SAMPLE)]
