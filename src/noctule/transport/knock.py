"""Ask a parameter server whether it lets a worker in, before anything is trained: why it does not is said at once."""

import time

from noctule.core.errors import ExchangeError
from noctule.transport.keyed import Caller, zmq
from noctule.transport.ticket import Ticket


def knock(ticket: Ticket, *, timeout_seconds: float = 30.0) -> None:
    """Return once every shard has let the worker in; nothing is joined.

    Args:
        timeout_seconds: for a server that is not there yet.

    Raises:
        ExchangeError: it does not know the ticket, is another server, or nobody answers.
    """
    deadline = time.monotonic() + timeout_seconds
    for address in ticket.addresses:
        _knock(ticket, address, deadline, f"{timeout_seconds:g} s")


def _knock(ticket: Ticket, address: str, deadline: float, patience: str) -> None:
    from zmq.utils.monitor import recv_monitor_message  # once it is known to be there

    caller = Caller(ticket, address)
    monitor = caller.socket.get_monitor_socket()
    try:
        caller.socket.disconnect(address)
        caller.socket.connect(address)  # once more, now that somebody listens to what becomes of it
        connected = False
        while (left := deadline - time.monotonic()) > 0.0:
            if not monitor.poll(int(1000 * left)):
                continue
            match recv_monitor_message(monitor)["event"]:
                case zmq.Event.HANDSHAKE_SUCCEEDED:
                    return
                case zmq.Event.HANDSHAKE_FAILED_AUTH:
                    raise ExchangeError(
                        f"the server at {address} does not know the ticket of worker {ticket.worker}: it is of a server that was "
                        "there before, or damaged. Copy the one that the server of today has written"
                    )
                case zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL:
                    raise ExchangeError(
                        f"whoever listens at {address} is not the server that gave the ticket of worker {ticket.worker}: is it "
                        "another one, begun in another folder? Copy the ticket that the server of today has written"
                    )
                case zmq.Event.CONNECTED:
                    connected = True
        raise ExchangeError(
            f"{address} takes calls and does not answer for {patience}: is that a parameter server?"
            if connected
            else f"nobody answers at {address} for {patience}: does the server run, can this machine reach it under that address, "
            "and does a firewall let it through?"
        )
    finally:
        caller.socket.disable_monitor()
        monitor.close()
        caller.close()
