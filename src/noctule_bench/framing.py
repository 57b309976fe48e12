"""What a message becomes on its way: bytes at the interface, with the headers of gloo, TCP and IP and the acknowledgements."""

import math

_HEADERS = 20 + 20 + 12
"""Bytes of IPv4, of TCP and of its time stamps, on every packet."""
_PREAMBLE = 48
"""Bytes that gloo puts before a message, and in each of the two by which sender and receiver say that they are ready."""


def on_the_wire(payload_bytes: float, *, messages: float, mtu: int) -> float:
    """Bytes that a worker's interface sends, of so many in some messages of one size, while it receives as many.

    An estimate, of a link that loses nothing and a receiver that acknowledges every other packet.

    Args:
        payload_bytes: of all messages together.
        messages: how many.
        mtu: bytes of the largest packet with its headers.

    >>> round(on_the_wire(1e6, messages=1, mtu=1500))
    1054146
    """
    if not payload_bytes or not messages:
        return 0.0
    packets = messages * math.ceil((payload_bytes / messages + _PREAMBLE) / (mtu - _HEADERS))
    notices = 2 * messages * (_PREAMBLE + _HEADERS)
    return payload_bytes + messages * _PREAMBLE + packets * _HEADERS * 1.5 + notices
