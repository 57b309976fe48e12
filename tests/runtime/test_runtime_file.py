"""Files that are torn, foreign, too new or hostile are refused with the field that is wrong, and never end in another error."""

import json
import random
import struct
import zlib
from contextlib import suppress

import graphs
import numpy as np
import pytest

from noctule.runtime import Model, ModelFileError, load
from noctule.runtime.file import parse_file
from noctule.runtime.graph import Graph

NAMES = {np.dtype(np.float32): "F32", np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8"}


def file_of(graph: Graph, change=lambda header, data: None) -> bytes:
    """The bytes of a file, after a change of its header and its data; the checksum is right whatever was changed."""
    arrays: dict[str, np.ndarray] = {}
    text, header, data = graph.to_json(arrays), {}, bytearray()
    header["__metadata__"] = {
        "checksum": "0" * 8,
        "format": "noctule-runtime",
        "version": "1",
        "graph": json.loads(text),
    }
    for name, array in sorted(arrays.items(), key=lambda item: -item[1].itemsize):
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype], "shape": [*array.shape], "data_offsets": offsets}
        data += array.tobytes()
    change(header, data)
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and not isinstance(metadata.get("graph"), str | None):
        metadata["graph"] = json.dumps(metadata["graph"])
    return stamped(json.dumps(header, separators=(",", ":")).encode(), bytes(data))


def stamped(text: bytes, data: bytes) -> bytes:
    start = struct.pack("<Q", len(text))
    checksum = zlib.crc32(data, zlib.crc32(text, zlib.crc32(start)))
    return start + text.replace(b'"checksum":"00000000"', b'"checksum":"%08x"' % checksum, 1) + data


def read(file: bytes) -> Graph:
    return parse_file(memoryview(file), "a file")


@pytest.mark.parametrize("graph", [graphs.images, graphs.codes, graphs.tokens])
def test_a_file_is_its_graph(graph, tmp_path):
    (tmp_path / "model.noctule").write_bytes(file_of(graph()))
    assert load(tmp_path / "model.noctule").graph.to_json({}) == graph().to_json({})


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.99])
def test_a_torn_file(share, tmp_path):
    whole = file_of(graphs.images())
    (tmp_path / "torn").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelFileError, match="torn"):  # the path, or what is wrong with it
        load(tmp_path / "torn")


def test_a_missing_file(tmp_path):
    with pytest.raises(ModelFileError, match="No such file"):
        load(tmp_path / "none")


def test_a_changed_bit():
    whole = bytearray(file_of(graphs.images()))
    whole[-5] ^= 4
    with pytest.raises(ModelFileError, match="is damaged: its checksum is"):
        read(bytes(whole))


def metadata(**changes):
    return lambda header, data: header["__metadata__"].update(changes)


def step(number, **changes):
    return lambda header, data: header["__metadata__"]["graph"]["steps"][number].update(changes)


def weight(number, **changes):
    return lambda header, data: header["__metadata__"]["graph"]["steps"][number]["weight"].update(changes)


def tensor(name, **changes):
    return lambda header, data: header[name].update(changes)


