"""Out-of-fold scores of a task with 95 % intervals over groups, and the one number by which recipes are chosen."""

from dataclasses import replace

import numpy as np
from sklearn.metrics import r2_score, roc_auc_score

from training.evaluation import intervals, metrics
from training.evaluation.intervals import Estimate
from training.tuning.problem import Problem, balance, balanced

CHOSEN_BY = {"classification": "AUROC", "multilabel": "AUROC", "regression": "R2", "segmentation": "Dice"}
CALIBRATION = "calibration error, classes alike"
BINS = 10  # of the reliability curve
DRAWS = 1000
SLOW_DRAWS = 200  # of what is computed draw by draw


def value(problem: Problem, targets: np.ndarray, scores: np.ndarray) -> float:
    """The number by which recipes are chosen (CHOSEN_BY), macro over classes, labels or targets.

    targets: of the items; scores: from `problem.item_scores`. nan where it is not defined.
    """
    if problem.task == "segmentation":
        return float(scores.mean())
    if problem.task == "regression":
        return float(np.mean([r2_score(t, s) if np.ptp(t) else np.nan for t, s in zip(targets.T, scores.T)]))
    truth = positive(problem, targets)
    areas = [
        roc_auc_score(truth[:, c], scores[:, c]) if 0 < truth[:, c].sum() < len(truth) else np.nan
        for c in shown(problem)
    ]
    return float(np.mean(areas))


def estimates(problem: Problem, targets: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> dict[str, Estimate]:
    """All scores of a task by name. Arguments as for `value`; groups: (items,). The first one is CHOSEN_BY."""
    if problem.task == "segmentation":
        return intervals.mean_of_rows({"Dice": scores[:, 0]}, groups, DRAWS)
    found = metrics.estimates(problem.task, targets, scores, groups, problem.names, DRAWS)
    if problem.task != "regression":  # probabilities are those of equal classes
        found = {k: v for k, v in found.items() if not k.startswith("expected calibration error")}
        found[CALIBRATION] = _calibration(problem, targets, scores, groups)
    first = CHOSEN_BY[problem.task]
    return {first: found.pop(first)} | found


def positive(problem: Problem, targets: np.ndarray) -> np.ndarray:
    """bool (items, outputs)."""
    return np.eye(problem.outputs, dtype=bool)[targets] if problem.task == "classification" else targets > 0


def shown(problem: Problem) -> range:
    """Which outputs are judged one by one: of two classes the second, else all."""
    two = problem.task == "classification" and problem.outputs == 2
    return range(1, 2) if two else range(problem.outputs)


def reliability(positive: np.ndarray, score: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float (BINS, 3): weight in the bin, mean probability, share of positives (nan in an empty bin)."""
    b = (score * BINS).astype(int).clip(0, BINS - 1)
    total, said, true = (np.bincount(b, weight * v, BINS) for v in (np.ones(len(b)), score, positive))
    with np.errstate(invalid="ignore"):
        return np.stack([total, said / total, true / total], axis=1)


def _calibration(problem: Problem, targets: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> Estimate:
    """Mean distance between probability and share of positives in BINS bins, every class weighing the same."""
    _, group = np.unique(groups, return_inverse=True)
    counts = intervals.draw_groups(group.max() + 1, SLOW_DRAWS, 0)
    # the weights of the training would not make the classes of other data count alike
    problem = replace(problem, weights=balanced(problem.task, targets, problem.outputs))
    truth, alike, errors = positive(problem, targets), balance(problem, targets), []
    for weight in np.concatenate([np.ones((1, len(group))), counts[:, group]]):
        bins = [reliability(truth[:, c], scores[:, c], weight * alike[:, c]) for c in shown(problem)]
        errors.append(np.mean([np.nansum(b[:, 0] * np.abs(b[:, 1] - b[:, 2])) / b[:, 0].sum() for b in bins]))
    return Estimate(float(errors[0]), np.array(errors[1:]))
