"""LiteRT, once TensorFlow Lite, with files for phones and microcontrollers, for batches of the example's size."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from noctule.deploy.target import Job, Run, Target, Written, needed

NEEDS = "pip install litert-torch ai-edge-litert"


def _write(job: Job) -> Written:
    litert = needed("litert_torch", NEEDS)
    from noctule.deploy.onnx_program import note_of
    from noctule.deploy.prepare import dense
    from noctule.deploy.quiet import quiet

    with quiet():
        made = litert.convert(dense(job.model), job.args, sample_kwargs=job.kwargs or None)
        made.export(str(job.path))
    size = next(len(x) for x in (*job.args, *job.kwargs.values()) if hasattr(x, "shape"))
    return Written(fell_back=note_of((size, size)), batches=(size, size))


def _open(path: Path, threads: int) -> Run:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    interpreter: Any = needed("ai_edge_litert.interpreter", NEEDS).Interpreter(
        model_path=str(path), num_threads=threads
    )
    interpreter.allocate_tensors()
    places = interpreter.get_input_details()
    output = interpreter.get_output_details()[0]["index"]

    def run(inputs: Any) -> np.ndarray:
        arrays = (
            [*inputs.values()] if isinstance(inputs, dict) else [*inputs] if isinstance(inputs, tuple) else [inputs]
        )
        for place, x in zip(places, arrays, strict=True):
            interpreter.set_tensor(place["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(output)

    return run


TARGET = Target(
    name="litert",
    suffix=".tflite",
    precisions=("float32",),
    module="ai_edge_litert.interpreter",
    needs=NEEDS,
    write=_write,
    open=_open,
)
