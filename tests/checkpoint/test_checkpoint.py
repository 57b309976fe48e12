import errno
import fcntl
import io
import json
import os
import pickle
import resource
import stat
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict, namedtuple
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from noctule.checkpoint import Checkpoints, load, load_model, save, save_model
from noctule.checkpoint.atomic import replacing
from noctule.checkpoint.file import DTYPES
from noctule.core.errors import CheckpointError
from noctule.measure import measure

STATE = {"step": 7, "model": {"0.weight": torch.arange(6.0).reshape(2, 3), "mask": torch.tensor([True, False])}}


def same(a, b):
    """Whether two trees are equal to the last bit, types, order of keys and all."""
    if isinstance(a, torch.Tensor):
        plain_a, plain_b = (t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(plain_a, plain_b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(same, a, b)) and all(map(same, a.values(), b.values()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    values = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    values = values.remainder(2) if dtype is torch.bool else values
    tensor = torch.empty(shape, dtype=dtype)
    tensor.reshape(-1).view(torch.uint8).copy_(values)
    match draw(st.sampled_from(["as it is", "transposed", "expanded", "a part", "parameter"])):
        case "transposed":
            return tensor.mT if tensor.dim() > 1 else tensor
        case "expanded":
            return tensor.expand(3, *tensor.shape)
        case "a part":
            return tensor[1:] if tensor.dim() else tensor
        case "parameter" if dtype.is_floating_point:
            return nn.Parameter(tensor)
    return tensor


texts = st.text(st.characters(exclude_categories=()), max_size=6)  # lone surrogates too
keys = texts | st.integers() | st.floats()
leaves = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=9) | tensors()
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=12,
)


@given(tree=trees)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
def test_what_is_loaded_is_what_was_saved(tmp_path, tree):
    save(tmp_path / "x.safetensors", tree)
    loaded = load(tmp_path / "x.safetensors")
    expected = tree.detach() if isinstance(tree, nn.Parameter) else tree
    assert same(loaded, expected)
    assert os.listdir(tmp_path) == ["x.safetensors"]


@given(value=st.integers(10**50, 10**60) | st.just(10**5000) | st.just(-(2**63)) | st.just(2**64))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_integers_of_any_size(tmp_path, value):
    save(tmp_path / "x", {value: value})
    assert load(tmp_path / "x") == {value: value}


def test_names_that_collide_stay_apart(tmp_path):
    tree = {"a": {"b": torch.tensor(1), "": torch.tensor(5)}, "a.b": torch.tensor(2), "__metadata__": torch.tensor(3)}
    tree["a.b#2"] = torch.tensor(4)
    save(tmp_path / "x", tree)
    assert same(load(tmp_path / "x"), tree)


def test_any_safetensors_reader_reads_the_tensors(tmp_path):
    tree = {"a": [torch.randn(3, 5).T, torch.arange(4).to(torch.uint16)], "é": torch.randn(2).bfloat16(), "n": 1}
    save(tmp_path / "x.safetensors", tree)
    found = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert set(found) == {"a[0]", "a[1]", "é"}
    assert same(found["a[0]"], tree["a"][0])
    assert same(found["a[1]"], tree["a"][1])
    assert same(found["é"], tree["é"])


def test_loaded_tensors_share_nothing(tmp_path):
    base = torch.zeros(4)
    save(tmp_path / "x", [base, base, base[1:]])
    first, second, part = load(tmp_path / "x")
    first += 1
    assert (second == 0).all()
    assert (part == 0).all()


def test_an_optimizer_goes_on_as_if_never_stopped(tmp_path):
    def train(model, optimizer, steps):
        for _ in steps:
            optimizer.zero_grad()
            model(torch.ones(2, 4)).pow(2).sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(3))
    save(
        tmp_path / "x", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    )
    train(model, optimizer, range(3))
    state = load(tmp_path / "x")
    assert state["model"]._metadata == model.state_dict()._metadata
    again = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    other = torch.optim.Adam(again.parameters())
    again.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    train(again, other, range(3))
    assert same(again.state_dict(), model.state_dict())
    assert same(other.state_dict(), optimizer.state_dict())


