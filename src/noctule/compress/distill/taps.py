"""The outputs of named modules, recorded while a model runs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from noctule.core.place import nearest


class Recorded(dict[str, Any]):
    """Name of a module -> what it returned last; `taps` makes one."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names, self.versions = names, dict[str, int]()

    def record(self, name: str, output: Any) -> None:
        """Keep an output, and which version of its memory that was."""
        self[name], self.versions[name] = output, _version(output)

    def __missing__(self, name: str) -> Any:
        """Say why there is no output."""
        if name in self.names:
            raise RuntimeError(f"{name!r} has returned nothing since it was tapped: call the model inside the block")
        raise KeyError(f"{name!r} is not tapped{nearest(name, self.names)}; tapped: {', '.join(self.names)}")

    @override
    def __getitem__(self, name: str) -> Any:
        output = super().__getitem__(name)
        if _version(output) != self.versions[name]:
            raise RuntimeError(
                f"a later module has changed the output of {name!r} in place, as nn.ReLU(inplace=True) does: tap that module, "
                "or make it work out of place"
            )
        return output


@contextmanager
def taps(model: nn.Module, names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Record the outputs of the modules of these names at every forward pass, until the block ends.

    Outputs are as the modules return them: with their graph in a student, without one in a teacher under ``torch.no_grad``. Of a
    module that is called several times the last output stays. The name of the model itself is "".

    Raises:
        ValueError: there is no module of such a name.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> with taps(model, ["1"]) as hidden:
    ...     y = model(torch.ones(5, 3))
    ...     hidden["1"].shape
    torch.Size([5, 4])
    """
    modules = dict(model.named_modules())
    names = [names] if isinstance(names, str) else [*names]
    if lost := [name for name in names if name not in modules]:
        raise ValueError(
            f"the model has no module {lost[0]!r}{nearest(lost[0], [*modules])}: see model.named_modules()"
        )
    recorded = Recorded(names)

    def keep(name: str) -> Any:
        return lambda module, inputs, output: recorded.record(name, output)

    with ExitStack() as stack:
        stack.callback(recorded.clear)
        for name in names:
            stack.callback(modules[name].register_forward_hook(keep(name)).remove)
        yield recorded


def _version(output: Any) -> int:
    return output._version if isinstance(output, Tensor) and not output.is_inference() else 0
