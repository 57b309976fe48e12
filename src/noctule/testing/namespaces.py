"""Linux network namespaces: made with iproute2, found again by name, removed with the processes in them."""

import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

PREFIX = "noctule-"
"""Prefix of the names of our namespaces, before the pid of the process that made them."""
_CLONE_NEWNET = 0x40000000


@functools.cache
def available() -> str | None:
    """The reason why no network can be made here, or None; the answer of one trial is kept."""
    if not sys.platform.startswith("linux"):
        return f"network namespaces are a thing of Linux, this is {sys.platform}"
    if os.geteuid():
        return "network namespaces need root"
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun (modprobe tun)"
    name = f"{PREFIX}{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        ip("-n", name, "tuntap", "add", "mode", "tun", "name", "try0")
        tc(*f"-n {name} qdisc replace dev try0 root tbf rate 1mbit burst 32kb latency 1s".split())
    except FileNotFoundError as error:
        return f"there is no {error.filename} command on the PATH (apt-get install iproute2)"
    except RuntimeError as error:
        return str(error)
    finally:
        remove([name])
    return None


def enter(namespace: str) -> None:
    """Move this thread into a namespace; sockets and processes that it makes from then on are there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}", "rb") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")


def remove(namespaces: Sequence[str]) -> None:
    """Remove namespaces, if they exist, and kill the processes in them."""
    for namespace in namespaces:
        with suppress(RuntimeError, FileNotFoundError):  # not made yet, or already gone
            for process in ip("netns", "pids", namespace).split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            ip("netns", "del", namespace)


def remove_leftovers() -> list[str]:
    """Remove the namespaces of killed runs, with the processes in them, and return their names."""
    folder = Path("/run/netns")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [n for n in names if (match := re.fullmatch(rf"{PREFIX}(\d+)-.*", n)) and not _is_running(int(match[1]))]
    remove(found)
    return found


def ip(*arguments: str, lines: Sequence[str] = ()) -> str:
    """Run `ip`, with lines for its `-batch -`, and return its output; RuntimeError where it fails."""
    return _output("ip", *arguments, lines=lines)


def tc(*arguments: str) -> str:
    """Run `tc` and return its output; RuntimeError where it fails."""
    return _output("tc", *arguments)


def _output(*command: str, lines: Sequence[str] = ()) -> str:
    done = subprocess.run(command, input="\n".join([*lines, ""]), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
