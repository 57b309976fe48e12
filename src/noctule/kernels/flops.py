"""The sparse products in torch's counters of operations.

A ``FlopCounterMode`` counts operators only, and a product called from a function of autograd is none. Where such a mode is
active, each product calls an operator that does nothing but report how much was multiplied.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

modes = torch._C._len_torch_dispatch_stack
"""How many modes listen to operators now."""


@torch.library.custom_op("noctule::multiply_adds", mutates_args=())
def report(number: int) -> None:
    """Count multiply-adds that a kernel executed."""


@report.register_fake
def _(number: int) -> None:
    pass


@register_flop_formula(torch.ops.noctule.multiply_adds)
def _(number: int, *_: Any, **__: Any) -> int:
    return 2 * number