def more_data(header, data):
    data += b"1234"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (metadata(format="pt"), "no model of noctule.runtime"),
        (metadata(version="2"), "is of version 2, this noctule.runtime reads 1: update it"),
        (metadata(version=1), "version 1, which is no number"),
        (metadata(graph="{"), "the graph is no JSON"),
        (metadata(graph='{"input":NaN}'), "NaN is no number"),
        (metadata(graph="[" * 100_000), "the graph is no JSON"),
        (metadata(graph=None), "has no graph"),
        (metadata(graph='{"steps":[],"facts":{}}'), "input must be an object"),
        (step(1, op="exec"), "step 2.op is 'exec', which this version does not know"),
        (step(1, op=["conv2d"]), "step 2.op must be a str"),
        (step(1, more=1), "step 2 has an unknown field 'more'"),
        (step(1, of=[2]), "step 2 .* reads .2.: only the values 0 to 1"),
        (step(1, of=[-1]), "only the values 0 to 1"),
        (step(1, of=[]), "only the values 0 to 1"),
        (step(1, of=[0, 0]), "step 2"),
        (step(1, of=[2**40]), "a whole number up to"),
        (step(1, kernel=[3, 3.0]), "a whole number up to"),
        (step(1, kernel=[3]), "a list of 2"),
        (step(1, stride=[0, 1]), "at least 1"),
        (step(1, padding=[[-1, 0], [0, 0]]), "at least 0"),
        (step(1, padding=[[2**30, 2**30], [2**30, 2**30]]), "no sample has shape|too large"),
        (step(1, dilation=[2**31 - 1, 1]), "does not fit"),
        (step(1, groups=2), "do not divide"),
        (step(1, slope=1e39), "a finite float32"),
        (step(1, slope=True), "a finite float32"),
        (step(1, to={"scale": 0.0, "zero_point": 0}), "no grid of codes"),
        (step(1, of=[0]), "codes need|only products of codes"),
        (step(1, to={"scale": 1e300, "zero_point": 0}), "a finite float32"),
        (step(1, to={"scale": 1.0, "zero_point": 256}), "no grid of codes"),
        (weight(1, shape=[8, 28]), r"step 2.weight: values must be int8 \(224,\)"),
        (weight(1, shape=[2**31 - 1, 2**31 - 1]), "no matrix"),
        (weight(1, scales="none"), "the name of a tensor"),
        (weight(1, bits=16), "one of 32, 8, 4, 1"),
        (tensor("2.weight.scales", dtype="F64"), "has the dtype 'F64'"),
        (tensor("2.weight.scales", shape=[9]), "cannot lie at bytes"),
        (tensor("2.weight.scales", shape=[-8]), "has the shape"),
        (tensor("2.weight.scales", data_offsets=[0, 32, 64]), "has the shape"),
        (tensor("2.weight.scales", data_offsets=[2**30, 2**30 + 32]), "cannot lie at bytes"),
        (tensor("2.weight.values", data_offsets=[1, 217]), "begins at byte"),
        (tensor("2.weight.scales", more=1), "must have dtype, shape and data_offsets"),
        (more_data, "tensors end at byte"),
    ],
)
def test_what_a_field_cannot_be(change, text):
    with pytest.raises(ModelFileError, match=text):
        read(file_of(graphs.codes(), change))


def mutated(rng: random.Random, graph: Graph) -> bytes:
    """A file with a few changes: of bytes, of fields, of structure."""

    def anything() -> object:
        numbers = [0, 1, -1, 2, 3, 255, 2**31 - 1, -(2**31), 2**63, 0.5, -1e38, 1e39]
        return rng.choice([*numbers, None, True, "", "0", [], [1], [1, 2], {}, "2.weight.values"])

    def walk(node: object, path: tuple = ()) -> list[tuple]:
        below = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        return [path, *(p for key, child in below for p in walk(child, (*path, key)))]

    def change(header: dict, data: bytearray) -> None:
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.4 and data:
                at = rng.randrange(len(data))
                data[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
                continue
            path = rng.choice(walk(header)[1:])
            parent = header
            for key in path[:-1]:
                parent = parent[key]
            if rng.random() < 0.15:
                del parent[path[-1]]
            elif rng.random() < 0.3 and isinstance(parent[path[-1]], int):
                parent[path[-1]] += rng.choice([-1, 1, 4])
            else:
                parent[path[-1]] = anything()

    file = bytearray(file_of(graph, change))
    if rng.random() < 0.1:
        file[rng.randrange(len(file))] ^= 1 << rng.randrange(8)
    return bytes(file)


def survives(rng: random.Random) -> bool:
    """Whether a mutated file is sound still: then it runs; else its error is ours and says what is wrong."""
    graph = rng.choice([graphs.images, graphs.codes, graphs.tokens])()
    try:
        read_graph = read(mutated(rng, graph))
        if sum(value.numbers for value in read_graph.values) > 10**6:
            return True
        model = Model(read_graph, max_batch=9)
    except ModelFileError:
        return False
    x = np.zeros(
        (rng.choice([1, 3, 9]), *model.input_shape), np.float32 if model.graph.input.kind == "float32" else np.int32
    )
    with suppress(ValueError):  # NaN, or a token without a row
        model(x)
    return True


def test_mutated_files_end_in_errors_of_ours():
    rng = random.Random(0)
    sound = sum(survives(rng) for _ in range(400))
    assert 0 < sound < 200
