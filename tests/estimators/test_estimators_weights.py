"""Laws of weighted samples and classes, and of several labels a sample."""

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn import config_context
from sklearn.datasets import make_classification, make_multilabel_classification, make_regression
from sklearn.ensemble import AdaBoostClassifier, BaggingClassifier, BaggingRegressor
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from noctule.estimators import SparseMLPClassifier, SparseMLPRegressor
from noctule.sparse.layers import SparseLinear

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

SMALL = {"hidden_layer_sizes": (20,), "density": 0.3, "max_iter": 4, "random_state": 0}
KINDS = (SparseMLPClassifier, SparseMLPRegressor)


def data(kind, samples: int = 60):
    make = make_classification if kind is SparseMLPClassifier else make_regression
    X, y = make(samples, 8, n_informative=5, random_state=1)
    return X.astype(np.float32), y if kind is SparseMLPClassifier else (y / y.std()).astype(np.float32)


def state(estimator) -> list[torch.Tensor]:
    layers = [m for m in estimator.model_ if isinstance(m, SparseLinear)]
    return [t for m in layers for t in (m.topology.keys(), m.values.detach(), m.bias.detach())]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(state(a), state(b), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.3, 1e-6])
def test_weights_that_are_all_equal_are_none(kind, early, weight):
    X, y = data(kind)
    options = {**SMALL, "batch_size": 16, "rewire_every": 2, "dropout": 0.2, "early_stopping": early}
    plain = kind(**options).fit(X, y)
    weighted = kind(**options).fit(X, y, sample_weight=np.full(60, weight))
    assert same(plain, weighted)
    assert plain.loss_curve_ == weighted.loss_curve_
    assert plain.validation_scores_ == weighted.validation_scores_
    parts = [kind(**SMALL) for _ in range(2)]
    extra = {"classes": [0, 1]} if kind is SparseMLPClassifier else {}
    parts[0].partial_fit(X, y, **extra)
    parts[1].partial_fit(X, y, **extra, sample_weight=[weight] * 60)
    assert same(*parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("container", [np.asarray, sparse.csr_matrix])
def test_a_sample_of_weight_0_is_absent(kind, early, container):
    X, y = data(kind)
    junk = np.full((5, 8), 1e6, np.float32)
    options = {**SMALL, "batch_size": 16, "rewire_every": 2, "dropout": 0.2, "early_stopping": early}
    weights = np.random.default_rng(0).uniform(0.5, 2, 60)
    for own in (weights, np.ones(60)):
        plain = kind(**options).fit(container(X), y, sample_weight=own)
        both = container(np.concatenate([X[:30], junk, X[30:]]))
        zeros = kind(**options).fit(
            both, np.r_[y[:30], y[:5], y[30:]], sample_weight=np.r_[own[:30], [0] * 5, own[30:]]
        )
        assert same(plain, zeros)
        assert plain.loss_curve_ == zeros.loss_curve_
        assert plain.validation_scores_ == zeros.validation_scores_


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_weight_2_is_the_sample_twice(kind):
    X, y = data(kind)
    times = np.random.default_rng(0).integers(1, 4, 60)
    options = {**SMALL, "batch_size": 1000, "rewire": "none", "max_iter": 1}
    weighted = kind(**options).fit(X, y, sample_weight=times)
    repeated = kind(**options).fit(X.repeat(times, 0), y.repeat(times))
    assert weighted.loss_curve_ == pytest.approx(repeated.loss_curve_, rel=1e-6)
    unlike = kind(**options).fit(X, y)
    assert unlike.loss_curve_ != pytest.approx(repeated.loss_curve_, rel=1e-3)
    samples, _ = unlike._read(X, y, fresh=False, labels=None)
    unlike.model_.train()

    def gradients(chosen):
        chosen = chosen.balanced()
        unlike.model_.zero_grad()
        unlike._loss(unlike.model_(chosen.dense()), chosen.targets, chosen.weights).backward()
        return [p.grad.clone() for p in unlike.model_.parameters()]

    rows = np.arange(60).repeat(times)
    for a, b in zip(gradients(samples.weighted(times.astype(float))), gradients(samples.take(rows)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_early_stopping_scores_with_the_weights(kind):
    X, y = data(kind, 200)
    weights = np.random.default_rng(0).uniform(0, 5, 200)
    model = kind(**{**SMALL, "max_iter": 1}, early_stopping=True, validation_fraction=0.5).fit(
        X, y, sample_weight=weights
    )
    samples, _ = model._read(X, y, fresh=False, labels=None)
    _, held_out = model._split(samples.weighted(weights))
    expected = model.score(held_out.inputs, held_out.targets.numpy(), sample_weight=held_out.weights.numpy())
    assert model.validation_scores_ == pytest.approx([expected])
    assert model.validation_scores_ != pytest.approx([model.score(held_out.inputs, held_out.targets.numpy())])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0] * 59, "sample_weight"),
        (np.ones((60, 2)), "1D"),
        ([np.nan] + [1.0] * 59, "NaN"),
        ([-1.0] + [1.0] * 59, "Negative"),
        ([0.0] * 60, "zero"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_cannot_be_are_refused(kind, weights, message):
    X, y = data(kind)
    with pytest.raises(ValueError, match=message):
        kind(**SMALL).fit(X, y, sample_weight=weights)


# -- classes --------------------------------------------------------------------------------------------------------


def test_class_weights_are_sample_weights():
    X, y = data(SparseMLPClassifier)
    y = np.array(["no", "yes"])[(np.arange(60) < 15).astype(int)]
    own = np.random.default_rng(0).uniform(0.5, 2, 60)
    expected = SparseMLPClassifier(**SMALL).fit(X, y, sample_weight=own * np.where(y == "yes", 3.0, 1.0))
    assert same(SparseMLPClassifier(**SMALL, class_weight={"yes": 3}).fit(X, y, sample_weight=own), expected)
    for weights in (None, own):
        counts = {label: (np.ones(60) if weights is None else weights)[y == label].sum() for label in ("no", "yes")}
        balanced = SparseMLPClassifier(**SMALL, class_weight="balanced").fit(X, y, sample_weight=weights)
        by_hand = {label: sum(counts.values()) / 2 / count for label, count in counts.items()}
        assert same(SparseMLPClassifier(**SMALL, class_weight=by_hand).fit(X, y, sample_weight=weights), balanced)
    assert not same(SparseMLPClassifier(**SMALL).fit(X, y), balanced)


def test_a_rare_class_is_found_where_it_counts_more():
    X, y = make_classification(400, 8, n_informative=5, weights=[0.93], flip_y=0, random_state=3)
    options = {**SMALL, "max_iter": 30, "learning_rate_init": 0.01}
    found = [SparseMLPClassifier(**options, class_weight=w).fit(X, y).predict(X).mean() for w in (None, "balanced")]
    assert found[0] < found[1]


def test_class_weights_that_cannot_be_are_refused():
    X, y = data(SparseMLPClassifier)
    for weights, message in (
        ("balance", "None, 'balanced' or a dict"),
        ({7: 1.0}, r"names \[7\]"),
        ({0: -1.0}, "at least 0"),
        ({0: np.inf}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseMLPClassifier(**SMALL, class_weight=weights).fit(X, y)
    with pytest.raises(ValueError, match="needs all labels at once"):
        SparseMLPClassifier(**SMALL, class_weight="balanced").partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match="one label a sample"):
        SparseMLPClassifier(**SMALL, class_weight={0: 2}).fit(X, np.c_[y, y])
    SparseMLPClassifier(**SMALL, class_weight={0: 2.0}).partial_fit(X, y, classes=[0, 1])


# -- in other estimators --------------------------------------------------------------------------------------------


def test_ensembles_that_weigh_samples_work():
    X, y = data(SparseMLPClassifier)
    model = SparseMLPClassifier(**{**SMALL, "max_iter": 20}, learning_rate_init=0.02)
    assert BaggingClassifier(model, 3, random_state=0).fit(X, y).score(X, y) > 0.7
    assert AdaBoostClassifier(model, n_estimators=3, random_state=0).fit(X, y).score(X, y) > 0.7
    X, y = data(SparseMLPRegressor)
    BaggingRegressor(SparseMLPRegressor(**SMALL), 3, random_state=0).fit(X, y).predict(X)


def test_weights_are_routed_through_pipelines_and_searches():
    X, y = data(SparseMLPClassifier)
    weights = np.random.default_rng(0).uniform(0.5, 2, 60)
    alone = SparseMLPClassifier(**SMALL).fit(StandardScaler().fit_transform(X), y, sample_weight=weights)
    pipeline = make_pipeline(StandardScaler(), SparseMLPClassifier(**SMALL))
    assert same(pipeline.fit(X, y, sparsemlpclassifier__sample_weight=weights)[-1], alone)
    with config_context(enable_metadata_routing=True):
        model = SparseMLPClassifier(**SMALL).set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        search = GridSearchCV(model, {"density": [0.3]}, cv=2).fit(X, y, sample_weight=weights)
        plain = GridSearchCV(SparseMLPClassifier(**SMALL), {"density": [0.3]}, cv=2).fit(X, y)
    assert same(search.best_estimator_, SparseMLPClassifier(**SMALL).fit(X, y, sample_weight=weights))
    assert not same(search.best_estimator_, plain.best_estimator_)


# -- labels ---------------------------------------------------------------------------------------------------------


def test_a_sample_may_have_several_labels():
    X, y = make_multilabel_classification(300, 10, n_classes=3, random_state=0)
    X = StandardScaler().fit_transform(X)
    options = {**SMALL, "hidden_layer_sizes": (60,), "max_iter": 60, "learning_rate_init": 0.01}
    model = SparseMLPClassifier(**options).fit(X, y)
    predicted, probability = model.predict(X), model.predict_proba(X)
    assert predicted.shape == probability.shape == (300, 3)
    assert np.array_equal(predicted, probability > 0.5)
    np.testing.assert_allclose(model.predict_log_proba(X), np.log(probability), rtol=1e-5)
    assert model.classes_.tolist() == [0, 1, 2]
    assert model.score(X, y) == accuracy_score(y, predicted) > 0.6
    assert same(model, SparseMLPClassifier(**options).fit(X, sparse.csr_matrix(y)))
    early = SparseMLPClassifier(**options, early_stopping=True).fit(X, y)
    assert max(early.validation_scores_) > 0.4
    part = SparseMLPClassifier(**options).partial_fit(X, y, classes=[0, 1, 2], sample_weight=np.arange(1, 301))
    assert part.predict(X).shape == (300, 3)
    with pytest.raises(ValueError, match="not what this classifier was fitted to"):
        part.partial_fit(X, y[:, :2])
    with pytest.raises(ValueError, match="numbers of the 3 columns"):
        SparseMLPClassifier(**options).partial_fit(X, y, classes=[0, 1])


def test_a_table_of_classes_is_for_a_network_each():
    X, y = data(SparseMLPClassifier)
    table = np.c_[y, np.arange(60) % 3]
    with pytest.raises(ValueError, match="MultiOutputClassifier"):
        SparseMLPClassifier(**SMALL).fit(X, table)
    assert MultiOutputClassifier(SparseMLPClassifier(**SMALL)).fit(X, table).predict(X).shape == (60, 2)


def test_one_class_and_labels_that_are_floats():
    X, y = data(SparseMLPClassifier)
    assert set(SparseMLPClassifier(**SMALL).fit(X, np.full(60, "a")).predict(X)) == {"a"}
    model = SparseMLPClassifier(**SMALL).fit(X, y.astype(float), sample_weight=y + 0.0)
    assert model.classes_.dtype == float
    assert set(model.predict(X)) <= {0.0, 1.0}