def _self_containing():
    items = []
    items.append(items)
    return items


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"optimizer": {"state": {0: {"foo": len}}}}, r"optimizer\.state\[0\]\.foo: it is a function"),
        ({"a": [1, {2, 3}]}, r"a\[1\]: it is a builtins\.set"),
        ({"a": np.float64(1)}, r"a: it is a numpy\.float64"),
        ({"a": defaultdict(int)}, "collections.defaultdict"),
        ({"a": namedtuple("Point", "x y")(1, 2)}, "Point"),
        ({"a": {(1, 2): 3}}, r"a: its key \(1, 2\)"),
        ({True: 3}, "the state: its key True"),
        (object(), "the state: it is a builtins.object"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "a: a tensor of torch.complex128"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "torch.sparse_coo"),
        ({"a": torch.zeros(2, device="meta")}, "on meta"),
        (_self_containing(), "contains itself"),
    ],
)
def test_what_cannot_be_kept_is_named_and_nothing_is_lost(tmp_path, state, place):
    path = tmp_path / "x.safetensors"
    save(path, STATE)
    with pytest.raises(CheckpointError, match=place):
        save(path, state)
    assert same(load(path), STATE)
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save(path, STATE)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated|empty"):
            load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="announced"):
        load(path)


def test_each_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save(path, STATE)
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 7):  # some bit of every byte
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            load(path)


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_of_any_kind_is_noticed(tmp_path, data):
    path = tmp_path / "x.safetensors"
    save(path, STATE)
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.binary(min_size=1, max_size=64))
    damaged = whole[:start] + other + whole[start + len(other) :]
    path.write_bytes(damaged)
    if damaged == whole:
        assert same(load(path), STATE)
    else:
        with pytest.raises(CheckpointError):
            load(path)


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def _torch_saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["pickle 0", "pickle 2", "pickle 4", "pickle 5", "torch", "torch legacy"])
def test_a_pickle_is_refused_and_never_run(tmp_path, form):
    victim = tmp_path / "victim"
    if form.startswith("pickle"):
        data = pickle.dumps(Malicious(victim), protocol=int(form[-1]))
    else:
        data = _torch_saved(Malicious(victim), _use_new_zipfile_serialization=form == "torch")
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="neither" if form == "pickle 0" else "unpickled"):
        load(path)
    assert not victim.exists()


def _zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b")
    return buffer.getvalue()


def _header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


OURS = {"format": "noctule-checkpoint", "version": "1", "checksum": "00000000", "tree": "[]"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (safetensors.torch.save({"a": torch.ones(3)}), "no Noctule checkpoint"),
        (_zip(), "zip archive"),
        (np.random.default_rng(0).bytes(1000), "neither"),
        (bytes(1000), "neither"),
        (_header({"__metadata__": {**OURS, "version": "2"}}), "update"),
        (_header({"__metadata__": {**OURS, "version": "x"}}), "damaged"),
        (_header({"__metadata__": OURS}), "checksum"),
        (_header({"__metadata__": 3}), "damaged"),
        (_header(b'{"a":' + b"[" * 100_000), "damaged"),
        (_header(b"{" + b"\xff" * 50), "damaged"),
        (struct.pack("<Q", 2**63) + b"{}", "header of 9,223,372,036,854,775,808 bytes"),
        (struct.pack("<Q", 2**40) + b"{" * 1000, "header of 1,099,511,627,776 bytes"),
    ],
)
def test_foreign_files_are_told_apart(tmp_path, data, reason):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-4, -1], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]},
        {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        {"shape": [4], "data_offsets": [0, 16]},
        "nonsense",
    ],
)
def test_absurd_headers_are_refused_and_allocate_nothing(tmp_path, entry):
    path = tmp_path / "x.safetensors"
    path.write_bytes(_header({"__metadata__": OURS, "a": entry}, bytes(16)))
    with measure() as cost, pytest.raises(CheckpointError, match="damaged"):
        load(path)
    assert cost.peak_memory_bytes - cost.memory_before_bytes < 50e6


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        load(tmp_path / "x")
    with pytest.raises(CheckpointError, match="directory"):
        load(tmp_path)


@contextmanager
def _small_disk(folder):
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(not Path("/bin/mount").exists(), reason="there is no mount command")
def test_a_full_disk_loses_nothing(tmp_path):
    folder = tmp_path / "disk"
    with _small_disk(folder):
        checkpoints = Checkpoints(folder)
        checkpoints.save(1, {"x": torch.ones(50_000)})
        with pytest.raises(CheckpointError, match=r"No space left.*free some space"):
            checkpoints.save(2, {"x": torch.ones(500_000)})
        assert os.listdir(folder) == ["step-000000000001.safetensors"]
        assert same(checkpoints.latest(), (1, {"x": torch.ones(50_000)}))


