"""The classifier for scikit-learn."""

from typing import Any, Self

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import ClassifierMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import validate_data
from torch import Tensor, nn
from typing_extensions import override

from noctule.estimators.base import SparseMLP
from noctule.estimators.training import Samples, mean


class SparseMLPClassifier(ClassifierMixin, SparseMLP):
    """A truly sparse multilayer perceptron that classifies: scikit-learn's `MLPClassifier` in time and memory O(weights).

    It minimises the cross-entropy with AdamW, in single precision. Inputs should be scaled, as with any multilayer perceptron:
    put a `StandardScaler` before it. A label is anything that sorts, binary or of many classes; a table of zeros and ones
    (n, labels) marks the labels of each sample (multilabel).

    Args:
        hidden_layer_sizes: neurons of each hidden layer.
        activation: after each hidden layer: relu, all_relu (arXiv 2102.01732), tanh, logistic or identity.
        density: share of the weights of a dense network that is stored, allotted to the layers by Erdos-Renyi, in (0, 1].
        rewire: how connections move while it learns: guided (gse), steepest gradient (rigl), random (set), or not at all (none).
        rewire_fraction: of the connections that move each time; in `fit` it falls along a cosine, to zero at three quarters of
            ``max_iter``.
        rewire_every: steps from one move to the next.
        dropout: after each hidden layer.
        alpha: weight decay, times the learning rate and decoupled from the loss (AdamW), unlike the penalty of scikit-learn's MLP.
        batch_size: samples in a step; auto is 200, or all where there are fewer.
        learning_rate_init: of AdamW, constant.
        max_iter: epochs at most.
        random_state: source of the seed of weights, places, data order, dropout and split; torch's global generator does not
            change.
        tol: least difference of scores that is an improvement.
        verbose: print the loss of every epoch.
        warm_start: a further `fit` starts from the weights and connections of the last.
        early_stopping: hold out ``validation_fraction`` of the samples, stop when the score on them no longer improves, and keep
            the best epoch; else the training loss decides when to stop. `partial_fit` does neither.
        validation_fraction: of the samples, for early stopping.
        n_iter_no_change: epochs without an improvement before it stops.
        class_weight: factor of the ``sample_weight`` of a class: a dict from label to weight, by default 1, or balanced, so that
            all classes have the same total weight in a `fit`; not for multilabel.

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

    def __init__(
        self,
        hidden_layer_sizes=(100,),
        activation="relu",
        *,
        density=0.1,
        rewire="gse",
        rewire_fraction=0.3,
        rewire_every=100,
        dropout=0.0,
        alpha=0.01,
        batch_size="auto",
        learning_rate_init=0.002,
        max_iter=200,
        random_state=None,
        tol=1e-4,
        verbose=False,
        warm_start=False,
        early_stopping=False,
        validation_fraction=0.1,
        n_iter_no_change=10,
        class_weight=None,
    ):
        super().__init__(
            hidden_layer_sizes,
            activation,
            density=density,
            rewire=rewire,
            rewire_fraction=rewire_fraction,
            rewire_every=rewire_every,
            dropout=dropout,
            alpha=alpha,
            batch_size=batch_size,
            learning_rate_init=learning_rate_init,
            max_iter=max_iter,
            random_state=random_state,
            tol=tol,
            verbose=verbose,
            warm_start=warm_start,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
        )
        self.class_weight = class_weight

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Train for one epoch on a part of the data, weighted by ``sample_weight`` (n,).

        The first call names all ``classes`` that will come: the labels, or the numbers of the columns of a multilabel table.
        """
        first = not hasattr(self, "model_")
        if first and classes is None:
            raise ValueError("the first call of partial_fit must name all classes that will come: classes=...")
        if not first and classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(f"classes={classes!r} are not those of the first call, {self.classes_!r}: leave them out")
        if isinstance(self.class_weight, str):
            raise ValueError(
                "class_weight='balanced' needs all labels at once, and partial_fit sees a part: give the weights as a dict, as "
                "sklearn.utils.class_weight.compute_class_weight computes them"
            )
        return self._partial_fit(X, y, sample_weight, classes)

    def predict(self, X: Any) -> np.ndarray:
        """The label of each sample (n,), or zeros and ones (n, labels)."""
        predicted = self._outputs(X)
        if self._encoder is None:
            return (predicted > 0).long().numpy()
        return self.classes_[predicted.argmax(1).numpy()]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each label, in the order of ``classes_``: (n, classes)."""
        predicted = self._outputs(X)
        return (predicted.sigmoid() if self._encoder is None else predicted.softmax(1)).numpy()

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """The logarithm of `predict_proba`, finite also where the probability underflows."""
        predicted = self._outputs(X)
        return (nn.functional.logsigmoid(predicted) if self._encoder is None else predicted.log_softmax(1)).numpy()

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    @override
    def _read(self, X: Any, y: Any, *, fresh: bool, labels: Any) -> tuple[Samples, int]:
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float32, multi_output=True, reset=fresh)
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y")
        if kind == "multiclass-multioutput":
            raise ValueError(
                f"y has {y.shape[1]} columns of labels: one label a sample, or a table of zeros and ones, can be learnt; "
                "MultiOutputClassifier trains a network for each column"
            )
        many = kind == "multilabel-indicator"
        y = (y.toarray() if issparse(y) else y) if many else column_or_1d(y, warn=True)
        if fresh:
            self._encoder = None if many else LabelEncoder().fit(y if labels is None else labels)
            self.classes_ = np.arange(y.shape[1]) if self._encoder is None else np.asarray(self._encoder.classes_)
            if many and labels is not None and not np.array_equal(np.unique(labels), self.classes_):
                raise ValueError(f"classes={labels!r} are not the numbers of the {len(self.classes_)} columns of y")
        if many != (self._encoder is None) or (many and y.shape[1] != len(self.classes_)):
            raise ValueError(
                f"y is {kind} of shape {y.shape}, which is not what this classifier was fitted to: fit it anew"
            )
        if self._encoder is None:
            return Samples(X, torch.from_numpy(y.astype(np.float32))), y.shape[1]
        return Samples(X, torch.from_numpy(self._encoder.transform(y))), len(self.classes_)

    @override
    def _total_weights(self, samples: Samples, weights: np.ndarray | None) -> np.ndarray | None:
        if self.class_weight is None:
            return weights
        if self._encoder is None:
            raise ValueError("class_weight is for one label a sample, and y is a table of labels: give sample_weight")
        targets = samples.targets.numpy()
        if isinstance(self.class_weight, str):
            counts = np.bincount(targets, weights, len(self.classes_))
            there = counts > 0
            of_class = counts.sum() / there.sum() / np.where(there, counts, 1)
        else:
            unknown = [label for label in self.class_weight if label not in self.classes_]
            if unknown:
                raise ValueError(f"class_weight names {unknown}, which are none of the labels {self.classes_.tolist()}")
            of_class = np.array([float(self.class_weight.get(label, 1.0)) for label in self.classes_.tolist()])
            if not (np.isfinite(of_class).all() and (of_class >= 0).all()):
                raise ValueError(
                    f"weights of classes must be numbers of at least 0, got class_weight={self.class_weight!r}"
                )
        return of_class[targets] * (1.0 if weights is None else weights)

    @override
    def _check(self) -> None:
        super()._check()
        given = self.class_weight
        if not (given is None or given == "balanced" or isinstance(given, dict)):
            raise ValueError(f"class_weight must be None, 'balanced' or a dict from label to weight, got {given!r}")

    @override
    def _loss(self, predicted: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        if targets.is_floating_point():
            losses = nn.functional.binary_cross_entropy_with_logits(predicted, targets, reduction="none").mean(1)
        else:
            losses = nn.functional.cross_entropy(predicted, targets, reduction="none")
        return mean(losses, weights)

    @override
    def _score(self, predicted: Tensor, samples: Samples) -> float:
        targets = samples.targets
        right = ((predicted > 0) == targets).all(1) if targets.is_floating_point() else predicted.argmax(1) == targets
        return float(np.average(right.numpy(), weights=None if samples.weights is None else samples.weights.numpy()))
