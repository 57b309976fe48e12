"""A handshake before workers train together: compare their models, and name the first difference."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from noctule.core.errors import ExchangeError
from noctule.core.exchange import Exchange
from noctule.core.optim import sparse_layers


def agree(
    exchange: Exchange,
    model: nn.Module,
    facts: Mapping[str, Any] | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Compare the names, shapes, dtypes, numbers and places of a model's weights over all workers, and ``facts`` too.

    Args:
        facts: options that must be equal too, such as a codec; each is compared by its text.
        weights: tensors by name, to compare instead of the model's own.

    Raises:
        ExchangeError: workers differ; it names the first difference and both sides. All workers raise it.
    """
    _compare(exchange, {name: str(fact) for name, fact in (facts or {}).items()} | _described(model, weights))


def agree_on_places(exchange: Exchange, model: nn.Module) -> None:
    """Compare the places of all sparse layers over all workers.

    Raises:
        ExchangeError: they differ.
    """
    _compare(exchange, described_places(model))


def _compare(exchange: Exchange, mine: Mapping[str, str]) -> None:
    messages = exchange.share(json.dumps(mine).encode())
    try:
        everyone = [json.loads(message) for message in messages]
    except ValueError as error:
        raise ExchangeError(f"a worker sent a message that is not a handshake: {error}") from error
    if not all(isinstance(each, dict) for each in everyone):
        raise ExchangeError(f"a worker sent a message that is not a handshake: {messages!r:.200}")
    first = everyone[0]
    for worker, other in enumerate(everyone[1:], start=1):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                sides = " and ".join(side.get(name, "not there") for side in (first, other))
                raise ExchangeError(
                    f"workers 0 and {worker} differ in {name!r}: {sides}. Make the model in the same way, from the same seed, "
                    "on every worker, or load the same checkpoint; connections that move must move alike"
                )


def _described(model: nn.Module, weights: Mapping[str, Tensor] | None) -> dict[str, str]:
    """A line for each parameter and topology."""
    lines = {
        name: f"{str(p.dtype).removeprefix('torch.')} {tuple(p.shape)} {_digest(p)}"
        for name, p in (model.named_parameters() if weights is None else weights.items())
    }
    return described_places(model) | lines


def described_places(model: nn.Module) -> dict[str, str]:
    """A line for each topology."""
    lines = {}
    for name, layer in sparse_layers(model).items():
        places = layer.topology
        lines[f"{name}.topology"] = f"{places.shape} {_digest(places.row_ptr)} {_digest(places.columns)}"
    return lines


def _digest(x: Tensor) -> str:
    """Eight hexadecimal digits from the bytes of a tensor."""
    flat = x.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=4).hexdigest()
