"""The common part of classifier and regressor: parameters, `fit` and `partial_fit`."""

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from contextlib import closing
from itertools import islice
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from noctule.core.optim import param_groups
from noctule.core.schedule import constant, cosine
from noctule.core.types import Schedule
from noctule.estimators.network import ACTIVATIONS, Network, density_of
from noctule.estimators.training import Progress, Samples, epochs, outputs
from noctule.sparse.rewire import Grow, Rewire, anywhere, guided, steepest

GROWERS: dict[str, Grow | None] = {"gse": guided, "rigl": steepest, "set": anywhere, "none": None}

_NUMBERS: dict[str, tuple[Any, float | None, float | None, str]] = {
    "density": (Real, 0, 1, "right"),
    "rewire_fraction": (Real, 0, 1, "both"),
    "rewire_every": (Integral, 1, None, "left"),
    "dropout": (Real, 0, 1, "left"),
    "alpha": (Real, 0, None, "left"),
    "learning_rate_init": (Real, 0, None, "neither"),
    "max_iter": (Integral, 1, None, "left"),
    "tol": (Real, 0, None, "left"),
    "validation_fraction": (Real, 0, 1, "neither"),
    "n_iter_no_change": (Real, 1, None, "left"),
}
"""Type, least and largest value of numeric parameters, and which of the two bounds are included."""


