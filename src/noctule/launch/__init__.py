"""Where do the processes of a run come from? A supervisor on this machine, torchrun, a lighthouse, or a server's ticket."""

from noctule.launch.supervisor import Supervisor

__all__ = ["Supervisor"]
