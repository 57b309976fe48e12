"""Quantised layers of ONNX graphs, in the pattern that runtimes turn into products of integers.

A layer reads DequantizeLinear(QuantizeLinear(x)), has weights of int8 with a scale a row, and a bias of int32. A runtime has an integer
convolution only where its output is rounded too: to the grid of the layer that reads it, where one does, else to one of its own.
Jacob et al. 2018, arXiv 1712.05877; ONNX Runtime, "Quantize ONNX models", representation QDQ.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from noctule.compress.quantize import Grid, Int8Layer, grid
from noctule.compress.quantize.integer_layer import IntegerLayer
from noctule.core.errors import ExportError
from noctule.deploy.target import Ranges

KEEPING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
"""Operators after which rounding is the same as before them."""


class Layers:
    """The layers that stand as placeholders in a graph.

    Args:
        proto: the graph; changed in place.
        layers: number of a placeholder -> name and layer.
        outputs: ranges of what the layers give.
    """

    def __init__(self, proto: Any, layers: Mapping[int, tuple[str, IntegerLayer]], outputs: Ranges) -> None:
        import onnx

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
                convolutions += [(name, out)] if layer.geometry is not None else []
                notes += [f"{name}: inputs beyond its range are not cut at 7 bits"] if layer.grid.highest < 255 else []
            elif layer.bits < 8:
                notes.append(f"{name}: weights of {layer.bits} bits are stored in 8")
        for name, out in convolutions:
            self._round_output(name, out)
        self._drop_relus()
        del self.graph.node[:]
        self.graph.node.extend(self._in_order())
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
            self.graph.initializer.append(self.from_array(np.ascontiguousarray(value), name))
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
            parts = [self._constant(f"{own}.scale", np.float32(to.scale)), self._constant(f"{own}.zero", np.uint8(to.zero_point))]
            codes, floats = f"{own}/codes", f"{own}/floats"
            self._node("QuantizeLinear", [value, *parts], codes, f"{own}/QuantizeLinear")
            self._node("DequantizeLinear", [codes, *parts], floats, f"{own}/DequantizeLinear")
            self.grids[codes], self.rounded[value, to] = to, floats
        return self.rounded[value, to]

    def _readers(self, value: str) -> list[Any]:
        return [node for node in self.nodes if value in node.input]

    def _reads(self, value: str) -> bool:
        return any(output.name == value for output in self.graph.output)

    def _round_output(self, name: str, value: str) -> None:
        """Have a convolution's output rounded, where its value can only be read rounded."""
        low, high = self.outputs.get(name, (0.0, 0.0))
        while len(readers := self._readers(value)) == 1 and readers[0].op_type in ("Relu", "Clip") and not self._reads(value):
            limits = [self._number(n) for n in readers[0].input[1:]] if readers[0].op_type == "Clip" else [0.0]
            low, high = max(low, limits[0]), max(high, limits[0])
            high = min(high, *limits[1:]) if limits[1:] else high
            value = readers[0].output[0]
        if self._reads(value):
            return  # an output of the model is not rounded
        to = next((self.grids[r.output[0]] for r in readers if r.output[0] in self.grids), None)
        if to is None:
            below = value
            while len(after := self._readers(below)) == 1 and after[0].op_type in KEEPING:
                below = after[0].output[0]
            to = next((self.grids[r.output[0]] for r in after if r.output[0] in self.grids), None)
        if to is None:
            if name not in self.outputs:
                raise ExportError(f"{name} has no range of outputs: no calibration batch went through it")
            to = grid(float(low), float(high))
        floats = self._round(value, to, f"{name or 'model'}.output")
        for reader in self._readers(value):
            if self.grids.get(reader.output[0]) != to:
                for at, given in enumerate(reader.input):
                    reader.input[at] = floats if given == value else given

    def _number(self, name: str) -> float:
        return float(self.to_array(next(entry for entry in self.graph.initializer if entry.name == name)))

    def _drop_relus(self) -> None:
        """Take out a Relu whose result is only read rounded to a grid that starts at 0: the rounding cuts there itself."""
        for node in [node for node in self.nodes if node.op_type == "Relu"]:
            readers = self._readers(node.output[0])
            zero = [r.output[0] in self.grids and self.grids[r.output[0]].zero_point == 0 for r in readers]
            if len(readers) == 1 and all(zero) and not self._reads(node.output[0]):
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
