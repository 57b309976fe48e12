"""How the lines of a model's weights depend on one another, found by running its exported graph on labels.

Each tensor of the graph becomes a tensor of labels of the same shape, which say for each number the line it belongs to: a neuron, a
channel, a feature of the residual stream. What only moves numbers about (a view, a transposition, a concatenation) is executed on
the labels as it is; what is elementwise ties the labels of its operands; a product ties what it reads to the columns of its weight
and gives what it writes the labels of the rows. So residual sums, concatenations, flattened images, heads and grouped queries need
no rules of their own. In another way than dependency graphs of layers (Fang et al. 2023, "DepGraph", arXiv 2301.12900).
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from noctule.compress.shrink import operators, products
from noctule.compress.shrink.atoms import FIXED, Value, Weight
from noctule.compress.shrink.labels import Trace
from noctule.core.errors import NoctuleError
from noctule.core.evaluating import evaluating
from noctule.sparse.layers import SparseLayer


def traced(model: nn.Module, example: Any) -> Trace:
    """Run a model's exported graph on labels.

    Args:
        model: in any mode; it is exported in evaluation mode, and not changed.
        example: its arguments: a tensor, a tuple of arguments, or a mapping of keyword arguments.

    Raises:
        ValueError: the model cannot be exported; the text says where, and what to do.
    """
    trace, program = Trace(model), exported(model, example)
    run = _Run(trace, program)
    for node in program.graph.nodes:
        run.values[node] = run.node(node)
    return trace


class _Run:
    """The values of a graph's nodes so far."""

    def __init__(self, trace: Trace, program: torch.export.ExportedProgram) -> None:
        self.trace, self.values = trace, dict[Node, Value]()
        self._rules = products.RULES | {operator.getitem: operators.pick}
        signature = program.graph_signature
        self._held: Mapping[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._constants = {*signature.inputs_to_lifted_tensor_constants}
        self._names: dict[int, str] = {}
        for name, tensor in trace.tensors.items():
            self._names.setdefault(id(tensor), name)

    def node(self, node: Node) -> Value:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "output":
            for value in _flat(map_arg(node.args, self._value)):
                if (labels := self.trace.labels(value)) is not None:
                    self.trace.lines.tie(labels, torch.tensor(FIXED), "it is an output of the model")
            return None
        if node.op != "call_function":
            return None
        arguments = map_arg(node.args, self._value)
        named = map_arg(dict(node.kwargs), self._value)
        rule = self._rules.get(getattr(node.target, "overloadpacket", node.target))
        if rule is not None:
            return rule(self.trace, node, *arguments, **named)
        given = [x for x in _flat((arguments, named)) if isinstance(x, Tensor | Weight)]
        for labels in map(self.trace.labels, given):
            if labels is not None:
                self.trace.lines.fix(
                    labels, f"{node.target} in {self.trace.where(node)} is an operator that is not known"
                )
        return None

    def _value(self, node: Node) -> Value:
        return self.values[node]

    def _placeholder(self, node: Node) -> Value:
        if (name := self._held.get(node.name)) is None:
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or not value.is_floating_point() or node.name in self._constants:
                return None
            return torch.full(value.shape, FIXED)
        tensor = self.trace.tensors[name]
        module, _, last = name.rpartition(".")
        layer = dict(self.trace.model.named_modules()).get(module)
        sparse = layer if isinstance(layer, SparseLayer) and last == "values" else None
        return Weight(self._names.get(id(tensor), name), tensor, sparse)


def exported(model: nn.Module, example: Any) -> torch.export.ExportedProgram:
    """The exported program of a model in evaluation mode, whose modes are put back.

    Raises:
        ValueError: it cannot be exported.
    """
    arguments, named = arguments_of(example)
    try:
        with evaluating(model), torch.no_grad():
            return torch.export.export(model, arguments, named, strict=False)
    except NoctuleError:
        raise
    except Exception as error:  # of any kind: what the model's forward does is not ours
        text = " ".join(str(error).split())
        raise ValueError(
            f"torch.export cannot follow this model with that example: {type(error).__name__}: {text:.400}. Give an example that "
            "its forward takes, rewrite what depends on values, or name who reads whom with paths="
        ) from error


def arguments_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as positional and keyword arguments."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple | list) else ((example,), {})


def _flat(values: Any) -> list[Any]:
    if isinstance(values, tuple | list):
        return [x for value in values for x in _flat(value)]
    if isinstance(values, dict):
        return _flat(list(values.values()))
    return [values]
