"""scikit-learn's own checks, all of them."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from noctule.estimators import SparseMLPClassifier, SparseMLPRegressor

KINDS = (SparseMLPClassifier, SparseMLPRegressor)
SHORT = {"hidden_layer_sizes": (30,), "density": 0.3, "learning_rate_init": 0.05, "max_iter": 15}

SINGLE_PRECISION = {
    f"check_sample_weight_equivalence_on_{kind}_data": "a sample of weight 2 and the same twice differ by a rounding in single "
    "precision, 1e-7, which the check allows in double: tests/estimators/test_estimators_weights.py has the law"
    for kind in ("dense", "sparse")
}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@parametrize_with_checks([kind(**SHORT) for kind in KINDS], expected_failed_checks=lambda _: SINGLE_PRECISION)
def test_scikit_learns_checks_on_short_trainings(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks(
    [
        *(kind() for kind in KINDS),
        *(kind(**SHORT, dropout=0.2, rewire="rigl", rewire_every=5) for kind in KINDS),
        *(kind(**SHORT, early_stopping=True, validation_fraction=0.5, activation="tanh") for kind in KINDS),
    ],
    expected_failed_checks=lambda _: SINGLE_PRECISION,
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)
