"""A model of torch as the steps of `noctule.runtime`.

The model is exported by `torch.export` with layers as single operators (`leaves.py`), and each operator of the graph becomes a
step. A value remembers which of its axes the batch is: the runtime keeps the batch innermost, so what moves it costs nothing. What
depends on parameters alone is computed here and becomes a constant.
"""

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from noctule.compress.quantize.fold import fold_batch_norms
from noctule.core.errors import ExportError
from noctule.core.evaluating import evaluating
from noctule.deploy import rules
from noctule.deploy.leaves import with_leaves
from noctule.deploy.passes import simplified
from noctule.deploy.steps import Ref, Steps
from noctule.runtime.graph import Graph
from noctule.runtime.values import Value


def graph_of(model: nn.Module, example: Tensor, facts: dict[str, Any] | None = None) -> Graph:
    """The steps that a model takes in evaluation.

    Args:
        model: it is not changed; quantise it before (`StaticInt8`) for a graph of integers.
        example: inputs (B, ...), floats or tokens.
        facts: plain JSON that goes with the model.

    Raises:
        ExportError: the model cannot be exported, or a module of it does what `noctule.runtime` cannot; the text names it.
    """
    if not isinstance(example, Tensor) or example.dim() < 1 or not len(example):
        raise ExportError("noctule.runtime runs models of one input: give a tensor (B, ...) as the example")
    with evaluating(model):
        model = copy.deepcopy(model)
    model.eval()
    fold_batch_norms(model)
    try:
        layers = with_leaves(model)
        batch = torch.cat([example] * 3)[: max(3, len(example))]
        with torch.no_grad():
            dynamic = ({0: torch.export.Dim.AUTO},)
            program = torch.export.export(layers.pop(""), (batch,), strict=False, dynamic_shapes=dynamic)
    except Exception as error:  # of any kind: what the model's forward does is not ours
        text = " ".join(str(error).split())
        raise ExportError(f"torch.export cannot follow this model: {type(error).__name__}: {text:.500}") from error
    steps = Steps(layers, Value(tuple(example.shape[1:]), "float32" if example.is_floating_point() else "tokens"))
    run = _Run(steps, program)
    for node in program.graph.nodes:
        run.values[node] = run.node(node)
    return simplified(Graph(steps.input, steps.steps, facts or {}), run.output)


class _Run:
    """The values of an exported graph's nodes so far."""

    def __init__(self, steps: Steps, program: torch.export.ExportedProgram) -> None:
        self.steps, self.values, self.output = steps, dict[Node, Any](), 0
        signature = program.graph_signature
        held = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        state = {**program.constants, **dict(program.named_parameters()), **dict(program.named_buffers())}
        self._held = {name: state[target].detach() for name, target in held.items()}

    def node(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self._held[node.name] if node.name in self._held else Ref(0, 0)
        if node.op == "output":
            given: Any = node.args[0]
            results = [self.values[x] for x in given if isinstance(x, Node)]
            if len(results) != 1 or not isinstance(results[0], Ref) or results[0].batch != 0:
                raise ExportError("noctule.runtime runs models with one output, a tensor with the batch first")
            if (number := results[0].number) == 0:
                raise ExportError("the model returns its input: there is nothing to ship")
            self.output = number
            return None
        arguments: Any = map_arg(node.args, self.values.__getitem__)
        named: Any = map_arg(dict(node.kwargs), self.values.__getitem__)
        self.steps.name, self.steps.node = where(node), node
        if node.target is operator.getitem:
            return arguments[0][arguments[1]]
        target = getattr(node.target, "overloadpacket", node.target)
        refs = [x for x in _flat((arguments, named)) if isinstance(x, Ref)]
        if not refs and not any(isinstance(x, torch.SymInt) for x in _flat((arguments, named))):
            with torch.no_grad():
                function: Any = node.target
                return function(*arguments, **named)
        rule: Callable[..., Any] | None = rules.RULES.get(target)
        try:
            if rule is None:
                raise ValueError(f"there is no {target} in noctule.runtime")
            return rule(self.steps, *arguments, **named)
        except (ValueError, TypeError) as error:
            raise ExportError(
                f"{self.steps.name or 'the model'} cannot be shipped to noctule.runtime: {error}"
            ) from error


def where(node: Node) -> str:
    """The name of the module that a node comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values()][-1] if stack else ""


def _flat(values: Any) -> list[Any]:
    if isinstance(values, tuple | list):
        return [x for value in values for x in _flat(value)]
    return _flat([*values.values()]) if isinstance(values, dict) else [values]
