"""The rule that folds bias, activation and dropout into the sparse product before them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from noctule.core.convert import Rule, hooked
from noctule.kernels import IDENTITY, Epilogue
from noctule.sparse.layers.activations import AllReLU
from noctule.sparse.layers.foreign import note_for_hugging_face
from noctule.sparse.layers.sparse_layer import SparseLayer


@dataclass(frozen=True)
class FuseEpilogue:
    """In an `nn.Sequential`, folds ReLU, LeakyReLU or AllReLU, then Dropout, into the sparse layer before them.

    What was folded leaves an `nn.Identity`, so names in ``state_dict`` stay. The dropout mask is drawn by Noctule's counter-based
    generator, not by torch's: same distribution, other numbers. A layer that stands in several places is left: not all of
    them may be followed by the same.
    """

    def plan(self, modules: Mapping[str, nn.Module]) -> Rule:
        """The rule, knowing which layers stand in one place only."""
        uses = Counter(child for module in modules.values() for child in module._modules.values())
        return lambda module: self._fold(module, uses)

    def finish(self, model: nn.Module) -> None:
        """Have the config of a Hugging Face model say what was folded."""
        note_for_hugging_face(model)

    def _fold(self, module: nn.Module, uses: Counter[nn.Module | None]) -> nn.Module | None:
        """The sequence with fewer passes over memory, or None if there is nothing to fold."""
        if type(module) is not nn.Sequential:
            return None
        children, folded = list(module), False
        for at, layer in enumerate(children):
            if not isinstance(layer, SparseLayer) or layer.epilogue != IDENTITY or uses[layer] > 1:
                continue
            slope, dropout, next_at = 1.0, 0.0, at + 1
            if next_at < len(children) and (found := _slope(children[next_at])) is not None:
                slope, next_at = found, next_at + 1
            if next_at < len(children) and type(children[next_at]) is nn.Dropout and not hooked(children[next_at]):
                dropout, next_at = float(getattr(children[next_at], "p")), next_at + 1  # noqa: B009
            if next_at == at + 1 or dropout >= 1.0 or hooked(layer):
                continue
            layer.epilogue = Epilogue(slope, dropout)
            children[at + 1 : next_at] = [nn.Identity() for _ in range(at + 1, next_at)]
            folded = True
        if not folded:
            return None
        for name, child in zip(list(module._modules), children, strict=True):
            module._modules[name] = child
        return module


def _slope(module: nn.Module) -> float | None:
    if hooked(module):
        return None
    if type(module) is nn.ReLU:
        return 0.0
    return module.negative_slope if type(module) in (nn.LeakyReLU, AllReLU) else None  # type: ignore[return-value]
