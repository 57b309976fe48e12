"""How does scikit-learn use it? Sparse multilayer perceptrons as estimators for pipelines and searches."""

try:
    from sklearn.utils.validation import validate_data as _since_1_6  # noqa: F401
except ImportError as error:
    raise ImportError(
        "noctule.estimators needs scikit-learn 1.6 or newer, which is missing: pip install 'scikit-learn>=1.6'"
    ) from error

from noctule.estimators.classifier import SparseMLPClassifier
from noctule.estimators.regressor import SparseMLPRegressor

__all__ = ["SparseMLPClassifier", "SparseMLPRegressor"]
