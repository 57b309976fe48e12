"""The regressor for scikit-learn."""

from typing import Any, Self

import numpy as np
import torch
from sklearn.base import MultiOutputMixin, RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data
from torch import Tensor
from typing_extensions import override

from noctule.estimators.base import SparseMLP
from noctule.estimators.training import Samples, mean


class SparseMLPRegressor(MultiOutputMixin, RegressorMixin, SparseMLP):
    """A truly sparse multilayer perceptron that predicts numbers: scikit-learn's `MLPRegressor` in time and memory O(weights).

    It minimises half the squared error with AdamW, in single precision. Inputs and targets should be scaled: put a
    `StandardScaler` before it, and a `TransformedTargetRegressor` round it where targets are far from 0 .. 1.

    Its parameters are those of `SparseMLPClassifier`. Targets of shape (n,) or (n, outputs) give predictions of the same shape.

    Attributes:
        model_: the network, an `nn.Module` from inputs to predictions, in evaluation mode.
        density_: stored weights over the places of a dense network.
        n_iter_: epochs since the last `fit` began.
        loss_curve_: mean training loss of every epoch.
        validation_scores_: the coefficient of determination after every epoch, with early stopping.
        n_features_in_, feature_names_in_: of the inputs.

    >>> X = np.random.default_rng(0).normal(size=(500, 20))
    >>> model = SparseMLPRegressor((100, 100), early_stopping=True, random_state=0).fit(X, np.sin(X[:, :2]))
    >>> model.predict(X[:5]).shape
    (5, 2)
    """

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train for one epoch on a part of the data, weighted by ``sample_weight`` (n,)."""
        return self._partial_fit(X, y, sample_weight)

    def predict(self, X: Any) -> np.ndarray:
        """The predictions, (n,) or (n, outputs) as the targets in training."""
        predicted = self._outputs(X).numpy()
        return predicted[:, 0] if self._single else predicted

    @override
    def _read(self, X: Any, y: Any, *, fresh: bool, labels: Any) -> tuple[Samples, int]:
        X, y = validate_data(
            self, X, y, accept_sparse="csr", dtype=np.float32, multi_output=True, y_numeric=True, reset=fresh
        )
        y = check_array(y, dtype="float32", ensure_2d=False, input_name="y")
        if fresh:
            self._single = y.ndim == 1
        targets = torch.from_numpy(y.reshape(len(y), -1))
        return Samples(X, targets), targets.shape[1]

    @override
    def _loss(self, predicted: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        return mean((predicted - targets).square().mean(1), weights) / 2

    @override
    def _score(self, predicted: Tensor, samples: Samples) -> float:
        weights = None if samples.weights is None else samples.weights.numpy()
        return float(r2_score(samples.targets.numpy(), predicted.numpy(), sample_weight=weights))
