"""Workers that torchrun starts: one group, which torchrun restarts from the checkpoints when a worker is lost.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 -m noctule.cli run sparse_mlp --out runs/together

Restarts need torchrun's c10d rendezvous (``--standalone``, or ``--rdzv-backend c10d`` on several machines), and with torch 2.13
``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` in its environment.
"""

import os
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

_POLL_SECONDS = 0.5
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def under_torchrun() -> bool:
    """Whether this process was started by torchrun, or by another program that sets its variables."""
    return all(name in os.environ for name in _NEEDED)


class Torchrun:
    """How a worker finds the others: as torchrun's variables say."""

    called = lost = stopped = False

    def __init__(self, *, timeout_seconds: float = 60.0) -> None:
        self.timeout_seconds = timeout_seconds
        self.member, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        """Whether this is not the first time that torchrun starts the workers of this run."""
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
        if restarts and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
            warnings.warn(
                "torchrun restarts workers of torch 2.13 only where it was started with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
                stacklevel=2,
            )

    def form(self) -> None:
        """Join the group of torchrun's variables."""
        dist.init_process_group("gloo", timeout=timedelta(seconds=self.timeout_seconds))

    def again(self) -> bool:
        """False: torchrun restarts all workers."""
        return False

    def folder(self, run: Path) -> Path:
        """The folder of this worker's records."""
        return run if self.member == 0 else run / "workers" / str(self.member)


def _end_with(agent: int) -> None:
    """End this process when torchrun's ends: it must not write into the run when torchrun is started again."""
    while os.getppid() == agent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)
