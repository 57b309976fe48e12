import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from noctule.measure import measure
from noctule.measure.energy import Meter, metering


class Zone:
    """A folder as the kernel makes one for each energy counter."""

    def __init__(self, folder, name, limit=1000):
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{limit}\n")
        self.set(0)

    def set(self, microjoules):
        (self.folder / "energy_uj").write_text(f"{microjoules}\n")


@given(start=st.integers(0, 1000), gains=st.lists(st.integers(0, 1000), max_size=20))
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gains_add_up_however_often_the_counter_wraps(tmp_path_factory, start, gains):
    root = tmp_path_factory.mktemp("powercap")
    zone = Zone(root / "intel-rapl:0", "package-0")
    zone.set(start)
    meter = Meter(root)
    value = start
    for gain in gains:
        value += gain
        zone.set(value % 1001)  # a counter that shows 0 to 1000
        meter.update()
    assert meter.available
    assert meter.microjoules == sum(gains)


def test_packages_and_memory_are_counted_once_each(tmp_path):
    zones = [
        Zone(tmp_path / "intel-rapl:0", "package-0"),
        Zone(tmp_path / "intel-rapl:1", "package-1"),
        Zone(tmp_path / "intel-rapl:0:1", "dram"),
        Zone(tmp_path / "intel-rapl:0:0", "core"),
        Zone(tmp_path / "intel-rapl:2", "psys"),
        Zone(tmp_path / "intel-rapl-mmio:0", "package-0"),
    ]
    with metering(tmp_path) as meter:
        for i, zone in enumerate(zones):
            zone.set(10**i % 999)
    assert meter.microjoules == 111


@pytest.mark.parametrize("damage", ["absent", "unreadable", "gone meanwhile"])
def test_what_cannot_be_read_is_not_available(tmp_path, damage):
    if damage != "absent":
        zone = Zone(tmp_path / "intel-rapl:0", "package-0")
    if damage == "unreadable":
        zone.set("secret")
    with metering(tmp_path) as meter:
        if damage == "gone meanwhile":
            (zone.folder / "energy_uj").unlink()
    assert not meter.available


def test_this_machine_says_joules_or_not_available():
    with measure() as cost:
        sum(range(10**5))
    assert cost.joules is None or cost.joules >= 0
    assert (cost.joules is not None) == Meter().available
