"""Which shard of a parameter server keeps which parameters."""

from collections.abc import Mapping


def assign(sizes: Mapping[str, int], shards: int) -> list[list[str]]:
    """Assign parameters to shards: the largest first, each to the shard with the fewest numbers; the same on every machine.

    Raises:
        ValueError: a shard would have no parameter.

    >>> assign({"a": 10, "b": 6, "c": 5}, 2)
    [['a'], ['b', 'c']]
    """
    if not 1 <= shards <= len(sizes):
        raise ValueError(f"{len(sizes)} parameters cannot be assigned to {shards} shards: each must have one")
    assigned: list[list[str]] = [[] for _ in range(shards)]
    loads = [0] * shards
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = min(range(shards), key=lambda shard: (loads[shard], len(assigned[shard])))
        assigned[least].append(name)
        loads[least] += sizes[name]
    return assigned
