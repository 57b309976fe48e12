"""What the sparse estimators promise beyond scikit-learn's checks."""

import copy
import io
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import joblib
import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_digits, make_classification, make_regression
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from noctule.core.errors import NonFiniteError
from noctule.estimators import SparseMLPClassifier, SparseMLPRegressor
from noctule.estimators.network import ACTIVATIONS, Network, density_of
from noctule.sparse.layers import SparseLinear

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

SMALL = {"hidden_layer_sizes": (30, 20), "density": 0.3, "batch_size": 32, "max_iter": 6, "random_state": 0}
MOVING = {**SMALL, "rewire_every": 3, "dropout": 0.2}


def classes(samples: int = 150, names: str = "abc"):
    X, y = make_classification(samples, 12, n_informative=6, n_classes=len(names), random_state=1)
    return X.astype(np.float32), np.array(list(names))[y]


def numbers(samples: int = 150, outputs: int = 1):
    X, y = make_regression(samples, 12, n_targets=outputs, random_state=1)
    return X, (y - y.mean()) / y.std()


def layers(estimator) -> list[SparseLinear]:
    return [m for m in estimator.model_ if isinstance(m, SparseLinear)]


def state(estimator) -> list[torch.Tensor]:
    return [
        t for layer in layers(estimator) for t in (layer.topology.keys(), layer.values.detach(), layer.bias.detach())
    ]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(state(a), state(b), strict=True))


# -- chance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewire", ["gse", "rigl", "set", "none"])
def test_a_seed_decides_everything_and_torch_is_left_as_it_was(rewire):
    X, y = classes()
    first = SparseMLPClassifier(**MOVING, rewire=rewire).fit(X, y)
    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    second = SparseMLPClassifier(**MOVING, rewire=rewire).fit(X, y)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert same(first, second)
    assert first.loss_curve_ == second.loss_curve_
    assert not same(first, clone(first).set_params(random_state=1).fit(X, y))


def test_numpys_generators_are_taken_as_scikit_learn_takes_them():
    X, y = classes()
    shared = np.random.RandomState(3)
    a, b = (SparseMLPClassifier(**SMALL).set_params(random_state=shared).fit(X, y) for _ in range(2))
    assert not same(a, b)
    assert same(a, SparseMLPClassifier(**SMALL).set_params(random_state=np.random.RandomState(3)).fit(X, y))


def test_threads_that_fit_at_once_do_not_disturb_each_other():
    X, y = classes()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    alone = [SparseMLPClassifier(**{**MOVING, "random_state": n}).fit(X, y) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda n: SparseMLPClassifier(**{**MOVING, "random_state": n}).fit(X, y), range(4)))
    assert all(map(same, alone, together))
    assert torch.equal(torch.get_rng_state(), before)


# -- training -------------------------------------------------------------------------------------------------------


def test_partial_fits_add_up_to_a_fit():
    X, y = classes()
    whole = SparseMLPClassifier(**MOVING, rewire="none", tol=0).fit(X, y)
    parts = SparseMLPClassifier(**MOVING, rewire="none")
    for _ in range(whole.n_iter_):
        parts.partial_fit(X, y, classes=["a", "b", "c"])
    assert same(whole, parts)
    assert whole.loss_curve_ == parts.loss_curve_
    assert whole.n_iter_ == parts.n_iter_ == 6


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_goes_on_where_the_original_stopped(copied):
    X, y = numbers()
    original = SparseMLPRegressor(**MOVING)
    for _ in range(3):
        original.partial_fit(X, y)
    twin = copied(original)
    for estimator in (original, twin):
        for _ in range(3):
            estimator.partial_fit(X, y)
    assert same(original, twin)
    assert not same(original, clone(original).fit(X, y))


def test_every_epoch_sees_all_samples_in_an_order_of_its_own():
    seen = []

    class Recording(SparseMLPRegressor):
        def _loss(self, predicted, targets, *weights):
            seen.append(targets[:, 0])
            return super()._loss(predicted, targets, *weights)

    X, y = numbers(100)
    Recording(**{**SMALL, "random_state": 1}).fit(X, y)
    elsewhere = [seen.pop(0) for _ in range(len(seen))]
    Recording(**SMALL).fit(X, y)
    assert not any(torch.equal(a, b) for a, b in zip(seen, elsewhere, strict=True)), "the order is that of the seed"
    assert [len(batch) for batch in seen[:4]] == [32, 32, 32, 4]
    epochs = [torch.cat(seen[n : n + 4]) for n in range(0, len(seen), 4)]
    assert all(torch.equal(epoch.sort().values, epochs[0].sort().values) for epoch in epochs)
    assert not any(torch.equal(a, b) for a, b in pairwise(epochs))


