"""Whether numbers are finite, and where a NaN or an infinity comes from."""

import torch
from torch import Tensor, nn

from noctule.core.errors import NonFiniteError


def all_finite(x: Tensor) -> bool:
    """Whether no number is inf or NaN: by the sum, which takes a quarter of the time, unless it overflows.

    >>> all_finite(torch.tensor([3e38, 3e38])), all_finite(torch.tensor([torch.inf, -torch.inf]))
    (True, False)
    """
    return x.numel() == 0 or bool(x.sum().isfinite()) or bool(torch.stack(x.aminmax()).isfinite().all())


def check_parameters(model: nn.Module) -> None:
    """Raise NonFiniteError, naming the first, if a parameter is not finite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(
                f"the parameter {name} is no longer finite: lower the learning rate or clip the gradients"
            )


def explain(model: nn.Module, inputs: Tensor, *, step: int) -> NonFiniteError:
    """The error for a loss that is not finite: which input, parameter or layer brought it, found by one more forward pass."""
    bad = (~torch.isfinite(inputs)).nonzero()
    if len(bad):
        return NonFiniteError(
            f"step {step}: the input is NaN or infinite at {tuple(bad[0].tolist())} of the batch: clean the data"
        )
    try:
        check_parameters(model)
    except NonFiniteError as error:
        return NonFiniteError(f"step {step}: {error}")
    first: list[str] = []
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}

    def look(module: nn.Module, args: object, output: object) -> None:
        if not first and isinstance(output, Tensor) and not torch.isfinite(output).all():
            first.append(names[module])

    handles = [module.register_forward_hook(look) for module in model.modules()]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    where = f"the output of layer {first[0]}" if first else "the loss function's value"
    return NonFiniteError(f"step {step}: {where} is NaN or infinite: lower the learning rate, or scale the inputs")
