"""The compiled code computes what the reference does, for every instruction set and number of samples; bad inputs are refused."""

import json
import subprocess
import sys
import threading

import graphs
import numpy as np
import pytest

from noctule.runtime import Model, ModelFileError, _native
from noctule.runtime.graph import Graph, Step
from noctule.runtime.operators import Clamp, Conv2d, Linear, Pool, Reshape
from noctule.runtime.values import Value
from noctule.runtime.weights import Weight

SETS = _native.instruction_sets()
BATCHES = (1, 2, 5, 7, 8, 9, 16, 17, 33, 64, 70)


@pytest.fixture(params=SETS)
def instruction_set(request):
    _native.use_instruction_set(request.param)
    yield request.param
    _native.use_instruction_set(SETS[0])


@pytest.mark.parametrize("batch", BATCHES)
def test_floats_are_those_of_the_reference(instruction_set, batch):
    graph = graphs.images()
    x = np.random.default_rng(batch).standard_normal((batch, 3, 13, 11)).astype(np.float32)
    expected = graph.reference(x)[-1]
    np.testing.assert_allclose(Model(graph)(x), expected, atol=3e-6 * abs(expected).max())


@pytest.mark.parametrize("batch", BATCHES)
def test_integers_are_exactly_those_of_the_reference(instruction_set, batch):
    graph = graphs.codes()
    x = np.random.default_rng(batch).standard_normal((batch, 3, 9, 10)).astype(np.float32) * 2
    np.testing.assert_array_equal(Model(graph)(x), graph.reference(x)[-1])


def test_every_value_of_integers_is_exact(instruction_set):
    graph = graphs.codes()
    x = np.random.default_rng(1).standard_normal((20, 3, 9, 10)).astype(np.float32)
    for steps in range(1, len(graph.steps)):
        part = Graph(graph.input, graph.steps[:steps])
        if part.output.kind != "float32":
            with pytest.raises(ModelFileError, match="the output of a model is float32, this one's is codes"):
                Model(part)
            grid = part.output.grid
            assert grid is not None
            codes = weights_of_ones(part.output.shape)
            part = Graph(
                graph.input,
                [*part.steps, Step("", (steps,), Reshape((codes.shape[1],))), Step("", (steps + 1,), Linear(codes))],
            )
        np.testing.assert_array_equal(Model(part, max_batch=20)(x), part.reference(x)[-1])


def weights_of_ones(shape: tuple[int, ...]) -> Weight:
    """A weight that hands codes on as floats."""
    count = int(np.prod(shape))
    return Weight((count, count), np.eye(count, dtype=np.int8).reshape(-1), 8, np.ones(count, np.float32))


def test_a_plan_for_few_samples_leaves_that_for_many_as_it_was():
    graph = graphs.images()
    model, x = Model(graph), np.random.default_rng(0).standard_normal((64, 3, 13, 11)).astype(np.float32)
    first = model(x)
    for batch in (1, 3, 8, 33, 64):
        np.testing.assert_allclose(model(x[:batch]), first[:batch], atol=1e-5)
    np.testing.assert_array_equal(model(x), first)


def test_json_and_back_is_the_same_graph():
    for graph in (graphs.images(), graphs.codes(), graphs.tokens()):
        arrays: dict[str, np.ndarray] = {}
        text = graph.to_json(arrays)
        again = Graph.from_json(text, arrays)
        shape = (4, *graph.input.shape)
        x = np.arange(np.prod(shape)).reshape(shape) % 11
        np.testing.assert_array_equal(again.reference(x)[-1], graph.reference(x)[-1])
        assert again.to_json({}) == text


def test_tokens():
    graph = graphs.tokens()
    x = np.array([[0, 1, 2, 3, 10], [10, 9, 9, 9, 9]])
    np.testing.assert_allclose(Model(graph)(x), graph.reference(x)[-1], atol=1e-6)
    with pytest.raises(ValueError, match="module0 read a token"):
        Model(graph)(x + 1)
    with pytest.raises(ValueError, match="tokens lie from 0"):
        Model(graph)(-x)
    with pytest.raises(ValueError, match="whole numbers"):
        Model(graph)(x.astype(np.float32))


def test_outputs_go_where_they_are_wanted():
    model = Model(graphs.images())
    x, out = np.zeros((3, 3, 13, 11)), np.empty((3, 20), np.float32)
    assert model(x, out=out) is out
    np.testing.assert_array_equal(out, model(x))
    with pytest.raises(ValueError, match=r"contiguous float32 \(3, 20\), got float64 \(3, 20\)"):
        model(x, out=out.astype(np.float64))
    assert model(x[:0]).shape == (0, 20)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_are_refused(bad):
    x = np.zeros((2, 3, 13, 11), np.float32)
    x[1, 2, 12, 10] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        Model(graphs.images())(x)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (np.zeros((3, 13, 11)), r"expected inputs of shape \(B, 3, 13, 11\), got \(3, 13, 11\)"),
        (np.zeros((2, 3, 13, 12)), "expected inputs of shape"),
        (np.zeros((2, 3, 13, 11), complex), "expected real numbers"),
        (np.full((2, 3, 13, 11), "a"), "expected real numbers"),
    ],
)
def test_other_inputs_are_refused(x, text):
    with pytest.raises(ValueError, match=text):
        Model(graphs.images())(x)


def test_threads_wait_for_one_another():
    model, x = Model(graphs.images()), np.random.default_rng(0).standard_normal((40, 3, 13, 11)).astype(np.float32)
    expected, results = model(x), {}
    threads = [threading.Thread(target=lambda k=k: results.setdefault(k, model(x))) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(results[k], expected) for k in range(4))


def test_a_step_that_cannot_be_is_named():
    with pytest.raises(ModelFileError, match=r"step 2 \(there, linear\): a weight of \(4, 6\) does not read \(3,\)"):
        Graph(
            Value((5,)),
            [Step("here", (0,), Linear(graphs.weight(3, 5))), Step("there", (1,), Linear(graphs.weight(4, 6)))],
        )
    with pytest.raises(ModelFileError, match=r"reads .1.: only the values 0 to 0"):
        Graph(Value((5,)), [Step("", (1,), Clamp())])
    with pytest.raises(ModelFileError, match="reads images"):
        Graph(Value((5,)), [Step("", (0,), Pool("max", (2, 2), (2, 2)))])
    with pytest.raises(ModelFileError, match="5 numbers"):
        Graph(Value((5,)), [Step("", (0,), Reshape((2, 3)))])


def test_blocks_of_convolutions_are_refused():
    with pytest.raises(ModelFileError, match="blocks are of linear layers"):
        Graph(Value((4, 5, 5)), [Step("", (0,), Conv2d(graphs.weight(8, 36, 0.5, block=4), kernel=(3, 3)))])


def test_a_model_larger_than_the_machine_is_refused():
    graph = Graph(Value((2**28,)), [Step("", (0,), Clamp())])
    with pytest.raises(ModelFileError, match="give a smaller max_batch"):
        Model(graph, max_batch=4096)


def test_neither_torch_nor_anything_else_is_imported():
    code = (
        "import sys, json, noctule.runtime as r; import graphs, numpy as np;"
        "m = r.Model(graphs.codes()); m(np.zeros((3, 3, 9, 10)));"
        "print(json.dumps([k for k in sys.modules if k.split('.')[0] in ('torch', 'sklearn', 'safetensors', 'typing_extensions')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=__file__.rpartition("/")[0], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
