"""The rule that lets pooling and batch normalisation take images as sparse convolutions leave them: feature-major.

torch has no such layout and copies the images to row-major, and the next layer copies them back. But to a pooling the samples
are as good as channels: with the two swapped, a feature-major (C, H, W, B) is what torch calls channels-last. And to a
normalisation all samples together are one wide image, (1, C, H, W B).

Shapes: B batch, C channels, H height, W width.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from noctule.core.convert import Leave
from noctule.sparse.layers.surroundings import written_down


@dataclass(frozen=True)
class KeepLayout:
    """`nn.MaxPool2d`, `nn.AvgPool2d` and `nn.BatchNorm2d` work on feature-major images without a copy, and return such.

    Images in other layouts are treated as before; function, parameters and names in ``state_dict`` stay.

    >>> from noctule.core.convert import convert_
    >>> print(convert_(nn.Sequential(nn.Conv2d(1, 8, 3), nn.MaxPool2d(2)), KeepLayout()))
    changed 1: MaxPool2d changed
    """

    def __call__(self, module: nn.Module) -> nn.Module | None:
        """The module itself, now of the kind that looks at strides; None for one of another kind."""
        kind = _KINDS.get(type(module))
        if kind is None:
            return None
        if getattr(module, "return_indices", False):
            raise Leave("it returns indices too")
        module.__class__ = kind
        return module


class _Kept(nn.Module):
    def __prepare_scriptable__(self) -> nn.Module:
        """The module of torch, for ``torch.jit.script``."""
        plain: Any = copy(self)
        plain.__class__ = next(kind for kind, ours in _KINDS.items() if ours is type(self))
        return plain


class _MaxPool2d(_Kept, nn.MaxPool2d):
    def forward(self, input: Tensor) -> Any:
        if not _feature_major(input):
            return super().forward(input)
        images: Any = super().forward(input.transpose(0, 1))
        return images.transpose(0, 1)


class _AvgPool2d(_Kept, nn.AvgPool2d):
    def forward(self, input: Tensor) -> Tensor:
        if not _feature_major(input):
            return super().forward(input)
        return super().forward(input.transpose(0, 1)).transpose(0, 1)


class _BatchNorm2d(_Kept, nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):  # whose dimensions may not be looked at
            known = (self.running_mean, self.running_var, self.weight, self.bias)
            return F.batch_norm(
                input, *known, self.training or self.running_mean is None, self.momentum or 0.0, self.eps
            )
        if not _feature_major(input):
            return super().forward(input)
        batch, channels, high, wide = input.shape
        images = input.permute(1, 2, 3, 0).view(1, channels, high, wide * batch)
        return super().forward(images).view(channels, high, wide, batch).permute(3, 0, 1, 2)


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MaxPool2d: _MaxPool2d,
    nn.AvgPool2d: _AvgPool2d,
    nn.BatchNorm2d: _BatchNorm2d,
}


def _feature_major(x: Tensor) -> bool:
    return not written_down(x) and x.dim() == 4 and x.shape[0] > 1 and x.permute(1, 2, 3, 0).is_contiguous()
