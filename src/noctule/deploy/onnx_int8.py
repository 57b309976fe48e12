"""Quantised layers of ONNX graphs, in the pattern that runtimes turn into products of integers.

A layer reads DequantizeLinear(QuantizeLinear(x)), has weights of int8 with a scale a row, and a bias of int32. A runtime has an
integer convolution only where its output is rounded too: to the grid of the layer that reads it, where one does, else to its own.
Jacob et al. 2018, arXiv 1712.05877; ONNX Runtime, "Quantize ONNX models", representation QDQ.
"""

from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np

from noctule.compress.quantize import Grid, Int8Layer, grid
from noctule.compress.quantize.integer_layer import IntegerLayer
from noctule.core.errors import ExportError
from noctule.deploy.target import SEVEN_BITS, Ranges

KEEPING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
"""Operators after which rounding is the same as before them."""
LIMITING = ("Relu", "Clip")


class Layers:
    """The layers that stand as placeholders in a graph.

    Args:
        proto: the graph; changed in place.
        layers: number of a placeholder -> name and layer.
        outputs: ranges of what the layers give.
    """

    def __init__(self, proto: Any, layers: Mapping[int, tuple[str, IntegerLayer]], outputs: Ranges) -> None:
        onnx: Any = import_module("onnx")
        self.helper, self.from_array = onnx.helper, onnx.numpy_helper.from_array
        self.to_array = onnx.numpy_helper.to_array
        self.proto, self.graph, self.layers, self.outputs = proto, proto.graph, layers, outputs
        self.nodes: list[Any] = []
        self.grids: dict[str, Grid] = {}
        """Output of a QuantizeLinear -> what it rounds to."""
        self.rounded: dict[tuple[str, Grid], str] = {}
        self.calls: Counter[str] = Counter()

    def expand(self) -> tuple[dict[str, str], list[str]]:
        """Put the layers in: the node of each that is in integers, by its name, and what to know."""
        quantised: dict[str, str] = {}
        notes: list[str] = []
        convolutions: list[tuple[str, str]] = []
        for node in self.graph.node:
            if node.op_type != "Layer":
                self.nodes.append(node)
                continue
            about = {entry.name: entry.i for entry in node.attribute}
            name, layer = self.layers[about["number"]]
            out = self._layer(name, layer, node.input[0], node.output[0], about["rank"])
            if isinstance(layer, Int8Layer):
                quantised[name] = f"{name}/{self._kind(layer, about['rank'])}"
                convolutions += [(name, out)] if layer.geometry is not None and layer.slope in (0.0, 1.0) else []
            elif layer.bits < 8:
                notes.append(f"{name}: weights of {layer.bits} bits are stored in 8")
        for name, out in convolutions:
            self._round_output(name, out)
        for node in [node for node in self.nodes if node.op_type == "Add"]:
            value, _, _ = self._behind(node.output[0])
            to = self._read_as(value) if {*node.input} <= {*self.rounded.values()} else None
            if to is not None:
                self._all_read(value, self._round(value, to, node.name))
        self._drop_limits()
        del self.graph.node[:]
        self.graph.node.extend(self._in_order())
        if quantised and all(to.highest < 255 for to in self.grids.values()):
            self.proto.producer_name, self.proto.producer_version = "noctule", SEVEN_BITS
        for domain in [entry for entry in self.proto.opset_import if entry.domain == "noctule"]:
            self.proto.opset_import.remove(domain)
        return quantised, notes

    def _kind(self, layer: IntegerLayer, rank: int) -> str:
        return "Conv" if layer.geometry is not None else "Gemm" if rank == 2 else "MatMul"

    def _node(self, kind: str, inputs: list[str], output: str, name: str, **attributes: Any) -> str:
        self.nodes.append(self.helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def _constant(self, name: str, value: Any) -> str:
        if all(there.name != name for there in self.graph.initializer):
            self.graph.initializer.append(self.from_array(np.array(value, order="C"), name))
        return name

    def _layer(self, name: str, layer: IntegerLayer, x: str, y: str, rank: int) -> str:
        kind, g = self._kind(layer, rank), layer.geometry
        if g is not None and rank != 4:
            raise ExportError(f"{name} gets one image without a batch: call the model with a batch of images")
        name = name or "model"
        self.calls[name] += 1
        here = name if self.calls[name] == 1 else f"{name}_{self.calls[name]}"
        codes = layer._with_zeros(layer.integers()).numpy()
        axis = 0 if g is not None else 1
        codes = codes if g is not None else codes.T
        scales = layer.scales.double().numpy()
        weight = self._dequantized(f"{name}.weight", codes, scales.astype(np.float32), axis)
        bias = None if layer.bias is None else layer.bias.double().numpy()
        inputs = [x, weight]
        if isinstance(layer, Int8Layer):
            inputs[0] = self._round(x, layer.grid, name)
            if bias is not None and kind != "MatMul":
                steps = np.maximum(scales * layer.grid.scale, np.finfo(np.float32).smallest_normal).astype(np.float32)
                whole = np.rint(bias / steps)
                if np.abs(whole).max(initial=0.0) >= 2**31:
                    raise ExportError(f"{name}: a bias is too large for its int32: leave the layer in floating point")
                inputs.append(self._dequantized(f"{name}.bias", whole.astype(np.int32), steps, 0))
        elif bias is not None and kind != "MatMul":
            inputs.append(self._constant(f"{name}.bias", bias.astype(np.float32)))
        out = y if layer.slope == 1.0 else f"{here}/sum"
        if kind == "Conv":
            assert g is not None
            (top, below), (left, right) = g.padding
            self._node(
                "Conv", inputs, out, f"{here}/Conv", kernel_shape=list(g.kernel_size), strides=list(g.stride),
                pads=[top, left, below, right], dilations=list(g.dilation), group=g.groups,
            )  # fmt: skip
        elif kind == "Gemm" or bias is None:
            self._node(kind, inputs, out, f"{here}/{kind}")
        else:
            product = self._node("MatMul", inputs, f"{here}/product", f"{here}/MatMul")
            self._node("Add", [product, self._constant(f"{name}.bias", bias.astype(np.float32))], out, f"{here}/Add")
        if layer.slope != 1.0:
            more = {} if layer.slope == 0.0 else {"alpha": layer.slope}
            self._node("LeakyRelu" if more else "Relu", [out], y, f"{here}/activation", **more)
        return out

    def _dequantized(self, name: str, codes: Any, scales: Any, axis: int) -> str:
        if any(node.output[0] == f"{name}/floats" for node in self.nodes):
            return f"{name}/floats"  # the layer is called twice
        parts = [self._constant(name, codes), self._constant(f"{name}.scales", scales)]
        parts.append(self._constant(f"{name}.zeros", np.zeros(scales.shape, codes.dtype)))
        return self._node("DequantizeLinear", parts, f"{name}/floats", f"{name}/DequantizeLinear", axis=axis)

    def _round(self, value: str, to: Grid, name: str) -> str:
        """Round a value to a grid, once for all that read it so."""
        if (value, to) not in self.rounded:
            own = f"{name}.grid{len(self.rounded)}"
            parts = [
                self._constant(f"{own}.scale", np.float32(to.scale)),
                self._constant(f"{own}.zero", np.uint8(to.zero_point)),
            ]
            codes, floats = f"{own}/codes", f"{own}/floats"
            self._node("QuantizeLinear", [value, *parts], codes, f"{own}/QuantizeLinear")
            self._node("DequantizeLinear", [codes, *parts], floats, f"{own}/DequantizeLinear")
            self.grids[codes], self.rounded[value, to] = to, floats
        return self.rounded[value, to]

    def _readers(self, value: str) -> list[Any]:
        return [node for node in self.nodes if value in node.input]

    def _behind(self, value: str, low: float = 0.0, high: float = 0.0) -> tuple[str, float, float]:
        """What a Relu or Clip that alone reads a value makes of it, and of its range."""
        while (
            len(readers := self._readers(value)) == 1 and readers[0].op_type in LIMITING and not self._is_output(value)
        ):
            below, above = self._limits(readers[0])
            low, high, value = min(max(low, below), above), min(max(high, below), above), readers[0].output[0]
        return value, low, high

    def _read_as(self, value: str) -> Grid | None:
        """The grid that a reader rounds a value to; an output of the model is read as it is."""
        if self._is_output(value):
            return None
        return next((self.grids[r.output[0]] for r in self._readers(value) if r.output[0] in self.grids), None)

    def _all_read(self, value: str, rounded: str) -> None:
        """Have all that read a value read it rounded, but for the rounding itself."""
        rounding = next(node.input[0] for node in self.nodes if node.output[0] == rounded)
        for reader in self._readers(value):
            if reader.output[0] != rounding:
                for at, given in enumerate(reader.input):
                    reader.input[at] = rounded if given == value else given

    def _round_output(self, name: str, value: str) -> None:
        """Have a convolution's output rounded before anything but a Relu or Clip reads it."""
        layer = next(layer for own, layer in self.layers.values() if own == name)
        assert isinstance(layer, Int8Layer)
        value, low, high = self._behind(value, *self.outputs[name])
        to, below = self._read_as(value), value
        while to is None and len(after := self._readers(below)) == 1 and after[0].op_type in KEEPING:
            below = after[0].output[0]
            to = self._read_as(below)
        if not self._is_output(value):
            to = to or grid(low, high, bits=layer.grid.highest.bit_length())
            self._all_read(value, self._round(value, to, f"{name or 'model'}.output"))

    def _is_output(self, value: str) -> bool:
        return any(output.name == value for output in self.graph.output)

    def _limits(self, node: Any) -> tuple[float, float]:
        given = [*node.input[1:], "", ""] if node.op_type == "Clip" else []
        below, above = (self._number(n) if n else None for n in given[:2]) if given else (0.0, None)
        return -float("inf") if below is None else below, float("inf") if above is None else above

    def _number(self, name: str) -> float:
        return float(self.to_array(next(entry for entry in self.graph.initializer if entry.name == name)))

    def _drop_limits(self) -> None:
        """Take out a Relu or Clip whose result is only read rounded to a grid within its limits: the rounding cuts there itself."""
        for node in [node for node in self.nodes if node.op_type in LIMITING]:
            readers, to = self._readers(node.output[0]), self._read_as(node.output[0])
            if len(readers) != 1 or to is None:
                continue
            below, above = self._limits(node)
            ends = -to.scale * to.zero_point, to.scale * (255 - to.zero_point)
            if below <= ends[0] and ends[1] <= above * (1 + 1e-6):
                readers[0].input[0] = node.input[0]
                self.nodes = [other for other in self.nodes if other is not node]

    def _in_order(self) -> list[Any]:
        """The nodes, each after those whose results it reads."""
        made = {entry.name for entry in (*self.graph.initializer, *self.graph.input)} | {""}
        waiting, ordered = list(self.nodes), []
        while waiting:
            ready = [node for node in waiting if made.issuperset(node.input)]
            if not ready:
                raise ExportError(f"the graph has a cycle at {waiting[0].name}")
            ordered += ready
            made |= {output for node in ready for output in node.output}
            waiting = [node for node in waiting if all(node is not other for other in ready)]
        return ordered
