"""The metrics of each kind of task, with intervals over groups (see `intervals`).

Classification: those of `intervals.classification`, average precision and expected calibration error. Several labels:
the same of each label, and their means. Regression: R2, MAE, Spearman. Segmentation has its own in `segmentation`.
"""

from collections.abc import Iterator

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, mean_absolute_error, r2_score

from training.evaluation import intervals
from training.evaluation.intervals import Estimate, draw_groups

BINS = 15  # of the confidence, for the calibration error
LOWER_IS_BETTER = ("expected calibration error", "MAE", "HD95")
UNITS = {"R2": "", "MAE": "", "Spearman": "", "HD95": "px"}  # all others are shares, shown in %


def base(metric: str) -> str:
    """The metric without the class or column that its name ends in: 'MAE' of 'MAE area'."""
    return next(
        (name for name in (*LOWER_IS_BETTER, *UNITS) if metric == name or metric.startswith(name + " ")), metric
    )


def lower_is_better(metric: str) -> bool:
    return base(metric) in LOWER_IS_BETTER


def unit(metric: str) -> str:
    """'%' for shares, which are shown in hundredths; '' or 'px' for others."""
    return UNITS.get(base(metric), "%")


def estimates(kind: str, targets: np.ndarray, scores: np.ndarray, groups: np.ndarray, names, draws: int) -> dict:
    """All metrics of a kind of task by name, each an `intervals.Estimate`.

    Args:
        kind: 'classification', 'multilabel' or 'regression'.
        targets: int (N,) for classification, float (N, len(names)) for the others.
        scores: float (N, len(names)): probabilities, or values for regression.
        groups: (N,). names: of the classes or columns.
    """
    functions = {"classification": classification, "multilabel": multilabel, "regression": regression}
    return functions[kind](targets, scores, groups, tuple(names), draws)


def classification(labels, scores, groups, names: tuple[str, ...], draws: int = 1000, seed: int = 0) -> dict:
    """`intervals.classification`, and average precision (one against the rest, macro; of two classes the second's) and
    the expected calibration error (Guo et al. 2017) of the most probable class."""
    known = intervals.classification(labels, scores, groups, names, draws, seed)
    _, group = np.unique(groups, return_inverse=True)
    counts = draw_groups(group.max() + 1, draws, seed)
    columns = range(len(names)) if len(names) > 2 else (1,)
    found = [_precision(labels == c, scores[:, c], group, counts) for c in columns]
    every = np.isnan(known["accuracy"].draws)  # draws that lack a class
    precision = Estimate(
        np.mean([f.value for f in found]), np.where(every, np.nan, np.mean([f.draws for f in found], 0))
    )
    error = calibration_error(scores.max(1), scores.argmax(1) == labels, group, counts)
    error.draws = np.where(every, np.nan, error.draws)
    order = ["accuracy", "balanced accuracy", "macro-F1", "AUROC"]
    added = {"average precision": precision, "expected calibration error": error}
    return {name: known[name] for name in order} | added | {k: v for k, v in known.items() if k not in order}


def multilabel(targets, scores, groups, names: tuple[str, ...], draws: int = 1000, seed: int = 0) -> dict:
    """macro-F1 and balanced accuracy at a probability of 0.5, AUROC, average precision and expected calibration error:
    means over the labels, then each label's own. targets: 0 or 1, (N, labels); scores: (N, labels)."""
    _, group = np.unique(groups, return_inverse=True)
    counts = draw_groups(group.max() + 1, draws, seed)
    own = [dict(_of_label(targets[:, i] > 0, scores[:, i], group, counts)) for i in range(len(names))]
    result = {}
    for metric in own[0]:
        values = [found[metric] for found in own]
        key = "macro-F1" if metric == "F1" else metric
        result[key] = Estimate(np.mean([e.value for e in values]), np.mean([e.draws for e in values], axis=0))
    return result | {f"{metric} {name}": e for name, found in zip(names, own) for metric, e in found.items()}