def test_connections_move_and_their_number_stays():
    X, y = classes()
    for rewire in ("gse", "rigl", "set", "none"):
        estimator = SparseMLPClassifier(**MOVING, rewire=rewire).fit(X, y)
        start = estimator._network.build(estimator._progress.seed)
        moved = [
            a.topology != b.topology for a, b in zip(layers(estimator), (m for m in start if hasattr(m, "topology")))
        ]
        assert any(moved) == (rewire != "none")
        assert estimator.density_ == density_of(start) == density_of(estimator.model_) == pytest.approx(0.3, abs=1e-3)


def test_partial_fits_move_connections_though_none_of_them_is_long_enough():
    X, y = numbers(32)
    estimator = SparseMLPRegressor(**SMALL, rewire="set", rewire_every=4).partial_fit(X, y)
    places = [layer.topology for layer in layers(estimator)]
    changed = []
    for _ in range(7):
        estimator.partial_fit(X, y)
        changed.append([layer.topology for layer in layers(estimator)] != places)
        places = [layer.topology for layer in layers(estimator)]
    assert changed == [False, False, True, False, False, False, True]


def test_warm_start_goes_on_and_a_cold_one_starts_anew():
    X, y = classes()
    estimator = SparseMLPClassifier(**MOVING, warm_start=True).fit(X, y)
    once = estimator.loss_curve_[-1]
    estimator.fit(X, y)
    assert len(estimator.loss_curve_) == 12
    assert estimator.n_iter_ == 6
    assert estimator.loss_curve_[6] < estimator.loss_curve_[0]
    assert estimator.loss_curve_[-1] < once
    with pytest.raises(ValueError, match=r"cannot go on as Network\(widths=\(12, 9, 3\)"):
        estimator.set_params(hidden_layer_sizes=9).fit(X, y)
    assert len(estimator.set_params(warm_start=False).fit(X, y).loss_curve_) == 6


def test_early_stopping_keeps_the_best_epoch():
    X, y = classes(names="ab")
    y = np.where(np.random.default_rng(0).random(len(y)) < 0.3, "a", y)  # something to overfit
    estimator = SparseMLPClassifier(
        (100,), early_stopping=True, validation_fraction=0.4, learning_rate_init=0.05, rewire_every=2, random_state=0
    ).fit(X, y)
    scores = estimator.validation_scores_
    best = int(np.argmax(scores))
    assert best + 1 < estimator.n_iter_ == len(scores) < estimator.max_iter
    _, held_out = train_test_split(np.arange(len(X)), test_size=0.4, random_state=estimator._progress.seed, stratify=y)
    assert estimator.score(X[held_out], y[held_out]) == pytest.approx(scores[best])
    assert scores[-1] < scores[best]


def test_a_training_that_no_longer_improves_stops_and_another_warns():
    X, y = numbers()
    stopped = SparseMLPRegressor(**SMALL).set_params(max_iter=50, tol=1e9, n_iter_no_change=3)
    assert stopped.fit(X, y).n_iter_ == 5  # the first sets the mark, four more than three do not beat it
    with pytest.warns(ConvergenceWarning, match="max_iter=6"):
        SparseMLPRegressor(**SMALL).fit(X, y)


def test_diverging_says_so():
    X, y = numbers()
    with pytest.raises(NonFiniteError, match="step 1: the loss"):
        SparseMLPRegressor(**SMALL).fit(X, y * 1e30)


def test_ctrl_c_comes_between_two_steps_and_leaves_a_whole_model():
    class Interrupted(SparseMLPRegressor):
        def _loss(self, predicted, targets, *weights):
            if self._progress.step == 7:
                signal.raise_signal(signal.SIGINT)
            return super()._loss(predicted, targets, *weights)

    X, y = numbers()
    estimator = Interrupted(**MOVING)
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(X, y)
    assert estimator._progress.step == 8
    assert not estimator.model_.training
    assert np.isfinite(estimator.predict(X)).all()


