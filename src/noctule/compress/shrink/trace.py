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

from noctule.compress.shrink import operators
from noctule.compress.shrink.atoms import FIXED, Lines, Value, Weight
from noctule.core.errors import NoctuleError
from noctule.sparse.layers import SparseConv2d, SparseLayer


class Trace:
    """A model's exported graph, run on labels.

    Args:
        model: in any mode; it is exported in evaluation mode, and not changed.
        example: its arguments: a tensor, a tuple of arguments, or a mapping of keyword arguments.

    Raises:
        ValueError: the model cannot be exported; the text says where, and what to do.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.lines = model, Lines()
        self.producers: set[tuple[str, int]] = set()
        """Dimensions of tensors whose lines make features: the rows of weights, the columns of embeddings."""
        self.readers: dict[str, Node] = {}
        """The first node of each product, by the name of its weight."""
        self.reading: dict[str, int] = {}
        """The dimension of each weight that reads features."""
        self.norms: list[tuple[str, Tensor]] = []
        """Modules that normalise features, and the labels of these."""
        self._rules = operators.RULES | {operator.getitem: operators.pick}
        self._values: dict[Node, Value] = {}
        self._names: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._names.setdefault(id(tensor), name)
        self._modules = dict(model.named_modules())
        program = exported(model, example)
        self._tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        signature = program.graph_signature
        self._held: Mapping[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._constants = {*signature.inputs_to_lifted_tensor_constants}
        for node in program.graph.nodes:
            self._values[node] = self._run(node)

    def lines_of(self, weight: Weight, dimension: int) -> Tensor:
        """The lines of a dimension of a weight."""
        if weight.layer is None:
            return self.lines.of(weight.name, dimension, weight.tensor.shape[dimension])
        rows, columns = weight.layer.topology.shape
        if dimension and isinstance(weight.layer, SparseConv2d):
            columns = weight.layer.geometry.weight_shape[1]
        return self.lines.of(weight.name, dimension, columns if dimension else rows)

    def size_of(self, tensor: str, dimension: int) -> int:
        """How many lines a dimension of a tensor has."""
        return self.lines.size(tensor, dimension)

    def reader_of(self, tensor: str) -> tuple[str, str]:
        """The module that reads features through a weight, and the weight's name there; empty where code elsewhere does."""
        if (node := self.readers.get(tensor)) is None:
            return "", ""
        name = operators.module_of(node)
        held = self._modules[name]._parameters.items() if name in self._modules else ()
        return name, next((own for own, parameter in held if parameter is self._tensors[tensor]), "")

    def norm_behind(self, tensor: str) -> nn.Module | None:
        """The batch norm with running statistics that alone reads what the product with this weight gives."""
        node = self.readers[tensor]
        while True:
            users = [user for user in node.users if user.users]
            if len(users) != 1:
                return None
            (node,) = users
            name = getattr(getattr(node.target, "overloadpacket", node.target), "__name__", "")
            if name == "batch_norm":
                module = self._modules.get(operators.module_of(node))
                return module if getattr(module, "running_mean", None) is not None else None
            if name not in ("getitem", "permute", "t", "transpose", "reshape", "view", "to", "contiguous"):
                return None

    def labels(self, value: Value) -> Tensor | None:
        """The labels of a value; those of a parameter that is used as a value are the lines of its last dimension."""
        if not isinstance(value, Weight):
            return value
        if not isinstance(self._tensors.get(value.name), nn.Parameter) or value.layer is not None:
            return None
        shape = value.tensor.shape
        wide = [d for d, size in enumerate(shape) if size > 1] or [len(shape) - 1]
        if not shape:
            return None
        for dimension in wide[:-1]:
            self.lines.fix(self.lines_of(value, dimension), f"{value.name} is no weight of a known layer")
        self.producers.add((value.name, wide[-1]))
        size = [shape[d] if d == wide[-1] else 1 for d in range(len(shape))]
        return self.lines_of(value, wide[-1]).view(size).expand(shape)

    def where(self, node: Node) -> str:
        """The module and the line that a node comes from."""
        module = operators.module_of(node)
        text = str(node.meta.get("stack_trace", "")).strip().splitlines()
        line = next((part.strip() for part in reversed(text) if part.strip().startswith("File")), "")
        return f"{module or 'the model'}{f' ({line})' if line else ''}"

    def _run(self, node: Node) -> Value:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "output":
            for value in _flat(map_arg(node.args, self._value)):
                if (labels := self.labels(value)) is not None:
                    self.lines.tie(labels, torch.tensor(FIXED), "it is an output of the model")
            return None
        if node.op != "call_function":
            return None
        arguments = map_arg(node.args, self._value)
        named = map_arg(dict(node.kwargs), self._value)
        rule = self._rules.get(getattr(node.target, "overloadpacket", node.target))
        if rule is not None:
            return rule(self, node, *arguments, **named)
        given = [x for x in _flat((arguments, named)) if isinstance(x, Tensor | Weight)]
        for labels in map(self.labels, given):
            if labels is not None:
                self.lines.fix(labels, f"{node.target} in {self.where(node)} is an operator that is not known")
        return None

    def _value(self, node: Node) -> Value:
        return self._values[node]

    def _placeholder(self, node: Node) -> Value:
        if (name := self._held.get(node.name)) is None:
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or not value.is_floating_point() or node.name in self._constants:
                return None
            return torch.full(value.shape, FIXED)
        tensor = self._tensors[name]
        module, _, last = name.rpartition(".")
        layer = self._modules.get(module)
        sparse = layer if isinstance(layer, SparseLayer) and last == "values" else None
        return Weight(self._names.get(id(tensor), name), tensor, sparse)


def exported(model: nn.Module, example: Any) -> torch.export.ExportedProgram:
    """The exported program of a model in evaluation mode, whose modes are put back.

    Raises:
        ValueError: it cannot be exported.
    """
    arguments, named = arguments_of(example)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return torch.export.export(model, arguments, named, strict=False)
    except NoctuleError:
        raise
    except Exception as error:  # of any kind: what the model's forward does is not ours
        text = " ".join(str(error).split())
        raise ValueError(
            f"torch.export cannot follow this model with that example: {type(error).__name__}: {text:.400}. Give an example that "
            "its forward takes, rewrite what depends on values, or name who reads whom with paths="
        ) from error
    finally:
        for module, training in modes:
            module.training = training


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