def test_a_file_beyond_the_limit_loses_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, STATE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large; free some space"):
            checkpoints.save(2, {"x": torch.ones(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["step-000000000001.safetensors"]
    assert same(checkpoints.latest(), (1, STATE))


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not save"):
        Checkpoints(tmp_path / "file" / "folder").save(1, {})


def test_the_newest_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "folder", keep=2)
    assert checkpoints.latest() is None
    for step in (0, 5, 10, 900):
        assert checkpoints.save(step, {"step": step}) == checkpoints.path(step)
        assert checkpoints.latest() == (step, {"step": step})
    assert checkpoints.steps() == [10, 900]
    Checkpoints(checkpoints.folder, keep=1).save(50, {})
    assert checkpoints.steps() == [50, 900], "later steps are someone's work: they stay"


@pytest.mark.parametrize("step", [-1, 10**12])
def test_steps_and_keep_are_checked(tmp_path, step):
    with pytest.raises(ValueError, match="a step is"):
        Checkpoints(tmp_path).save(step, {})
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_a_failed_save_prunes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {})
    with pytest.raises(CheckpointError):
        checkpoints.save(2, {"f": len})
    assert checkpoints.steps() == [1]


def test_a_bad_checkpoint_is_passed_over_and_counts_for_nothing(tmp_path, recwarn):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, STATE)
    data = checkpoints.path(2).read_bytes()
    checkpoints.path(2).write_bytes(data[:-1])
    with pytest.warns(UserWarning, match=r"that of step 1: .*step-000000000002\.safetensors is truncated"):
        assert same(checkpoints.latest(), (1, STATE))
    checkpoints.save(3, STATE)
    assert checkpoints.steps() == [1, 3], "the bad one went, the good ones stayed"
    for step in (1, 3):
        checkpoints.path(step).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)000000000003.*is empty.*000000000001.*is empty"):
        checkpoints.latest()


def test_only_what_the_dead_left_is_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    dead, living = (tmp_path / f".step-000000000001.safetensors.{name}.tmp" for name in ("dead", "living"))
    dead.write_bytes(b"x")
    (tmp_path / "notes.tmp").write_text("mine")
    with open(living, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        checkpoints.save(2, {})
        assert sorted(os.listdir(tmp_path)) == [living.name, "notes.tmp", "step-000000000002.safetensors"]
    checkpoints.save(3, {})
    assert not living.exists()
    living.write_bytes(b"x")
    save(checkpoints.path(1), {})
    assert not living.exists(), "also where only that file is saved again"


def test_a_file_that_is_being_written_stays_while_another_save_clears_up(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with replacing(checkpoints.path(1)) as file:
        file.write(b"whole")
        checkpoints.save(2, {})
        save(checkpoints.path(1), {})  # the same file, by another writer
        assert sum(name.endswith(".tmp") for name in os.listdir(tmp_path)) == 1
    assert checkpoints.path(1).read_bytes() == b"whole"
    assert ".tmp" not in "".join(os.listdir(tmp_path))


@pytest.mark.parametrize("refusal", [None, errno.EINVAL, errno.EIO])
def test_the_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, monkeypatch, refusal):
    path, done, sync, rename = tmp_path / "x", [], os.fsync, os.replace

    def recorded_sync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        if done[-1] == "file":
            assert os.fstat(descriptor).st_size == 5, "what is written is behind the buffer"
        elif refusal is not None:
            raise OSError(refusal, os.strerror(refusal))
        sync(descriptor)

    def recorded_rename(source, target):
        done.append("name")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "replace", recorded_rename)
    told = pytest.raises(CheckpointError, match="Input/output") if refusal == errno.EIO else nullcontext()
    with told, replacing(path) as file:
        file.write(b"whole")
    assert done == ["file", "name", "folder"]
    assert path.read_bytes() == b"whole"


