"""What code written for dense layers finds where it reads the ``weight`` of a layer that has become sparse."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

Product = Callable[[Tensor, Tensor | None], Tensor]
"""(x, bias) -> ``F.linear(x, weight, bias)``."""


class StandIn(Tensor):
    """Shape, dtype and device of the dense weight, and its product with an input, but no numbers.

    Code that asks a weight for its dtype before it calls the layer, or hands it to ``F.linear``, works as before. What draws or
    scales all elements in place, such as most of ``nn.init``, does so to the stored ones, and ``requires_grad`` is theirs. Torch
    takes any tensor with a behaviour of its own out of its fused paths, such as that of ``nn.TransformerEncoderLayer`` in
    evaluation, which read weights past the layer's forward. Code that needs the numbers gets an error that says what to do instead.

    Args:
        values: the stored numbers (N,); of several layers where their weights stand here as one.
            What others have noted on the first is noted here too.
        shape: of the dense weight.
        product: its product with an input, or None where there is none.
    """

    values: tuple[Tensor, ...]
    product: Product | None

    @staticmethod
    def __new__(
        cls, values: Tensor | Sequence[Tensor], shape: tuple[int, ...], product: Product | None = None
    ) -> "StandIn":
        """A tensor without a storage."""
        values = (values,) if isinstance(values, Tensor) else tuple(values)
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            shape,
            dtype=values[0].dtype,
            device=values[0].device,
            requires_grad=any(v.requires_grad for v in values),
        )
        made.__dict__.update(values[0].__dict__, values=values, product=product)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Its product, what concerns the stored numbers, and whatever needs none."""
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, StandIn) and weight.product is not None:
                return weight.product(x, bias)
        if func in _TRAINED:
            trained = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
            for values in args[0].values:
                values.requires_grad_(trained)
        if func in _READING:
            _refuse(getattr(func, "__name__", str(func)), AttributeError if func in _ATTRIBUTES else RuntimeError)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What treats all elements alike, in place, is done to the stored ones; nothing else."""
        me, rest = args[0] if args else None, args[1:]
        if func is torch.ops.aten.detach.default and isinstance(me, StandIn):
            return StandIn([values.detach() for values in me.values], me.shape)
        others = any(isinstance(a, Tensor) and a.dim() for a in rest)
        if others or func._schema.name not in _ALIKE or not isinstance(me, StandIn):
            _refuse(str(func))
        for values in me.values:
            func(values.detach(), *rest, **(kwargs or {}))
        return me

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"StandIn({tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"


_ALIKE = {
    "aten::normal_", "aten::uniform_", "aten::exponential_", "aten::cauchy_", "aten::log_normal_", "aten::zero_", "aten::fill_",
    "aten::mul_", "aten::div_", "aten::add_", "aten::sub_", "aten::clamp_", "aten::clamp_min_", "aten::clamp_max_", "aten::erfinv_",
}  # fmt: skip
"""Operations in place that need to know nothing of an element's place."""
_TRAINED = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
_ATTRIBUTES = {Tensor.grad.__get__, Tensor.grad.__set__, Tensor.data.__set__}  # type: ignore[attr-defined]
_READING = {
    *_ATTRIBUTES, Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr, Tensor.storage,
    Tensor.untyped_storage, Tensor.__deepcopy__, Tensor.__reduce_ex__, Tensor.share_memory_, Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad, Tensor.backward, Tensor.set_,
}  # fmt: skip
"""What reads or keeps numbers without an operation that we would be asked for."""


def _refuse(what: str, error: type[Exception] = RuntimeError) -> NoReturn:
    raise error(
        f"{what} needs the weight of a sparse layer, which holds its non-zeros only: use layer.values (and its grad) and "
        "layer.topology, or layer.to_dense().weight; or leave this layer dense: "
        "convert_(model, rule, where=lambda name, module: ...)"
    )


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias
