"""ONNX Runtime, with a file that any runtime of ONNX reads."""

import tempfile
from pathlib import Path
from typing import Any

from noctule.core.errors import ExportError
from noctule.deploy.target import SEVEN_BITS, Job, Run, Target, Written, feed, needed

NEEDS = "pip install 'noctule[onnx]'"
INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")
"""Operators that multiply integers by integers, with scales that were measured before."""


def _write(job: Job) -> Written:
    onnx = needed("onnx", NEEDS)
    needed("onnxscript", NEEDS)
    needed("onnxruntime", NEEDS)
    from noctule.deploy.onnx_program import program_of

    program = program_of(job)
    if program.proto.ByteSize() >= 2**31:
        raise ExportError(
            "the file would have 2 GB or more, which ONNX cannot hold in one: quantise or shrink the model"
        )
    job.path.write_bytes(program.proto.SerializeToString())
    fell_back = list(program.notes)
    if program.quantised:
        fell_back += _not_in_integers(onnx, job.path, program.quantised)

    def inside(inputs: Any) -> dict[str, Any]:
        session = _session(program.with_values(), 1)
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(None, feed(inputs, [i.name for i in session.get_inputs()])), strict=True))
        return {module: found[value] for module, value in program.values.items()}

    return Written(fell_back=fell_back, batches=program.batches, inside=inside)


def _not_in_integers(onnx: Any, path: Path, quantised: dict[str, str]) -> list[str]:
    """Layers whose products ONNX Runtime does not compute in integers, found in the graph that it runs."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        _session(str(path), 1, optimised)
        nodes = onnx.load(str(optimised)).graph.node
    floats = {node.name for node in nodes if node.op_type in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul")}
    found = [f"{layer} is computed in float32" for layer, node in quantised.items() if node in floats]
    integer = sum(node.op_type in INTEGER for node in nodes)
    if integer + len(found) < len(quantised):
        found.append(f"{len(quantised) - integer} of {len(quantised)} quantised layers are not computed in integers")
    return found


def _saturates(model: str | bytes) -> bool:
    """Whether sums of two products could leave 16 bits; files of ours with activations of 7 bits say so at their beginning."""
    if isinstance(model, str):
        with Path(model).open("rb") as file:
            model = file.read(100)
    return SEVEN_BITS.encode() not in model[:100]


def _session(model: str | bytes, threads: int, optimised: Path | None = None) -> Any:
    runtime = needed("onnxruntime", NEEDS)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry(
        "session.qdq_matmulnbits_accuracy_level", "1"
    )  # else activations are rounded in each call
    if _saturates(model):  # on processors without VNNI
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _open(path: Path, threads: int) -> Run:
    session = _session(str(path), threads)
    names = [value.name for value in session.get_inputs()]
    return lambda inputs: session.run(None, feed(inputs, names))[0]


TARGET = Target(
    name="onnxruntime",
    suffix=".onnx",
    precisions=("float32", "int8"),
    module="onnxruntime",
    needs=NEEDS,
    write=_write,
    open=_open,
)
