"""``noctule supervised``: a process of a supervisor; not for users."""

import signal
from typing import Any

from noctule.cli.lookup import find
from noctule.cli.signature import from_json
from noctule.train.interrupt import handling


def main(words: list[str]) -> int:
    """Run a worker or the server of the supervisor at the other end of a socket."""
    role, descriptor = words

    def obey(signum: int) -> None:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt

    with handling(obey):  # SIGTERM to all processes of a job comes here too: the supervisor says what to do
        from noctule.cli.start import announce
        from noctule.launch.server import keep_server
        from noctule.launch.worker import work
        from noctule.report import RunFolder
        from noctule.team import team

        def train(plan: dict[str, Any]) -> None:
            run = RunFolder(plan["run"])
            about = run.about()
            recipe = find(about["recipe"])
            kept = from_json(recipe, about["options"])
            with RunFolder.of_worker(run, plan["member"]) as folder:
                if plan["member"] == 0:
                    announce(folder)
                team().trained = bool(folder.summary())  # what is finished is not trained again
                recipe(folder, **kept)

        return keep_server(int(descriptor)) if role == "server" else work(int(descriptor), train)