def _of_label(positive, score, group, counts) -> Iterator[tuple[str, Estimate]]:
    once, said = np.ones((1, counts.shape[1]), int), score > 0.5
    sums = [np.bincount(group, part.astype(float), counts.shape[1])
            for part in (positive & said, positive, said, ~positive & ~said, ~positive)]  # fmt: skip

    def both(function):
        values = [
            np.where(w @ sums[1] * (w @ sums[4]) > 0, function(*(w @ s for s in sums)), np.nan) for w in (once, counts)
        ]
        return Estimate(float(values[0][0]), values[1])

    yield "F1", both(lambda hit, true, said, _, __: 2 * hit / np.maximum(true + said, 1))
    yield (
        "balanced accuracy",
        both(lambda hit, true, _, right, rest: (hit / np.maximum(true, 1) + right / np.maximum(rest, 1)) / 2),
    )
    area = [intervals.auroc(positive, score, group, w) for w in (once, counts)]
    defined = both(lambda *sums: 1.0)  # nan where all are positive, or none is
    yield "AUROC", Estimate(float(area[0][0]) * defined.value, area[1] * defined.draws)
    yield "average precision", _precision(positive, score, group, counts)
    confidence = np.where(said, score, 1 - score)
    yield "expected calibration error", calibration_error(confidence, said == positive, group, counts)


def _precision(positive, score, group, counts) -> Estimate:
    parts = [weighted_precision(positive, score, counts[i : i + 64, group]) for i in range(0, len(counts), 64)]
    return Estimate(average_precision_score(positive, score) if positive.any() else np.nan, np.concatenate(parts))


def weighted_precision(positive: np.ndarray, score: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """scikit-learn's average precision for many weightings at once, float (draws,); nan without a positive.

    positive: bool (N,); score: float (N,); weight: (draws, N).
    """
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # of each run of equal scores
    said = np.cumsum(weight[:, order], axis=1)[:, last]
    true = np.cumsum(weight[:, order] * positive[order], axis=1)[:, last]
    gained = np.diff(true, axis=1, prepend=0)
    total = true[:, -1]
    return np.where(total > 0, (gained * true / np.maximum(said, 1)).sum(1) / np.maximum(total, 1), np.nan)


def calibration_error(confidence, right, group, counts) -> Estimate:
    """Mean distance of confidence and accuracy over BINS equal bins of the confidence, weighted by their rows."""
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gap = np.zeros((counts.shape[1], BINS))
    np.add.at(gap, (group, place), right - confidence)
    rows = np.bincount(group, minlength=counts.shape[1])
    value = np.abs(gap.sum(0)).sum() / rows.sum()
    return Estimate(float(value), np.abs(counts @ gap).sum(1) / np.maximum(counts @ rows, 1))


def regression(targets, values, groups, names: tuple[str, ...], draws: int = 1000, seed: int = 0) -> dict:
    """R2, mean absolute error and Spearman's rank correlation: means over the columns, and of several each one's own.

    targets, values: float (N, columns). R2 and Spearman have no value in a draw whose targets are all equal.
    """
    _, group = np.unique(groups, return_inverse=True)
    counts = draw_groups(group.max() + 1, draws, seed)
    own = [_of_column(np.float64(y), np.float64(p), group, counts) for y, p in zip(np.transpose(targets), values.T)]
    result = {
        metric: Estimate(np.mean([f[metric].value for f in own]), np.mean([f[metric].draws for f in own], axis=0))
        for metric in own[0]
    }
    if len(names) > 1:
        result |= {f"{metric} {name}": e for name, found in zip(names, own) for metric, e in found.items()}
    return result


def _of_column(y: np.ndarray, p: np.ndarray, group: np.ndarray, counts: np.ndarray) -> dict[str, Estimate]:
    centred = y - y.mean()  # sums of squares lose fewer digits
    parts = [np.bincount(group, part) for part in (np.ones(len(y)), centred, centred**2, (y - p) ** 2, np.abs(y - p))]
    rows, first, second, squared, absolute = (counts @ part for part in parts)
    spread = second - first**2 / np.maximum(rows, 1)
    alike = spread <= 1e-12 * np.maximum(second, 1e-300)
    ranks = np.full(len(counts), np.nan)
    for draw in np.flatnonzero(~alike):
        index = np.repeat(np.arange(len(y)), counts[draw, group])
        if len(set(p[index])) > 1:
            ranks[draw] = spearmanr(y[index], p[index]).statistic
        else:
            ranks[draw] = 0.0  # equal values order nothing
    rank = spearmanr(y, p).statistic if len(set(p)) > 1 else 0.0
    return {
        "R2": Estimate(r2_score(y, p), np.where(alike, np.nan, 1 - squared / np.where(alike, 1, spread))),
        "MAE": Estimate(mean_absolute_error(y, p), absolute / np.maximum(rows, 1)),
        "Spearman": Estimate(float(rank), ranks),
    }