# -- what goes in and out -------------------------------------------------------------------------------------------


def test_labels_of_any_kind():
    X, y = classes()
    for labels in (y, y.astype(object), np.array([{"a": 3, "b": -1, "c": 7}[name] for name in y])):
        estimator = SparseMLPClassifier(**SMALL).fit(X, labels)
        assert list(estimator.classes_) == sorted(set(labels))
        assert set(estimator.predict(X)) <= set(labels)
        probability = estimator.predict_proba(X)
        np.testing.assert_allclose(probability.sum(1), 1.0, rtol=1e-12)
        np.testing.assert_array_equal(estimator.classes_[probability.argmax(1)], estimator.predict(X))
        np.testing.assert_allclose(estimator.predict_log_proba(X), np.log(probability))


def test_partial_fit_knows_classes_before_it_sees_them():
    X, y = classes()
    few = y != "c"
    estimator = SparseMLPClassifier(**SMALL).partial_fit(X[few], y[few], classes=["c", "b", "a"])
    assert list(estimator.classes_) == ["a", "b", "c"]
    assert estimator.partial_fit(X, y).predict_proba(X).shape == (150, 3)
    with pytest.raises(ValueError, match="not those of the first call"):
        estimator.partial_fit(X, y, classes=["a", "b"])
    with pytest.raises(ValueError, match="unseen"):
        estimator.partial_fit(X, np.full(150, "d"))
    with pytest.raises(ValueError, match="must name all classes"):
        SparseMLPClassifier().partial_fit(X, y)


@pytest.mark.parametrize(("outputs", "shape"), [(1, (150,)), (1, (150, 1)), (3, (150, 3))])
def test_predictions_have_the_shape_of_the_targets(outputs, shape):
    X, y = numbers(outputs=outputs)
    estimator = SparseMLPRegressor(**SMALL, learning_rate_init=0.02).set_params(max_iter=60).fit(X, y.reshape(shape))
    assert estimator.predict(X).shape == shape
    assert estimator.score(X, y.reshape(shape)) > 0.8


@pytest.mark.parametrize("kind", [sparse.csr_array, sparse.csc_matrix, sparse.coo_array])
def test_sparse_inputs_are_the_same_numbers(kind):
    X, y = classes()
    X = np.where(X > 0.5, X, np.float32(0.0))
    dense = SparseMLPClassifier(**MOVING).fit(X, y)
    estimator = SparseMLPClassifier(**MOVING).fit(kind(X), y)
    assert same(dense, estimator)
    np.testing.assert_array_equal(dense.predict_proba(X), estimator.predict_proba(kind(X)))


def test_more_samples_than_are_predicted_at_once():
    X, y = numbers(1200)
    estimator = SparseMLPRegressor(**SMALL).fit(X, y)
    with torch.no_grad():
        expected = estimator.model_(torch.from_numpy(X.astype(np.float32)))[:, 0]
    np.testing.assert_array_equal(estimator.predict(X), expected.double().numpy())


def test_pandas_gives_names():
    pandas = pytest.importorskip("pandas")
    X, y = classes()
    table = pandas.DataFrame(X, columns=[f"f{n}" for n in range(12)])
    estimator = SparseMLPClassifier(**SMALL).fit(table, pandas.Series(y))
    assert list(estimator.feature_names_in_) == list(table.columns)
    with pytest.raises(ValueError, match="feature names"):
        estimator.predict(table[table.columns[::-1]])


