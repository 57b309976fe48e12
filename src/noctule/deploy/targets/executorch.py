"""ExecuTorch, with the operators that XNNPACK computes; its runtime in Python needs torch, the one in C++ does not."""

from collections import Counter
from pathlib import Path
from typing import Any

from noctule.core.errors import ExportError
from noctule.deploy.target import Job, Run, Target, Written, needed

NEEDS = "pip install executorch"
SMALL = ("getitem", "sym_size", "executorch_call_delegate", "view_copy", "alloc")
"""What costs nothing outside of XNNPACK."""


def _write(job: Job) -> Written:
    exir = needed("executorch.exir", NEEDS)
    xnnpack = needed("executorch.backends.xnnpack.partition.xnnpack_partitioner", NEEDS)
    from noctule.deploy.onnx_program import exported_program, note_of
    from noctule.deploy.prepare import dense
    from noctule.deploy.quiet import quiet

    size = next(len(x) for x in (*job.args, *job.kwargs.values()) if hasattr(x, "shape"))
    program, batches = exported_program(
        dense(job.model), job.args, job.kwargs, largest=size
    )  # memory is planned for it
    notes = note_of(batches)
    with quiet():
        edge = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
    graph = edge.exported_program().graph
    calls = Counter(_name(node.target) for node in graph.nodes if node.op == "call_function")
    outside = {name: n for name, n in calls.items() if not any(small in name for small in SMALL)}
    if not any("executorch_call_delegate" in name for name in calls):
        raise ExportError(
            "XNNPACK takes no part of the model, which would run on reference kernels, some hundred times slower. Operators: "
            + ", ".join(outside)
        )
    if outside:
        notes.append(f"not computed by XNNPACK: {', '.join(f'{name} ({n})' for name, n in outside.items())}")
    with quiet(), job.path.open("wb") as file:
        edge.to_executorch().write_to_file(file)
    return Written(fell_back=notes, batches=batches)


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", target)).removeprefix("aten.").removesuffix(".default")


def _open(path: Path, threads: int) -> Run:
    runtime = needed("executorch.runtime", NEEDS)
    import torch

    torch.set_num_threads(threads)
    method = runtime.Runtime.get().load_program(path).load_method("forward")

    def run(inputs: Any) -> Any:
        arrays = (
            [*inputs.values()] if isinstance(inputs, dict) else [*inputs] if isinstance(inputs, tuple) else [inputs]
        )
        return method.execute([torch.from_numpy(x) for x in arrays])[0].numpy()

    return run


TARGET = Target(
    name="executorch",
    suffix=".pte",
    precisions=("float32",),
    module="executorch.runtime",
    needs=NEEDS,
    write=_write,
    open=_open,
)
