"""Messages between workers and servers: a JSON header, then the bytes of tensors, one frame each."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from noctule.core.codec import Codec, Payload, pack, unpack
from noctule.core.errors import ExchangeError

PROTOCOL = 2
"""The version of the messages: another number where their content has changed."""
HEADER_BYTES = 1 << 22
"""The longest header; a hundred thousand parameters have a shorter one."""


def write(header: Mapping[str, Any], tensors: Sequence[bytes] = ()) -> list[bytes]:
    """Make the frames of a message."""
    return [json.dumps({"protocol": PROTOCOL, **header}, separators=(",", ":")).encode(), *tensors]


def read(frames: Sequence[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    """Split a message into its header and the frames of its tensors.

    Raises:
        ExchangeError: the frames are not a message, or one of another protocol.

    >>> read(write({"kind": "pull"}))
    ({'protocol': 2, 'kind': 'pull'}, [])
    """
    if not frames or len(frames[0]) > HEADER_BYTES:
        found = f"{len(frames[0]):,} bytes" if frames else "nothing"
        raise ExchangeError(f"a message begins with a header of at most {HEADER_BYTES:,} bytes, got {found}")
    try:
        header = json.loads(frames[0])
    except (ValueError, RecursionError) as error:
        raise ExchangeError(f"a message begins with a header in JSON, got {frames[0][:40]!r}: {error}") from error
    if not isinstance(header, dict):
        raise ExchangeError(f"a message begins with a JSON object, got {header!r:.100}")
    if header.get("protocol") != PROTOCOL:
        raise ExchangeError(
            f"this side speaks version {PROTOCOL} of the protocol and the other {header.get('protocol')!r:.20}: install the same "
            "version of noctule on both"
        )
    return header, list(frames[1:])


def field(header: Mapping[str, Any], name: str, kind: type, *, default: Any = ...) -> Any:
    """Get a value of a header by its name.

    Raises:
        ExchangeError: the value is missing, or of another type.
    """
    value = header.get(name, default)
    if value is ... or (type(value) is not kind and value is not default):
        found = "nothing" if value is ... else f"{value!r:.100}"
        raise ExchangeError(f"a message must say {name!r}, {kind.__name__}, and says {found}")
    return value


def to_bytes(payload: Payload) -> bytes:
    """Make a frame of an encoded tensor."""
    return pack(payload).cpu().numpy().tobytes()


def to_tensor(codec: Codec, frame: bytes, shape: Sequence[int], name: str) -> Tensor:
    """Decode the float32 tensor of a frame.

    Raises:
        ExchangeError: the frame is incomplete, too long, or of another tensor.
    """
    wire = torch.frombuffer(bytearray(frame), dtype=torch.uint8) if len(frame) else torch.empty(0, dtype=torch.uint8)
    try:
        return codec.decode(unpack(codec, wire, tuple(shape), torch.float32))
    except (ValueError, RuntimeError, IndexError) as error:
        raise ExchangeError(f"the frame of {name!r} is not that tensor: {error}") from error
