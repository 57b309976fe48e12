"""The worker process of `noctule.testing.processes`: runs functions by name, one call after another.

Calls and replies are lines of JSON on a socket; arguments and results are files of `noctule.checkpoint`, so that nothing is ever
unpickled. The end of the socket ends the process, whatever it is doing.
"""

import faulthandler
import json
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from noctule.checkpoint import load, save
from noctule.core.fork_server import find
from noctule.testing.namespaces import enter

STARTED = -1
"""Call number of the first reply, which a worker sends without a call once its imports are done."""


def form_group(rank: int, workers: int, store: str, timeout_seconds: float) -> None:
    """Form a gloo group, in place of the current one if there is one.

    Args:
        rank: of this process.
        workers: in the group.
        store: the file of the rendezvous, used for no other group.
        timeout_seconds: of each collective.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers, timeout=timeout)


def run_call(call: dict[str, Any]) -> dict[str, Any]:
    """Run one call and return the reply: the file of the result, or the error."""
    try:
        result = find(call["function"])(call["rank"], call["workers"], *load(call["arguments"]))
        if result is not None:
            save(call["result"], result)
    except Exception as error:  # any error goes to the caller
        text = "".join(traceback.format_exception(error))
        return {"number": call["number"], "error": type(error).__name__, "message": str(error), "traceback": text}
    return {"number": call["number"], "result": None if result is None else call["result"]}


def run_worker(descriptors: list[int], setup: dict[str, Any]) -> NoReturn:
    """Set this process up and serve calls until the socket ends.

    Args:
        descriptors: that of the socket.
        setup: `environment`, `folder`, `path` (of modules), `log`, `threads` and `namespace` (or None).
    """
    with open(setup["log"], "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.clear()
    os.environ.update(setup["environment"])
    os.chdir(setup["folder"])
    sys.path[:] = setup["path"]
    if setup["namespace"]:
        enter(setup["namespace"])
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(setup["threads"])
    serve(socket.socket(fileno=descriptors[0]))


def serve(channel: socket.socket) -> NoReturn:
    """Run the calls that come on a socket, in order, and send a reply to each."""
    calls: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def receive() -> None:
        with channel.makefile() as lines:
            for line in lines:
                calls.put(json.loads(line))
        os._exit(0)  # even in a collective that would wait for its timeout

    threading.Thread(target=receive, daemon=True).start()
    reply: dict[str, Any] = {"number": STARTED}
    while True:
        channel.sendall((json.dumps(reply) + "\n").encode())
        reply = run_call(calls.get())
        sys.stdout.flush()
