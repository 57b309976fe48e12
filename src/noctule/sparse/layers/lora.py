"""LoRA of the `peft` library on sparse layers: adapters that train on a frozen sparse base.

Where noctule and peft are both imported, in any order, each `LoraConfig` knows sparse layers:

>>> from peft import LoraConfig, get_peft_model  # doctest: +SKIP
>>> model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=8))  # doctest: +SKIP
"""

import functools
import warnings
from typing import Any

import torch
from torch import nn

try:
    from peft import LoraConfig  # pyright: ignore[reportMissingImports] it is optional
    from peft.tuners.lora import Linear  # pyright: ignore[reportMissingImports]
    from peft.tuners.tuners_utils import check_adapters_to_merge  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("noctule.sparse.layers.lora needs peft, which is missing: pip install 'peft>=0.21'") from error

from noctule.kernels import IDENTITY
from noctule.sparse.layers.sparse_conv2d import SparseConv2d
from noctule.sparse.layers.sparse_linear import SparseLinear
from noctule.sparse.layers.to_sparse import ToDense


def _know_sparse_layers() -> None:
    """Have ``get_peft_model`` put adapters round `SparseLinear`, by peft's hook for custom modules, which is one of each config."""
    made = LoraConfig.__post_init__
    if hasattr(made, "__wrapped__"):
        return

    @functools.wraps(made)
    def post_init(config: LoraConfig) -> None:
        made(config)
        config._register_custom_module({SparseLinear: LoraSparseLinear, SparseConv2d: _refuse_convolution})  # type: ignore[dict-item]

    LoraConfig.__post_init__ = post_init  # pyright: ignore[reportAttributeAccessIssue]


class LoraSparseLinear(Linear):
    """A `SparseLinear` with low-rank adapters beside it.

    Only the adapters train; the sparse layer stays sparse and is computed as before. A low-rank update fills every place, so that
    ``merge`` and ``merge_and_unload`` put a dense layer of the same function in its place; ``unmerge`` brings back the sparse one.
    """

    def __init__(self, base_layer: SparseLinear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if base_layer.epilogue != IDENTITY:
            raise ValueError(
                "an adapter is added before the activation, which FuseEpilogue has put into this layer: call get_peft_model on "
                "the model first, and leave FuseEpilogue out"
            )
        if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} reads the dense weight, which a sparse layer has not: "
                "use True, 'gaussian' or 'orthogonal'"
            )
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False  # of a dense Conv1D, which this was perhaps
        self._unmerged: list[SparseLinear] = []  # a list, so that it is no child

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Plain LoRA alone: the variants read the dense weight."""
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, SparseLinear)
        return module.in_features, module.out_features

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the layer, which becomes dense by that."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        warnings.warn(
            "a merged adapter fills every place of a sparse layer, so that merged layers are dense: keep the adapters unmerged to "
            "keep the model sparse",
            stacklevel=2,
        )
        base: Any = self.get_base_layer()
        dense = ToDense()(base) if isinstance(base, SparseLinear) else base
        assert dense is not None
        transposed = not isinstance(dense, nn.Linear)
        for name in names:
            update = self.get_delta_weight(name).to(dense.weight.dtype)  # type: ignore[union-attr]
            merged = dense.weight + (update.t() if transposed else update)  # type: ignore[union-attr,operator]
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"the adapter {name} is not finite: nothing of it was merged")
            dense.weight.copy_(merged)  # type: ignore[union-attr,operator]
            if self.lora_bias[name]:
                if dense.bias is None:
                    raise ValueError("an adapter with lora_bias=True cannot be merged into a layer without a bias")
                dense.bias += self.lora_B[name].bias * self.scaling[name]  # type: ignore[operator,union-attr]
            self.merged_adapters.append(name)
        if isinstance(base, SparseLinear):
            self._unmerged, self.base_layer = [base], dense

    def unmerge(self) -> None:
        """Bring back the sparse layer, as it was."""
        if not self.merged:
            warnings.warn("nothing is merged", stacklevel=2)
            return
        (self.base_layer,) = self._unmerged
        self._unmerged = []
        self.merged_adapters.clear()


def _refuse_convolution(target: nn.Module, *_: Any, **__: Any) -> nn.Module:
    raise ValueError(
        f"adapters go round SparseLinear only, and a target is {target}: name other target_modules, or leave this layer "
        "dense: convert_(model, rule, where=lambda name, module: ...)"
    )


_know_sparse_layers()  # last, so that it makes no difference whether peft or this module is imported first
