"""What every process of `noctule.testing.processes` does: run functions by their names, one call after another.

Calls and answers are lines of JSON on a socket; what functions take and return lies in files of `noctule.checkpoint`, so that
nothing is ever unpickled. The end of the socket ends the process, whatever it is doing.
"""

import faulthandler
import importlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from noctule.checkpoint import load, save
from noctule.testing.namespaces import enter

STARTED = -1
"""The number of the call that nobody makes: a worker answers it when it has imported what it needs."""


def form_group(rank: int, workers: int, store: str, timeout_seconds: float) -> None:
    """Make a gloo group, in place of the one that this process may be in.

    Args:
        rank: of this process.
        workers: in the group.
        store: a file where they meet, used for no other group.
        timeout_seconds: after which a collective fails.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers, timeout=timeout)


def find(path: str) -> Callable[..., Any]:
    """The function that ``module:name`` means."""
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def answer(call: dict[str, Any]) -> dict[str, Any]:
    """Run one call, and say how it went."""
    try:
        result = find(call["function"])(call["rank"], call["workers"], *load(call["arguments"]))
        if result is not None:
            save(call["result"], result)
    except Exception as error:  # whatever it is goes to whoever called
        text = "".join(traceback.format_exception(error))
        return {"number": call["number"], "error": type(error).__name__, "message": str(error), "traceback": text}
    return {"number": call["number"], "result": None if result is None else call["result"]}


def become(plan: Path, descriptor: int) -> NoReturn:
    """Make this process the worker of a plan, which serves calls until its socket ends.

    Args:
        plan: a JSON file with `environment`, `folder`, `path` (of modules), `log`, `threads` and `namespace` (or None).
        descriptor: of the socket.
    """
    code = 1
    try:
        asked = json.loads(plan.read_text())
        with open(asked["log"], "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        sys.path[:] = asked["path"]
        if asked["namespace"]:
            enter(asked["namespace"])
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        torch.set_num_threads(asked["threads"])
        serve(socket.socket(fileno=descriptor))
    except SystemExit as ending:  # a function asked for it
        code = ending.code if isinstance(ending.code, int) else ending.code is not None
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(channel: socket.socket) -> NoReturn:
    """Answer calls."""
    calls: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def listen() -> None:
        with channel.makefile() as lines:
            for line in lines:
                calls.put(json.loads(line))
        os._exit(0)  # also out of a collective that would wait for its time-out

    threading.Thread(target=listen, daemon=True).start()
    said: dict[str, Any] = {"number": STARTED}
    while True:
        channel.sendall((json.dumps(said) + "\n").encode())
        said = answer(calls.get())
        sys.stdout.flush()
