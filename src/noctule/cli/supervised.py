"""The processes of a supervisor, which are forked with what this file imports; no command of users."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from noctule.cli import main as command
from noctule.cli.lookup import find
from noctule.cli.signature import from_json
from noctule.cli.start import announce
from noctule.launch.server import keep_server
from noctule.launch.worker import work
from noctule.report import RunFolder
from noctule.team import team
from noctule.train.interrupt import handling


def start(descriptors: list[int], role: str, name: str) -> int:
    """Run a worker or the server of the supervisor at the other end of a socket, and return the exit status.

    Args:
        descriptors: of the socket, and of the file that output goes to instead of the supervisor's.
        role: ``"worker"`` or ``"server"``.
        name: that ``ps`` and ``top`` show.
    """
    with suppress(OSError):  # where there is no /proc
        Path("/proc/self/comm").write_text(name)
    connection, *log = descriptors
    for descriptor in log:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    return command.guarded(lambda: _run(role, connection))


def _run(role: str, connection: int) -> int:
    def obey(signum: int) -> None:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt

    with handling(obey):  # SIGTERM to all processes of a job comes here too: the supervisor says what to do
        return keep_server(connection) if role == "server" else work(connection, _train)


def _train(plan: dict[str, Any]) -> None:
    run = RunFolder(plan["run"])
    about = run.about()
    recipe = find(about["recipe"])
    kept = from_json(recipe, about["options"])
    with RunFolder.of_worker(run, plan["member"]) as folder:
        if plan["member"] == 0:
            announce(folder)
        team().trained = bool(folder.summary())  # what is finished is not trained again
        recipe(folder, **kept)
