"""Joules that processors and their memory take while a block runs, from the RAPL counters of Linux."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from noctule.measure.background import repeating

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """The sum of what the energy counters gained since its construction; each counter wraps at its own limit."""

    def __init__(self, root: Path = POWERCAP) -> None:
        """Look for packages and the memory beside them under `root`, and remember where their counters stand."""
        self.microjoules = 0
        self._limits: dict[Path, int] = {}
        for zone in sorted(root.glob("intel-rapl:*")):  # AMD's counters have this name too
            try:
                name = (zone / "name").read_text().strip()
                if name == "dram" or name.startswith("package"):  # cores are part of packages, psys of everything
                    self._limits[zone / "energy_uj"] = int((zone / "max_energy_range_uj").read_text())
            except (OSError, ValueError):
                continue
        self._last = self._read() or {}

    @property
    def available(self) -> bool:
        """Whether all counters can be read; many systems let only the administrator do so."""
        return bool(self._last)

    def update(self) -> None:
        """Add the gains since the last update; call it more often than a counter wraps."""
        values = self._read() if self._last else None
        if values is None:
            self._last = {}
            return
        for path, value in values.items():
            gained = value - self._last[path]
            self.microjoules += gained if gained >= 0 else gained + self._limits[path] + 1
        self._last = values

    def _read(self) -> dict[Path, int] | None:
        try:
            return {path: int(path.read_text()) for path in self._limits}
        except (OSError, ValueError):
            return None


@contextmanager
def metering(root: Path = POWERCAP) -> Iterator[Meter]:
    """Meter the block; counters wrap after minutes at the earliest, so they are read every twenty seconds."""
    meter = Meter(root)
    if not meter.available:
        yield meter
        return
    with repeating(meter.update, every_seconds=20.0):
        yield meter
