"""Where do the processes of a run come from? A supervisor on one machine, torchrun, a lighthouse, or a ticket of a server."""

from noctule.launch.supervisor import Supervisor

__all__ = ["Supervisor"]
