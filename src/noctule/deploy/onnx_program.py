"""A model as an ONNX graph, in which quantised layers are integers between QuantizeLinear and DequantizeLinear.

Quantised layers leave torch as a placeholder each, so that nothing on the way takes their integers for floats.
"""

import ast
import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from noctule.compress.quantize.integer_layer import IntegerLayer
from noctule.core.errors import ExportError
from noctule.deploy.onnx_int8 import Layers
from noctule.deploy.prepare import dense
from noctule.deploy.quiet import quiet
from noctule.deploy.target import Batches, Job

DOMAIN = "noctule"
SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass
class Program:
    """An ONNX graph, and where the modules of the model are in it."""

    proto: Any
    values: dict[str, str]
    """Name of a module -> of what it gives in the graph."""
    quantised: dict[str, str]
    """Name of a layer in integers -> of its node."""
    notes: list[str]
    batches: Batches = (1, None)

    def with_values(self) -> bytes:
        """The graph with what the modules give as further outputs."""
        onnx: Any = import_module("onnx")
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        there = {output.name for output in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=v) for v in {*self.values.values()} - there)
        return proto.SerializeToString()


def program_of(job: Job) -> Program:
    """The graph of a model.

    Raises:
        ExportError: torch cannot follow the model, or ONNX lacks an operator; the text names the module.
    """
    model, layers = dense(job.model), {}
    for name, module in list(model.named_modules()):
        if isinstance(module, IntegerLayer):
            layers[len(layers)] = name, module
            stand_in = _StandIn(len(layers) - 1, module)
            if not name:
                model = stand_in
            else:
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, stand_in)
    exported, batches = exported_program(model, job.args, job.kwargs)
    notes = note_of(batches)
    try:
        with quiet():
            made = torch.onnx.export(exported, dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(_lacking(exported, error)) from error
    assert made is not None
    proto = made.model_proto
    values, quantised = _names(proto), {}
    if layers:
        quantised, more = Layers(proto, layers, job.outputs).expand()
        notes += more
    return Program(proto, values, quantised, notes, batches)


def exported_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], largest: int | None = None
) -> tuple[torch.export.ExportedProgram, Batches]:
    """The program of a model for batches of any size, or of the example's where it cannot be otherwise.

    Raises:
        ExportError: torch cannot follow the model.
    """
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    size = tensors[0].shape[0] if tensors and tensors[0].dim() else 0

    def own(x: Any) -> Any:  # torch leaves marks on tensors; a size of 1 would be taken for a constant
        if not isinstance(x, Tensor):
            return x
        return torch.cat((x, x)) if size == 1 and x.dim() and len(x) == 1 else x.clone()

    def dynamic(x: Any) -> Any:
        return (
            {0: torch.export.Dim.DYNAMIC(max=largest)} if isinstance(x, Tensor) and x.dim() and len(x) == size else None
        )

    own_args, own_kwargs = tuple(map(own, args)), {k: own(x) for k, x in kwargs.items()}
    shapes = (*map(dynamic, args), *(dynamic(x) for x in kwargs.values()))
    names = [*_positional(model, len(args)), *kwargs]
    with quiet(), torch.no_grad():
        try:
            if largest != 1:
                by_name = dict(zip(names, shapes, strict=True))
                return torch.export.export(model, own_args, own_kwargs, dynamic_shapes=by_name), (1, largest)
        except Exception:  # torch's tracing and the model can raise anything
            pass
        try:
            return torch.export.export(model, args, kwargs), (size, size)
        except Exception as error:  # the same
            raise ExportError(f"torch.export cannot follow the model: {str(error).strip()[:1000]}") from error


def note_of(batches: Batches) -> list[str]:
    """Words for batches of limited size."""
    low, high = batches
    if high is None:
        return []
    return [
        f"the file takes batches of {high} and no others" if low == high else f"the file takes batches of up to {high}"
    ]


def _positional(model: nn.Module, count: int) -> list[str]:
    """Names of the first arguments of forward; a variable one has one name for all of them."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters[: max(count, 1)]):
        raise ExportError("the model's forward takes *args: give it arguments with names")
    return [p.name for p in parameters[:count]]


class _StandIn(nn.Module):
    """A quantised layer as one node of the graph."""

    def __init__(self, number: int, layer: IntegerLayer) -> None:
        super().__init__()
        self.number, self.geometry, self.out = number, layer.geometry, layer.widths[1]
        self.weight = torch.empty(0)  # some models ask for its dtype

    @override
    def forward(self, x: Tensor) -> Tensor:
        shape: tuple[Any, ...] = (*x.shape[:-1], self.out)
        if (g := self.geometry) is not None:
            sizes = zip(x.shape[-2:], g.kernel_size, g.stride, g.padding, g.dilation, strict=True)
            shape = (x.shape[0], self.out, *((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes))
        about: dict[str, Any] = {"number": self.number, "rank": x.dim()}
        return torch.onnx.ops.symbolic(f"{DOMAIN}::Layer", (x,), about, dtype=x.dtype, shape=shape, version=1)


def _names(proto: Any) -> dict[str, str]:
    """Name the nodes by their modules, drop what else the exporter wrote about them, and find what each module gives."""
    values: dict[str, str] = {}
    count: Counter[str] = Counter()
    for node in proto.graph.node:
        about = {entry.key: entry.value for entry in node.metadata_props}
        scopes = [scope for scope in ast.literal_eval(about.get(SCOPES, "[]"))[:-1] if scope]
        own = scopes[-1] if scopes else ""
        for scope in scopes:
            values[scope] = node.output[0]
        count[name := f"{own or 'model'}/{node.op_type}"] += 1
        node.name = name if count[name] == 1 else f"{name}_{count[name]}"
        del node.metadata_props[:]
        node.doc_string = ""
    for entry in (*proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        del entry.metadata_props[:]
    del proto.graph.value_info[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
    return values


def _lacking(exported: torch.export.ExportedProgram, error: BaseException) -> str:
    """What the exporter says, with the module whose operator it could not write."""
    texts, cause = [], error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    whole = "\n".join(texts)
    for node in exported.graph.nodes:
        if f"%{node.name} :" in whole or f"'{node.name}'" in whole:
            stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
            name, kind = [*stack.values()][-1] if stack else ("", "")
            where = f"{name or 'the model'} ({getattr(kind, '__name__', str(kind).rpartition('.')[2])})"
            return f"ONNX has nothing for {node.target}, which {where} uses: put something else in its place, or leave it out"
    return f"torch.onnx.export failed: {texts[-1].strip()[:1000]}"
