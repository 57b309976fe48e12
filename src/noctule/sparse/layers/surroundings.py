"""What goes on round a layer's forward: nothing in most training steps, and finding that out must cost next to nothing."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy

transforms_active = torch._C._are_functorch_transforms_active
"""Whether a transform of ``torch.func`` is under way."""
has_storage = torch._C._has_storage
"""Whether a tensor has memory of its own; what a transform wraps has none."""
_tracing_state = torch._C._get_tracing_state


def eager(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor in a step of eager mode, of which only first derivatives in reverse can be asked."""
    return not (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.is_nested
        or transforms_active()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is under way."""
    return transforms_active() or forward_ad._current_level >= 0


def first_order(dy: Tensor) -> bool:
    """Whether a backward pass with this gradient is asked for plain gradients, which nothing will differentiate again."""
    return not (torch.is_grad_enabled() or transformed()) and has_storage(dy)


def written_down(x: Tensor) -> bool:
    """Whether the operations are being written down for a program that knows torch's own only: TorchScript, ONNX, fx."""
    return (
        isinstance(x, Proxy)
        or _tracing_state() is not None
        or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())
    )
