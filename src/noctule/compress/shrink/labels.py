"""What is known of a model's lines: the trace that the rules of operators write, and its reader."""

from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from noctule.compress.shrink.atoms import Lines, Value, Weight
from noctule.sparse.layers import SparseConv2d


class Trace:
    """The lines of a model's tensors and what ties them; `noctule.compress.shrink.trace.traced` makes one.

    Args:
        model: the traced model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.lines = model, Lines()
        self.producers: set[tuple[str, int]] = set()
        """Dimensions of tensors whose lines make features: the rows of weights, the columns of embeddings."""
        self.readers: dict[str, Node] = {}
        """The first node of each product, by the name of its weight."""
        self.reading: dict[str, int] = {}
        """The dimension of each weight that reads features."""
        self.norms: list[tuple[str, Tensor]] = []
        """Modules that normalise features, and the labels of these."""
        self.tensors: dict[str, Any] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers()),
        }
        """Parameters and buffers by all their names."""
        self._modules = dict(model.named_modules())

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
        name = module_of(node)
        held = self._modules[name]._parameters.items() if name in self._modules else ()
        return name, next((own for own, parameter in held if parameter is self.tensors[tensor]), "")

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
                module = self._modules.get(module_of(node))
                return module if getattr(module, "running_mean", None) is not None else None
            if name not in ("getitem", "permute", "t", "transpose", "reshape", "view", "to", "contiguous"):
                return None

    def labels(self, value: Value) -> Tensor | None:
        """The labels of a value; those of a parameter that is used as a value are the lines of its last dimension."""
        if not isinstance(value, Weight):
            return value
        if not isinstance(self.tensors.get(value.name), nn.Parameter) or value.layer is not None:
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
        module = module_of(node)
        text = str(node.meta.get("stack_trace", "")).strip().splitlines()
        line = next((part.strip() for part in reversed(text) if part.strip().startswith("File")), "")
        return f"{module or 'the model'}{f' ({line})' if line else ''}"


def module_of(node: Node) -> str:
    """The name of the module that a node comes from."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""
