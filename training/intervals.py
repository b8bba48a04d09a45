"""Metrics with 95 % intervals: a bootstrap over groups (patients), predictions of all folds and seeds pooled.

A group is drawn with all its clips and frames, in all seeds, because they are not independent. Every backbone of a
task sees the same draws, so differences between backbones are paired.
"""

from dataclasses import dataclass
from typing import Callable

import numpy as np
import sklearn
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
)

LEVEL = 0.95


@dataclass
class Estimate:
    """value: on all data. low, high: the interval. draws: float (n,), nan where a draw leaves it undefined."""

    value: float
    draws: np.ndarray

    @property
    def low(self) -> float:
        return _percentile(self.draws, (1 - LEVEL) / 2)

    @property
    def high(self) -> float:
        return _percentile(self.draws, (1 + LEVEL) / 2)

    @property
    def undefined(self) -> int:
        return int(np.isnan(self.draws).sum())

    def to_dict(self) -> dict:
        return {"value": self.value, "low": self.low, "high": self.high, "undefined_draws": self.undefined}

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.draws - other.draws)


def _percentile(draws: np.ndarray, q: float) -> float:
    draws = draws[~np.isnan(draws)]
    return float(np.quantile(draws, q)) if len(draws) else float("nan")


def verdict(difference: Estimate) -> str:
    """'better' or 'worse' only where the interval of the difference excludes 0."""
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "no difference shown"


def draw_groups(groups: int, draws: int, seed: int) -> np.ndarray:
    """How often each group is drawn, int (draws, groups): as many groups as there are, with replacement."""
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=draws)


def bootstrap(
    statistic: Callable[[np.ndarray], dict[str, float]], groups: int, draws: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """statistic: from the multiplicity of every group, int (groups,), to named values. The value itself is the
    statistic with every group once."""
    if groups < 2:
        raise ValueError(f"an interval over groups needs at least 2 groups, got {groups}")
    value = statistic(np.ones(groups, int))
    rows = [statistic(counts) for counts in draw_groups(groups, draws, seed)]
    return {key: Estimate(float(value[key]), np.array([row[key] for row in rows], float)) for key in value}


def classification(
    labels: np.ndarray,
    scores: np.ndarray,
    groups: np.ndarray,
    classes: tuple[str, ...],
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Accuracy, balanced accuracy, macro-F1, AUROC (one against the rest, macro) and per-class precision, recall, F1.

    labels: int (N,); scores: float (N, classes), rows summing to 1; groups: (N,). Rows of several seeds are simply
    concatenated. A draw without one of the classes has no value. Class c's precision is 0 if c is never predicted.
    """
    k = len(classes)
    _, group = np.unique(groups, return_inverse=True)
    n = group.max() + 1
    # metrics of counts are computed by scikit-learn on the k * k cells, weighted: the same numbers, much faster
    cells = np.stack(
        [confusion_matrix(labels[group == g], scores[group == g].argmax(1), labels=range(k)) for g in range(n)]
    )
    true, predicted = (axis.ravel() for axis in np.indices((k, k)))
    scores = scores / scores.sum(1, keepdims=True)

    def statistic(counts):
        weight = np.tensordot(counts, cells, 1).ravel()
        if (weight.reshape(k, k).sum(1) == 0).any():
            return dict.fromkeys(names, float("nan"))
        precision, recall, f1, _ = precision_recall_fscore_support(
            true, predicted, labels=range(k), sample_weight=weight, zero_division=0
        )
        drawn = counts[group]
        kept = drawn > 0
        auroc = roc_auc_score(
            labels[kept],
            scores[kept] if k > 2 else scores[kept, 1],
            sample_weight=drawn[kept],
            multi_class="ovr",
            labels=range(k) if k > 2 else None,
        )
        return dict(
            zip(
                names,
                (
                    accuracy_score(true, predicted, sample_weight=weight),
                    balanced_accuracy_score(true, predicted, sample_weight=weight),
                    f1.mean(),
                    auroc,
                    *precision,
                    *recall,
                    *f1,
                ),
            )
        )

    names = [
        "accuracy",
        "balanced accuracy",
        "macro-F1",
        "AUROC",
        *(f"{metric} {name}" for metric in ("precision", "recall", "F1") for name in classes),
    ]
    with sklearn.config_context(skip_parameter_validation=True, assume_finite=True):
        return bootstrap(statistic, n, draws, seed)


def mean_of_rows(
    values: dict[str, np.ndarray], groups: np.ndarray, draws: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Means over images of per-image values, float (N,) each, with a bootstrap over groups."""
    _, group = np.unique(groups, return_inverse=True)

    def statistic(counts):
        return {key: float(np.average(value, weights=counts[group])) for key, value in values.items()}

    return bootstrap(statistic, group.max() + 1, draws, seed)