KILLED = """
import os, random, signal, sys, time, torch
from noctule.checkpoint import Checkpoints
torch.set_num_threads(1)
random.seed(0)
before = -1
for _ in range(10):
    heard, saved = os.pipe()
    child = os.fork()
    if child == 0:
        checkpoints = Checkpoints(sys.argv[1])
        step = (checkpoints.latest() or (-1,))[0]
        while True:
            step += 1
            checkpoints.save(step, {"step": step, "x": torch.full((600_000,), float(step))})
            os.write(saved, b".")
    os.close(saved)
    assert os.read(heard, 1) == b"."  # it has saved once, however slow the machine is
    time.sleep(random.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(heard)
    step, state = Checkpoints(sys.argv[1]).latest()
    assert state["step"] == step > before and (state["x"] == step).all(), (step, before, state)
    before = step
Checkpoints(sys.argv[1]).save(before + 1, {})
print(*sorted(os.listdir(sys.argv[1])))
"""


def test_a_process_killed_at_any_moment_leaves_a_good_checkpoint(tmp_path):
    command = [sys.executable, "-W", "error::UserWarning", "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 1 <= len(done.stdout.split()) <= 3
    assert ".tmp" not in done.stdout


class Sparse(nn.Module):
    """A module with an extra state like that of a sparse layer."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.randn(3))
        self.extra = {
            "row_ptr": torch.tensor([0, 1, 3], dtype=torch.int32),
            "columns": torch.tensor([1, 0, 2], dtype=torch.uint16),
            "shape": (2, 3),
        }

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def _model():
    model = nn.Sequential(Sparse(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[3].weight = model[1].weight
    return model


STRUCTURE = {"layers": [{"kind": "SparseLinear", "inputs": 3, "bias": None}], "slope": 0.6, "ä": True}


@pytest.mark.parametrize("name", ["run", "run/best.safetensors"])
def test_a_model_comes_back_exactly(tmp_path, name):
    state = _model().state_dict()
    save_model(tmp_path / name, state, STRUCTURE)
    loaded, structure = load_model(tmp_path / name)
    assert same(loaded, state)
    assert structure == STRUCTURE
    assert loaded._metadata == state._metadata
    other = _model()
    other.load_state_dict(loaded)
    assert same(other.state_dict(), state)
    weights = tmp_path / "run" / ("best.safetensors" if "best" in name else "model.safetensors")
    plain = safetensors.torch.load_file(weights)
    assert same(plain["0._extra_state.columns"], state["0._extra_state"]["columns"])
    assert same(plain["1.weight"], state["1.weight"])
    assert json.loads(weights.with_suffix(".json").read_text())["structure"] == STRUCTURE


@pytest.mark.parametrize("structure", [{1: 2}, {"a": (1, 2)}, {"a": float("nan")}, {"a": torch.ones(1)}])
def test_a_structure_is_plain_json(tmp_path, structure):
    with pytest.raises(CheckpointError, match="plain JSON"):
        save_model(tmp_path, {}, structure)
    assert os.listdir(tmp_path) == []


def test_a_model_that_another_tool_changed_is_read_with_a_warning(tmp_path):
    save_model(tmp_path, {"a": torch.zeros(2)}, {})
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    with pytest.warns(UserWarning, match="was changed"):
        assert same(load_model(tmp_path), ({"a": torch.ones(2)}, {}))


def test_files_of_a_model_that_do_not_fit_are_refused(tmp_path):
    save_model(tmp_path, {"a": torch.zeros(2)}, {})
    path, structure = tmp_path / "model.safetensors", tmp_path / "model.json"
    for tensors_, reason in (
        ({"b": torch.ones(2)}, "belong together"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, "b"),
    ):
        safetensors.torch.save_file(tensors_, path)
        with pytest.raises(CheckpointError, match=reason):
            load_model(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(tmp_path)
    for text in ("", "[]", "{}", '{"format": "other", "version": 1}', '{"format": "noctule-model", "version": 2}'):
        structure.write_text(text)
        with pytest.raises(CheckpointError, match="no model structure"):
            load_model(tmp_path)
    structure.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.json"):
        load_model(tmp_path)


def test_saving_and_loading_needs_no_second_copy(tmp_path):
    state = {"x": torch.ones(20_000_000)}
    with measure() as saving:
        save(tmp_path / "x", state)
    with measure() as loading:
        load(tmp_path / "x")
    assert saving.peak_memory_bytes - saving.memory_before_bytes < 40e6
    assert loading.peak_memory_bytes - loading.memory_before_bytes < 120e6
