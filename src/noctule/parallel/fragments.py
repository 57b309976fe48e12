"""A model cut in fragments that meet at different steps, so that no meeting has to carry all of it."""

from collections.abc import Mapping

from torch import Tensor


def cut(parameters: Mapping[str, Tensor], fragments: int) -> dict[str, int]:
    """Name of a parameter -> the fragment it is in.

    The parameters of one layer stay together. Layers are dealt out, the largest first, each to the fragment that has the fewest
    bytes: none gets more than an even share and one layer. Layers of one size go round in the order of the model, so that each
    fragment has some near the input and some near the output.

    Raises:
        ValueError: there are fewer layers than fragments.

    >>> blocks = {f"{block}.weight": Tensor(8) for block in range(4)}
    >>> cut({"embed.weight": Tensor(16), **blocks}, 2)
    {'embed.weight': 0, '0.weight': 1, '1.weight': 1, '2.weight': 0, '3.weight': 1}
    """
    sizes: dict[str, int] = {}
    for name, p in parameters.items():
        sizes[_layer(name)] = sizes.get(_layer(name), 0) + p.nbytes
    if not 1 <= fragments <= len(sizes):
        raise ValueError(
            f"fragments={fragments} of a model that has trainable parameters in {len(sizes)} layers: a fragment has at least one"
        )
    filled_bytes, dealt = [0] * fragments, {}
    for layer in sorted(sizes, key=sizes.__getitem__, reverse=True):
        dealt[layer] = min(range(fragments), key=filled_bytes.__getitem__)
        filled_bytes[dealt[layer]] += max(1, sizes[layer])  # also one without weights fills a fragment
    return {name: dealt[_layer(name)] for name in parameters}


def last_turn(fragment: int, fragments: int, *, every: int, steps: int) -> int:
    """The last step, of so many, after which a fragment was to meet; zero or less before it ever was.

    >>> [last_turn(fragment, 4, every=100, steps=230) for fragment in range(4)]
    [225, 150, 175, 200]
    """
    first = (fragment + 1) * every // fragments
    return steps - (steps - first) % every


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
