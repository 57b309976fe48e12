"""Change the modules of a model by a `Rule`, and report what was changed, what was left, and why.

Convert first, then build the optimizer: a converted layer has new parameters.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, runtime_checkable

from torch import nn
from torch.nn.parameter import is_lazy

Rule = Callable[[nn.Module], nn.Module | None]
"""A module -> what takes its place, or None if it is not of the rule's kind."""

Where = Callable[[str, nn.Module], bool]
"""Name and module -> whether the rule may look at it."""


class Leave(Exception):
    """Raised by a rule for a module of its kind that it leaves as it is; the text says why."""


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, which would be lost if it were replaced or folded away."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@runtime_checkable
class Planning(Protocol):
    """A rule that must see all modules before it decides on one, such as one that shares out a budget."""

    def plan(self, modules: Mapping[str, nn.Module]) -> Rule:
        """The rule for just these modules, by name."""
        ...


@runtime_checkable
class Explaining(Protocol):
    """A rule that explains why large parameters stay which no layer of its kind holds."""

    def why_dense(self, module: nn.Module) -> str | None:
        """Why the parameters that this module holds itself stay, or None where that is not worth a word."""
        ...


@runtime_checkable
class Finishing(Protocol):
    """A rule with a last step on the whole model, when all modules are replaced."""

    def finish(self, model: nn.Module) -> None:
        """Note what must be known of the converted model, such as in its config."""
        ...


SHOWN = 20
"""Modules that stayed, in what is printed of a conversion."""


@dataclass(repr=False)
class Conversion:
    """What `convert_` did."""

    model: nn.Module
    """The converted model; another object than before only if the rule replaced the whole of it."""
    changed: dict[str, str] = field(default_factory=dict)
    """Name -> what it was and is now."""
    left: dict[str, str] = field(default_factory=dict)
    """Name -> why it stayed, and its share of the numbers that the model holds now; the largest first.

    Each module of the rule's kind, and with `ToSparse` whatever else is large: less than 1 % of the model stays dense unnamed,
    norms and biases apart.
    """

    def __str__(self) -> str:
        """One line for each module that was changed, and for the largest that stayed."""
        lines = [f"changed {name or '(model)'}: {text}" for name, text in self.changed.items()]
        lines += [f"left {name or '(model)'}: {why}" for name, why in islice(self.left.items(), SHOWN)]
        if len(self.left) > SHOWN:
            lines.append(f"left {len(self.left) - SHOWN} more, which are smaller: see .left")
        return "\n".join(lines) or "nothing changed"

    __repr__ = __str__


def convert_(model: nn.Module, rule: Rule | Planning, *, where: Where | None = None) -> Conversion:
    """Replace modules, children first, each by what the rule makes of it, in place.

    A module that stands in several places is converted once and stays shared. One whose parameter another module holds too (tied
    weights) is left, so that the tie holds. Warns when nothing was changed. What stays and is large is named with the reason.

    >>> from noctule.sparse.layers import ToSparse
    >>> model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    >>> print(convert_(model, ToSparse(density=0.2), where=lambda name, module: name == "0"))
    changed 0: Linear -> SparseLinear(100, 50, weights=1000 (20.00%), bias=True)
    left 2: where= leaves it out (510 numbers, 32.7% of the model)
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
    if isinstance(rule, Explaining):
        _name_what_stays(result, rule, allowed, tied)
    if isinstance(rule, Finishing):
        rule.finish(result.model)
    if not result.changed:
        reasons = "; ".join(f"{name or '(model)'}: {why}" for name, why in islice(result.left.items(), SHOWN))
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


def _name_what_stays(
    result: Conversion, rule: Explaining, allowed: Mapping[str, nn.Module], tied: Mapping[nn.Module, str]
) -> None:
    """Add to each module that was left its share of the model, and name what else is large."""
    total = sum(map(_size, result.model.parameters()))
    sizes, reasons, large = Counter[str](), dict[str, str](), set[str]()
    counted: set[nn.Parameter] = set()
    whole = result.left.keys() - {above for name in result.changed for above in _upwards(name)}
    for path, module in result.model.named_modules():
        own = {p for p in module._parameters.values() if p is not None} - counted
        name = next((above for above in _upwards(path) if above in whole), path)
        if not own or (why := result.left.get(name) or rule.why_dense(module)) is None:
            continue
        counted |= own
        sizes[name] += sum(map(_size, own))
        if name not in result.left:
            why = why if name in allowed else "where= leaves it out"
            reasons[name] = f"{why}; {tied[module]}" if module in tied else why
        if any(_size(p) > total / 100 or (_size(p) and sum(n > 1 for n in p.shape) > 1) for p in own):
            large.add(name)
    unnamed, last = sum(sizes[name] for name in large - result.left.keys()), 0
    for name, size in sizes.most_common():
        if name in large and name not in result.left and (unnamed * 100 >= total or size == last):
            result.left[name] = reasons[name]
            unnamed, last = unnamed - size, size
        if name in result.left and size:
            result.left[name] += f" ({size:,} numbers, {size / total:.1%} of the model)"
    result.left = dict(sorted(result.left.items(), key=lambda entry: -sizes[entry[0]]))


def _size(parameter: nn.Parameter) -> int:
    return 0 if is_lazy(parameter) else parameter.numel()


def _upwards(name: str) -> Iterator[str]:
    """The name of a module and of all that it stands in."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _tied(model: nn.Module) -> dict[nn.Module, str]:
    """Modules with a parameter that another module holds too -> why they are left."""
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((name, module, parameter_name))
    return {
        module: f"its {parameter_name} is tied to {next(n for n, m, _ in several if m is not module) or '(model)'}"
        for several in [*holders.values(), *_ties_to_come(model)]
        if len({id(m) for _, m, _ in several}) > 1
        for _, module, parameter_name in several
    }


def _ties_to_come(model: nn.Module) -> list[list[tuple[str, nn.Module, str]]]:
    """The ties that a Hugging Face model on meta makes only once it is loaded."""
    modules, ties = dict(model.named_modules()), []
    for names in getattr(model, "all_tied_weights_keys", {}).items():
        ends = [
            (path, modules[path], end) for path, _, end in (name.rpartition(".") for name in names) if path in modules
        ]
        if len(ends) == 2 and all(getattr(getattr(module, end, None), "is_meta", False) for _, module, end in ends):
            ties.append(ends)
    return ties
