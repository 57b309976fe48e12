"""Change the modules of a model by a `Rule`, and say what was changed, what was left, and why.

Convert first, then build the optimizer: a converted layer has new parameters.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import nn

Rule = Callable[[nn.Module], nn.Module | None]
"""A module -> what takes its place, or None if the rule has nothing to say about it."""

Where = Callable[[str, nn.Module], bool]
"""Name and module -> whether the rule may look at it."""


class Leave(Exception):
    """Raised by a rule for a module of its kind that it leaves as it is; the text says why."""


def hooked(module: nn.Module) -> bool:
    """Whether someone listens to this module, who would hear nothing more if it were replaced or folded away."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@runtime_checkable
class Planning(Protocol):
    """A rule that must see all modules before it decides on one, such as one that shares out a budget."""

    def plan(self, modules: Mapping[str, nn.Module]) -> Rule:
        """The rule for just these modules, by name."""
        ...


@dataclass
class Conversion:
    """What `convert_` did."""

    model: nn.Module
    """The converted model; another object than before only if the rule replaced the whole of it."""
    changed: dict[str, str] = field(default_factory=dict)
    """Name -> what it was and is now."""
    left: dict[str, str] = field(default_factory=dict)
    """Name -> why it stayed."""

    def __str__(self) -> str:
        """One line for each module of the rule's kind."""
        lines = [f"changed {name or '(model)'}: {text}" for name, text in self.changed.items()]
        lines += [f"left {name or '(model)'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "nothing changed"


def convert_(model: nn.Module, rule: Rule | Planning, *, where: Where | None = None) -> Conversion:
    """Replace modules, children first, each by what the rule makes of it, in place.

    A module that stands in several places is converted once and stays shared. One whose parameter another module holds too (tied
    weights) is left, so that the tie holds. Warns when nothing was changed.

    >>> from noctule.layers import ToSparse
    >>> model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    >>> print(convert_(model, ToSparse(density=0.2), where=lambda name, module: name == "0"))
    changed 0: Linear -> SparseLinear(100, 50, weights=1000 (20.00%), bias=True)
    """
    allowed = {name: m for name, m in model.named_modules() if where is None or where(name, m)}
    tied = _tied(model)
    decide: Rule = (
        rule.plan({n: m for n, m in allowed.items() if m not in tied}) if isinstance(rule, Planning) else rule
    )
    result = Conversion(model)
    done: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module, name: str) -> nn.Module:
        if module in done:
            return done[module]
        done[module] = module
        for child_name, child in list(module.named_children()):
            new_child = visit(child, f"{name}.{child_name}" if name else child_name)
            if new_child is not child:
                for alias, other in list(module._modules.items()):
                    if other is child:
                        setattr(module, alias, new_child)
        if name in allowed:
            new = _apply(decide, module, name, tied, result)
            done[module] = new
            done.setdefault(new, new)
        return done[module]

    result.model = visit(model, "")
    if not result.changed:
        reasons = "; ".join(f"{name}: {why}" for name, why in result.left.items())
        warnings.warn(
            f"convert_ changed nothing: {reasons or 'no module of the kind that the rule is for'}", stacklevel=2
        )
    return result


def _apply(rule: Rule, module: nn.Module, name: str, tied: dict[nn.Module, str], result: Conversion) -> nn.Module:
    before = type(module).__name__
    try:
        new = rule(module)
        if new is None:
            return module
        held = next((m for m in ([module] if new is module else module.modules()) if m in tied), None)
        if held is not None:
            raise Leave(tied[held])
    except Leave as reason:
        result.left[name] = tied.get(module, str(reason))
        return module
    if new is module:
        result.changed[name] = f"{before} changed"
    else:
        new.train(module.training)
        shown = str(new).splitlines()[0].removesuffix("(")
        result.changed[name] = f"{before} -> {shown}"
    return new


def _tied(model: nn.Module) -> dict[nn.Module, str]:
    """Modules with a parameter that another module holds too -> why they are left."""
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((name, module, parameter_name))
    return {
        module: f"its {parameter_name} is tied to {next(n for n, m, _ in several if m is not module) or '(model)'}"
        for several in holders.values()
        if len({id(m) for _, m, _ in several}) > 1
        for _, module, parameter_name in several
    }
