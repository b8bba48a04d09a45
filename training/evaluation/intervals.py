"""Metrics with 95 % intervals: a bootstrap over groups (patients), predictions of all folds and seeds pooled.

A group is drawn with all its clips and frames, in all seeds, because they are not independent. Every backbone of a
task sees the same draws, so differences between backbones are paired. Values are scikit-learn's; the draws are the
same metrics for all draws at once (1000 draws of 7000 frames: 0.2 s of CPU time instead of 16 s).
"""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

LEVEL = 0.95


@dataclass
class Estimate:
    """value: on all data. draws: float (n,), nan where a draw leaves it undefined. low, high: the interval."""

    value: float
    draws: np.ndarray

    @property
    def low(self) -> float:
        return _percentile(self.draws, (1 - LEVEL) / 2)

    @property
    def high(self) -> float:
        return _percentile(self.draws, (1 + LEVEL) / 2)

    def to_dict(self) -> dict:
        undefined = int(np.isnan(self.draws).sum())
        return {"value": float(self.value), "low": self.low, "high": self.high, "undefined_draws": undefined}

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.draws - other.draws)


def _percentile(draws: np.ndarray, q: float) -> float:
    draws = draws[~np.isnan(draws)]
    return float(np.quantile(draws, q)) if len(draws) else float("nan")


def verdict(difference: Estimate, lower_is_better: bool = False) -> str:
    """'better' or 'worse' only where the interval of the difference excludes 0."""
    if difference.low > 0:
        return "worse" if lower_is_better else "better"
    if difference.high < 0:
        return "better" if lower_is_better else "worse"
    return "no difference shown"


def draw_groups(groups: int, draws: int, seed: int) -> np.ndarray:
    """How often each group is drawn, int (draws, groups): as many groups as there are, with replacement."""
    if groups < 2:
        raise ValueError(f"an interval over groups needs at least 2 groups, got {groups}")
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=draws)


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
    concatenated. A draw without one of the classes has no value. A class that is never predicted has precision 0.
    """
    k = len(classes)
    predicted = scores.argmax(1)
    values = [
        accuracy_score(labels, predicted),
        balanced_accuracy_score(labels, predicted),
        *precision_recall_fscore_support(labels, predicted, labels=range(k), average="macro", zero_division=0)[2:3],
        roc_auc_score(labels, scores if k > 2 else scores[:, 1], multi_class="ovr"),
        *np.concatenate(precision_recall_fscore_support(labels, predicted, labels=range(k), zero_division=0)[:3]),
    ]
    names = ["accuracy", "balanced accuracy", "macro-F1", "AUROC"]
    names += [f"{metric} {name}" for metric in ("precision", "recall", "F1") for name in classes]
    _, group = np.unique(groups, return_inverse=True)
    counts = draw_groups(group.max() + 1, draws, seed)
    return {
        name: Estimate(value, drawn)
        for name, value, drawn in zip(names, values, resampled(labels, scores, group, counts), strict=True)
    }


def resampled(labels: np.ndarray, scores: np.ndarray, group: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The metrics of `classification` with group g counted counts[:, g] times, float (4 + 3 * classes, draws).

    labels, group: int (N,); scores: float (N, classes); counts: int (draws, groups).
    """
    k = scores.shape[1]
    cells = np.zeros((counts.shape[1], k, k))
    np.add.at(cells, (group, labels, scores.argmax(1)), 1)
    confusion = np.tensordot(counts, cells, 1)  # (draws, label, prediction)
    hits, true, said = np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(2), confusion.sum(1)
    recall, f1 = hits / np.maximum(true, 1), 2 * hits / np.maximum(true + said, 1)
    precision = hits / np.maximum(said, 1)
    area = np.mean([auroc(labels == c, scores[:, c], group, counts) for c in range(k) if k > 2 or c == 1], axis=0)
    rows = [hits.sum(1) / true.sum(1), recall.mean(1), f1.mean(1), area, *precision.T, *recall.T, *f1.T]
    return np.where((true > 0).all(1), rows, np.nan)


def auroc(positive: np.ndarray, score: np.ndarray, group: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Area under the ROC of every draw, float (draws,): the share of (positive, negative) pairs in order, ties half.

    Pairs are counted once for every two groups; a draw then only weights those counts.
    """
    groups = counts.shape[1]
    pairs = np.zeros((groups, groups))
    for g in range(groups):
        negative = np.sort(score[~positive & (group == g)])
        below = [np.searchsorted(negative, score[positive], side) for side in ("left", "right")]
        pairs[:, g] = np.bincount(group[positive], np.mean(below, axis=0), groups)
    of_class, rest = (counts @ np.bincount(group[part], minlength=groups) for part in (positive, ~positive))
    return np.einsum("dg,dg->d", counts @ pairs, counts) / np.maximum(of_class * rest, 1)


def mean_of_rows(
    values: dict[str, np.ndarray], groups: np.ndarray, draws: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Means over images of per-image values, float (N,) each, with a bootstrap over groups."""
    _, group = np.unique(groups, return_inverse=True)
    counts = draw_groups(group.max() + 1, draws, seed)
    size = counts @ np.bincount(group)
    return {key: Estimate(value.mean(), counts @ np.bincount(group, value) / size) for key, value in values.items()}
