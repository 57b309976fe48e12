"""The sparse classifier."""

from typing import Any, Self

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data
from torch import Tensor, nn

from noctule.estimators.base import SparseMLP
from noctule.estimators.training import Samples


class SparseMLPClassifier(ClassifierMixin, SparseMLP):
    """A truly sparse multilayer perceptron that classifies: scikit-learn's `MLPClassifier` in time and memory O(weights).

    It minimises the cross-entropy with AdamW, in single precision. Inputs should be scaled, as with any multilayer perceptron:
    put a `StandardScaler` before it. A label is anything that sorts, binary or of many classes.

    Args:
        hidden_layer_sizes: neurons of each hidden layer.
        activation: after each hidden layer: relu, all_relu (arXiv 2102.01732), tanh, logistic or identity.
        density: share of the places that holds a weight, shared out over the layers by Erdos-Renyi, in (0, 1].
        rewire: how connections move while it learns: guided (gse), steepest gradient (rigl), random (set), or not at all (none).
        rewire_fraction: of the connections that move each time; in `fit` it falls along a cosine, to zero at three quarters of
            ``max_iter``.
        rewire_every: steps from one move to the next.
        dropout: after each hidden layer.
        alpha: weight decay, times the learning rate and apart from the loss (AdamW), unlike the penalty of scikit-learn's MLP.
        batch_size: samples in a step; auto is 200, or all where there are fewer.
        learning_rate_init: of AdamW; it stays what it is.
        max_iter: epochs at most.
        random_state: where the seed of weights, places, data order, dropout and split comes from; torch's global generator is
            left as it was.
        tol: what counts as an improvement.
        verbose: print the loss of every epoch.
        warm_start: a further `fit` goes on from the weights and connections of the last.
        early_stopping: hold out ``validation_fraction`` of the samples, stop when the score on them no longer improves, and keep
            the epoch that scored best; else the training loss says when to stop. `partial_fit` does without either.
        validation_fraction: of the samples, for early stopping.
        n_iter_no_change: epochs without an improvement before it stops.

    Attributes:
        model_: the network, an `nn.Module` from inputs to logits, in evaluation mode.
        density_: stored weights over the places of a dense network.
        classes_: the labels, sorted.
        n_iter_: epochs since the last `fit` began.
        loss_curve_: mean training loss of every epoch.
        validation_scores_: accuracy after every epoch, with early stopping.
        n_features_in_, feature_names_in_: of the inputs.

    >>> from sklearn.datasets import load_digits
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> X, y = load_digits(return_X_y=True)
    >>> model = SparseMLPClassifier((256, 256), early_stopping=True, random_state=0)
    >>> pipeline = make_pipeline(StandardScaler(), model).fit(X[:1000], y[:1000])
    >>> pipeline.score(X[1000:], y[1000:]) > 0.9
    True
    """

    classes_: np.ndarray

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Train for one epoch on a part of the data; the first call names all ``classes`` that will come."""
        first = not hasattr(self, "model_")
        if first and classes is None:
            raise ValueError("the first call of partial_fit must name all classes that will come: classes=...")
        if not first and classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(f"classes={classes!r} are not those of the first call, {self.classes_!r}: leave them out")
        return self._partial_fit(X, y, classes)

    def predict(self, X: Any) -> np.ndarray:
        """The label of each sample (n,)."""
        predicted = self._outputs(X)
        return self.classes_[predicted.argmax(1).numpy()]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each label, in the order of ``classes_``: (n, classes)."""
        return self._outputs(X).softmax(1).numpy()

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Its logarithm, finite where the probability itself is too small for a number."""
        return self._outputs(X).log_softmax(1).numpy()

    def _read(self, X: Any, y: Any, *, fresh: bool, labels: Any) -> tuple[Samples, int]:
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float32, reset=fresh)
        check_classification_targets(y)
        if fresh:
            self._encoder = LabelEncoder().fit(y if labels is None else labels)
            self.classes_ = np.asarray(self._encoder.classes_)
        return Samples(X, torch.from_numpy(self._encoder.transform(y))), len(self.classes_)

    def _loss(self, predicted: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(predicted, targets)

    def _rate(self, predicted: Tensor, targets: Tensor) -> float:
        return float((predicted.argmax(1) == targets).double().mean())