class SparseMLP(BaseEstimator, ABC):
    """A truly sparse multilayer perceptron with scikit-learn's parameters; classifier and regressor are final."""

    model_: nn.Sequential
    density_: float
    n_iter_: int
    loss_curve_: list[float]
    validation_scores_: list[float]

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
    ):
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.density = density
        self.rewire = rewire
        self.rewire_fraction = rewire_fraction
        self.rewire_every = rewire_every
        self.dropout = dropout
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change

    # -- overridden by classifier and regressor -------------------------------------------------------------------

    @abstractmethod
    def _read(self, X: Any, y: Any, *, fresh: bool, labels: Any) -> tuple[Samples, int]:
        """Check samples and return them with the number of outputs they need.

        With ``fresh``, store their form and the possible ``labels`` (by default the ones in ``y``); else compare them with the
        stored ones.
        """

    @abstractmethod
    def _loss(self, predicted: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """The mean loss of a batch, weighted."""

    @abstractmethod
    def _score(self, predicted: Tensor, samples: Samples) -> float:
        """The score of outputs, higher is better, equal to that of `score`."""

    def _total_weights(self, samples: Samples, weights: np.ndarray | None) -> np.ndarray | None:
        """The weight of each sample (n,), by default that of the caller."""
        return weights

    # -- the interface of scikit-learn ----------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on samples (n, features), dense or sparse, for ``max_iter`` epochs or until the score no longer improves.

        ``sample_weight`` (n,) weights samples in training and early stopping: 2 is the sample twice, 0 is none.

        Raises:
            ValueError: a parameter, the samples or the targets are invalid.
            NonFiniteError: the training diverged.
        """
        self._check()
        resumes = self.warm_start and hasattr(self, "model_")
        samples, held_out = self._begin(X, y, sample_weight, fresh=not resumes), None
        if self.early_stopping:
            samples, held_out = self._split(samples)
        self._progress.step, self._progress.moments = 0, {}
        self.n_iter_, idle, best, best_state = 0, 0, -math.inf, None
        until = max(1, self.max_iter * math.ceil(len(samples) / self._batch(samples)) * 3 // 4)
        fraction = cosine(self.rewire_fraction, end=0.0, steps=until)
        with self._epochs(samples, fraction, until) as losses:
            for loss in islice(losses, self.max_iter):
                self._note(loss)
                score = -loss
                if held_out is not None:
                    score = self._score(outputs(self.model_, held_out.inputs), held_out)
                    self.validation_scores_.append(score)
                    if score > best:
                        best_state = copy.deepcopy(self.model_.state_dict())
                idle = idle + 1 if score < best + self.tol else 0
                best = max(best, score)
                if idle > self.n_iter_no_change:
                    break
            else:
                warnings.warn(
                    f"max_iter={self.max_iter} epochs are over and the training has not converged yet",
                    ConvergenceWarning,
                    stacklevel=2,
                )
        if best_state is not None:
            self.model_.load_state_dict(best_state)
        self._progress.moments = {}
        return self

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    # -- common steps ---------------------------------------------------------------------------------------------

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any, labels: Any = None) -> Self:
        """Train one epoch, with the optimizer's state and the step count of the last one."""
        self._check()
        samples = self._begin(X, y, sample_weight, fresh=not hasattr(self, "model_"), labels=labels)
        with self._epochs(samples, constant(self.rewire_fraction), None) as losses:
            self._note(next(losses))
        return self

    def _begin(self, X: Any, y: Any, sample_weight: Any, *, fresh: bool, labels: Any = None) -> Samples:
        """Check the samples, and with ``fresh`` build a network for them."""
        samples, width = self._read(X, y, fresh=fresh, labels=labels)
        samples = samples.weighted(self._total_weights(samples, _checked_weights(sample_weight, samples)))
        widths = (samples.inputs.shape[1], *map(int, self._hidden), width)
        network = Network(widths, self.activation, float(self.density), float(self.dropout))
        if fresh:
            seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
            self._network, self._progress = network, Progress(seed)
            self.model_ = network.build(seed)
            self.density_ = density_of(self.model_)
            self.n_iter_, self.loss_curve_, self.validation_scores_ = 0, [], []
        elif network != self._network:
            raise ValueError(f"the fitted {self._network} cannot go on as {network}: fit it anew, without warm_start")
        return samples

    def _epochs(self, samples: Samples, fraction: Schedule, until: int | None) -> closing[Generator[float]]:
        """A context whose iterator trains an epoch for each mean loss it yields."""
        groups = param_groups(self.model_, weight_decay=float(self.alpha))
        optimizer = torch.optim.AdamW(groups, lr=float(self.learning_rate_init), fused=True)
        grow, rewire = GROWERS[self.rewire], None
        if grow is not None:
            seed = self._progress.seed
            rewire = Rewire(grow=grow, fraction=fraction, every=self.rewire_every, until=until, seed=seed)
        batch_size = self._batch(samples)
        return closing(
            epochs(
                self.model_,
                optimizer,
                samples,
                self._progress,
                loss_fn=self._loss,
                batch_size=batch_size,
                rewire=rewire,
            )
        )

    def _note(self, loss: float) -> None:
        self.n_iter_ += 1
        self.loss_curve_.append(loss)
        if self.verbose:
            print(f"epoch {self.n_iter_}: loss {loss:.6f}")

    def _batch(self, samples: Samples) -> int:
        return min(200 if self.batch_size == "auto" else int(self.batch_size), len(samples))

    def _split(self, samples: Samples) -> tuple[Samples, Samples]:
        """Split samples into a part for training and one for early stopping."""
        parts: list[Any] = train_test_split(
            np.arange(len(samples)),
            test_size=float(self.validation_fraction),
            random_state=self._progress.seed,
            stratify=None if samples.targets.is_floating_point() else samples.targets.numpy(),
        )
        chosen, held_out = (samples.take(rows) for rows in parts)
        if len(held_out) < 2:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} of {len(samples)} samples leaves {len(held_out)} to score on, "
                "and early stopping needs 2: raise it, or give more samples"
            )
        return chosen, held_out

    def _outputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return outputs(self.model_, validate_data(self, X, accept_sparse="csr", dtype=np.float32, reset=False))

    def _check(self) -> None:
        """Raise for invalid parameters."""
        for name, (kind, low, high, ends) in _NUMBERS.items():
            check_scalar(getattr(self, name), name, kind, min_val=low, max_val=high, include_boundaries=ends)
        for name, choices in (("activation", ACTIVATIONS), ("rewire", GROWERS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {sorted(choices)}, got {getattr(self, name)!r}")
        if self.batch_size != "auto":
            check_scalar(self.batch_size, "batch_size", Integral, min_val=1)
        for width in self._hidden:
            check_scalar(width, "hidden_layer_sizes", Integral, min_val=1)

    @property
    def _hidden(self) -> tuple[int, ...]:
        sizes = self.hidden_layer_sizes
        return tuple(sizes) if isinstance(sizes, Iterable) else (sizes,)


def _checked_weights(sample_weight: Any, samples: Samples) -> np.ndarray | None:
    """The caller's sample weights as (n,) of float64, or None."""
    if sample_weight is None:
        return None
    weights = np.asarray(_check_sample_weight(sample_weight, samples.inputs, dtype=np.float64))
    if (weights < 0).any():
        raise ValueError(
            f"Negative values in data passed to sample_weight: the least is {weights.min():g}, and 0 is no sample"
        )
    if not weights.any():
        raise ValueError(
            f"all {len(weights)} weights in sample_weight are zero: at least one sample must have a positive weight"
        )
    return weights
