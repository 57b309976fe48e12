"""Forked processes behave as fresh ones, and the server of a process outlives what is sent to it."""

import os
import signal
import socket
import subprocess

import pytest

from noctule.core.fork_server import ForkServer


def reply(descriptors: list[int], what: str) -> int:
    """Run in a forked process: write something to the first descriptor, or end in some way."""
    import numpy as np

    with os.fdopen(descriptors[0], "w") as out:
        if what == "draw":
            out.write(str(np.random.random()))
        if what == "signals":
            out.write(" ".join(str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGHUP)))
        if what == "wait":
            signal.pause()
        if what == "raise":
            raise ValueError("told to")
        if what == "exit":
            raise SystemExit(7)
    return 3


@pytest.fixture(scope="module")
def server():
    server = ForkServer("numpy", "test_fork_server")
    yield server
    server.close()


def said(server: ForkServer, what: str) -> tuple[str, int]:
    ours, theirs = os.pipe()
    process = server.fork("test_fork_server:reply", what, descriptors=[theirs])
    os.close(theirs)
    with os.fdopen(ours) as text:
        return text.read(), process.wait(60)


@pytest.mark.parametrize(("what", "code"), [("nothing", 3), ("exit", 7), ("raise", 1)])
def test_the_status_is_what_the_function_returns_or_raises(server, what, code):
    assert said(server, what) == ("", code)


def test_each_process_draws_its_own_numbers(server):
    assert said(server, "draw")[0] != said(server, "draw")[0]


def test_a_signal_to_the_server_is_no_signal_to_its_processes_and_leaves_their_exit_codes(server):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        server._process.send_signal(number)
    assert said(server, "signals") == (f"{signal.SIG_DFL} {signal.SIG_DFL}", 3)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = server.fork("test_fork_server:reply", "wait", descriptors=[theirs.fileno()])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM


def test_a_server_that_died_starts_anew_and_its_processes_are_dead(server):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = server.fork("test_fork_server:reply", "wait", descriptors=[theirs.fileno()])
        server._process.kill()
        server._process.wait()
        assert said(server, "nothing") == ("", 3)
        assert process.poll() == -signal.SIGKILL