def test_it_comes_back_from_a_file_in_another_process(tmp_path):
    X, y = classes()
    pipeline = make_pipeline(StandardScaler(), SparseMLPClassifier(**MOVING)).fit(X, y)
    joblib.dump(pipeline, tmp_path / "pipeline")
    np.save(tmp_path / "X.npy", X)
    code = (
        "import joblib, numpy as np\n"
        "np.save('probability.npy', joblib.load('pipeline').predict_proba(np.load('X.npy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "probability.npy"), pipeline.predict_proba(X))


def test_a_fitted_estimator_carries_no_optimizer():
    X, y = classes()
    estimator = SparseMLPClassifier((200, 200), max_iter=3).fit(X, y)
    weights = sum(layer.weights for layer in layers(estimator))
    file = io.BytesIO()
    pickle.dump(estimator, file)
    assert file.tell() < 12 * weights + 30_000  # a place and a value each


def test_grid_search_in_a_pipeline():
    X, y = load_digits(return_X_y=True)
    pipeline = make_pipeline(MinMaxScaler(), SparseMLPClassifier((60,), max_iter=20, random_state=0))
    name = "sparsemlpclassifier__"
    grid = {name + "density": np.array([0.05, 0.4]), name + "learning_rate_init": np.array([1e-4, 1e-2], np.float32)}
    search = GridSearchCV(pipeline, grid, cv=2).fit(X[:600], y[:600])
    assert search.best_params_ == {name + "density": 0.4, name + "learning_rate_init": np.float32(1e-2)}
    assert search.score(X[600:], y[600:]) > 0.85


# -- the network ----------------------------------------------------------------------------------------------------


def test_nothing_dense_on_the_way():
    network = Network((60_000, 200_000, 10), "relu", 1e-5, 0.0)  # 48 GB as a dense float32 matrix
    model = network.build(0)
    assert density_of(model) == pytest.approx(1e-5)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("hidden", [(), 7, [7, 5]])
def test_every_activation_and_depth_learns(activation, hidden):
    X, y = numbers()
    estimator = SparseMLPRegressor(hidden, activation, density=1.0, learning_rate_init=0.05, random_state=0)
    assert estimator.fit(X, y).score(X, y) > 0.9


def test_full_density_learns_what_scikit_learns_does():
    X, y = classes(400)
    options = {"hidden_layer_sizes": (50,), "learning_rate_init": 0.01, "max_iter": 100, "random_state": 0}
    ours = SparseMLPClassifier(density=1.0, alpha=0.0, **options).fit(X, y)
    theirs = MLPClassifier(alpha=0.0, **options).fit(X, y)
    assert ours.loss_curve_[-1] == pytest.approx(theirs.loss_curve_[-1], abs=0.05)


def test_numpys_own_numbers_are_numbers():
    X, y = classes()
    options = {
        **{
            name: np.float32(0.25) for name in ("density", "rewire_fraction", "dropout", "alpha", "validation_fraction")
        },
        **{name: np.int64(3) for name in ("rewire_every", "batch_size", "max_iter", "n_iter_no_change")},
        "hidden_layer_sizes": np.array([8, 8]),
        "learning_rate_init": np.float32(0.01),
        "tol": np.float32(1e-3),
    }
    assert SparseMLPClassifier(**options, early_stopping=True).fit(X, y).n_iter_ == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_layer_sizes", (5, 0)),
        ("hidden_layer_sizes", "wide"),
        ("activation", "gelu"),
        ("density", 0.0),
        ("density", 1.5),
        ("rewire", None),
        ("rewire_fraction", 1.5),
        ("rewire_every", 0),
        ("dropout", 1.0),
        ("alpha", -1.0),
        ("batch_size", "all"),
        ("batch_size", 0),
        ("learning_rate_init", 0.0),
        ("max_iter", 0),
        ("max_iter", 2.5),
        ("tol", -1e-3),
        ("validation_fraction", 1.0),
        ("n_iter_no_change", 0),
        ("random_state", "lucky"),
    ],
)
def test_parameters_that_cannot_be_are_refused_when_fitting(name, value):
    X, y = classes()
    estimator = SparseMLPClassifier(**{name: value})
    expected = "seed" if name == "random_state" else name
    with pytest.raises((ValueError, TypeError), match=expected):
        estimator.fit(X, y)
    with pytest.raises((ValueError, TypeError), match=expected):
        estimator.partial_fit(X, y, classes=["a", "b", "c"])


def test_early_stopping_needs_something_to_score_on():
    X, y = numbers(8)
    with pytest.raises(ValueError, match="leaves 1 to score on"):
        SparseMLPRegressor(early_stopping=True).fit(X, y)


def test_without_scikit_learn_the_error_says_what_to_install():
    code = "import sys; sys.modules['sklearn'] = None; from noctule.estimators import SparseMLPClassifier"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'scikit-learn>=1.6'" in failed.stderr
