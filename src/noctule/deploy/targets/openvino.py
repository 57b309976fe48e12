"""OpenVINO, with two files: the graph (.xml) and the weights (.bin) beside it."""

from pathlib import Path
from typing import Any

from noctule.core.errors import ExportError
from noctule.deploy.target import SEVEN_BITS, Job, Run, Target, Written, feed, needed

NEEDS = "pip install 'noctule[openvino]'"
PRECISION = ["noctule", "precision"]


def _write(job: Job) -> Written:
    openvino = needed("openvino", NEEDS)
    needed("onnx", NEEDS)
    needed("onnxscript", NEEDS)
    _check(openvino.Core(), job.precision)
    from noctule.deploy.onnx_program import program_of

    program = program_of(job)
    model = openvino.Core().read_model(program.proto.SerializeToString())
    model.set_rt_info(job.precision, PRECISION)
    openvino.save_model(model, str(job.path), compress_to_fp16=False)
    notes = list(program.notes)
    if job.precision == "bfloat16":
        notes.append("the file holds float32 numbers, which are rounded when it is loaded")
    if program.quantised and program.proto.producer_version != SEVEN_BITS:
        notes.append(
            "on processors without VNNI, sums of two 8-bit products saturate in OpenVINO: activation_bits=7 avoids it"
        )

    def inside(inputs: Any) -> dict[str, Any]:
        run = _compiled(openvino.Core(), openvino.Core().read_model(program.with_values()), job.precision, 1)
        names = {name: at for at, output in enumerate(run.outputs) for name in output.get_names()}
        given = run(feed(inputs, [value.get_any_name() for value in run.inputs]))
        return {module: given[names[value]] for module, value in program.values.items() if value in names}

    return Written(fell_back=notes, batches=program.batches, inside=inside)


def _check(core: Any, precision: str) -> None:
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bfloat16" and "BF16" not in able:
        raise ExportError(
            "OpenVINO has no bfloat16 on this processor and would run float32 instead: write the file where it has "
            f"(AVX512_BF16 or AMX), or choose another precision. It has {', '.join(able)}"
        )


def _compiled(core: Any, model: Any, precision: str, threads: int) -> Any:
    openvino = needed("openvino", NEEDS)
    rounding = openvino.Type.bf16 if precision == "bfloat16" else openvino.Type.f32  # its own choice varies by machine
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": rounding, "PERFORMANCE_HINT": "LATENCY"}
    return core.compile_model(model, "CPU", options)


def _open(path: Path, threads: int) -> Run:
    openvino = needed("openvino", NEEDS)
    core = openvino.Core()
    model = core.read_model(str(path))
    precision = model.get_rt_info(PRECISION).astype(str) if model.has_rt_info(PRECISION) else "float32"
    _check(core, precision)
    compiled = _compiled(core, model, precision, threads)
    names = [value.get_any_name() for value in compiled.inputs]
    request = compiled.create_infer_request()

    def run(inputs: Any) -> Any:
        return request.infer(feed(inputs, names), share_inputs=True)[0].copy()

    return run


TARGET = Target(
    name="openvino",
    suffix=".xml",
    precisions=("float32", "bfloat16", "int8"),
    module="openvino",
    needs=NEEDS,
    write=_write,
    open=_open,
)
