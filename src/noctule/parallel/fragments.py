"""Cut a model in fragments that are exchanged at different steps."""

from collections.abc import Mapping

from torch import Tensor


def cut(parameters: Mapping[str, Tensor], fragments: int) -> dict[str, int]:
    """Assign parameters to fragments: the number of the fragment for each name.

    The parameters of one layer stay together. Layers are assigned, the largest first, each to the fragment that has the fewest
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
    filled_bytes, assigned = [0] * fragments, {}
    for layer in sorted(sizes, key=sizes.__getitem__, reverse=True):
        assigned[layer] = min(range(fragments), key=filled_bytes.__getitem__)
        filled_bytes[assigned[layer]] += max(1, sizes[layer])  # a layer without weights fills a fragment too
    return {name: assigned[_layer(name)] for name in parameters}


def last_due(fragment: int, fragments: int, *, every: int, steps: int) -> int:
    """The last of ``steps`` steps after which the exchange of a fragment was due; zero or less if none was.

    >>> [last_due(fragment, 4, every=100, steps=230) for fragment in range(4)]
    [225, 150, 175, 200]
    """
    first = (fragment + 1) * every // fragments
    return steps - (steps - first) % every


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
