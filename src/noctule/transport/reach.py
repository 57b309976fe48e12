"""Check before a training whether a worker can reach its server and is known there, with an error that says why not."""

import time

from noctule.core.errors import ExchangeError
from noctule.transport.sockets import Client, zmq
from noctule.transport.ticket import Ticket


def check_ticket(ticket: Ticket, *, timeout_seconds: float = 30.0) -> None:
    """Return once every address of a ticket has accepted its keys; no request is sent.

    Args:
        timeout_seconds: how long to wait for a server that is not there yet.

    Raises:
        ExchangeError: a server does not know the ticket, is another server, or does not answer.
    """
    deadline = time.monotonic() + timeout_seconds
    for address in ticket.addresses:
        _check_address(ticket, address, deadline, f"{timeout_seconds:g} s")


def _check_address(ticket: Ticket, address: str, deadline: float, patience: str) -> None:
    from zmq.utils.monitor import recv_monitor_message  # after the other module, whose error says what to install

    client = Client(ticket, address)
    monitor = client.socket.get_monitor_socket()
    try:
        client.socket.disconnect(address)
        client.socket.connect(address)  # again, now that the monitor sees the events
        connected = False
        while (left := deadline - time.monotonic()) > 0.0:
            if not monitor.poll(int(1000 * left)):
                continue
            match recv_monitor_message(monitor)["event"]:
                case zmq.Event.HANDSHAKE_SUCCEEDED:
                    return
                case zmq.Event.HANDSHAKE_FAILED_AUTH:
                    raise ExchangeError(
                        f"the server at {address} does not know the ticket of worker {ticket.worker}: it is of an earlier server, "
                        "or damaged. Copy the one that the server of today has written"
                    )
                case zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL:
                    raise ExchangeError(
                        f"the program at {address} is not the server that gave the ticket of worker {ticket.worker}: is it "
                        "another one, begun in another folder? Copy the ticket that the server of today has written"
                    )
                case zmq.Event.CONNECTED:
                    connected = True
        raise ExchangeError(
            f"{address} accepts connections and does not answer for {patience}: is that a parameter server?"
            if connected
            else f"no answer from {address} for {patience}: does the server run, can this machine reach it under that address, "
            "and does a firewall let it through?"
        )
    finally:
        client.socket.disable_monitor()
        monitor.close()
        client.close()
