"""The bootstrap against a naive one that copies groups and asks scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from training.evaluation import intervals
from training.evaluation.intervals import Estimate


def data(classes, rows=300, groups=12, seed=0):
    """Labels, scores with many ties, groups of very different sizes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    scores = rng.integers(1, 20, (rows, classes)) + 6 * np.eye(classes)[labels]
    group = rng.choice(groups, rows, p=np.arange(1, groups + 1) / np.arange(1, groups + 1).sum())
    return labels, scores / scores.sum(1, keepdims=True), group


def sklearn_metrics(labels, scores):
    predicted = scores.argmax(1)
    return [
        accuracy_score(labels, predicted),
        balanced_accuracy_score(labels, predicted),
        f1_score(labels, predicted, average="macro"),
        roc_auc_score(labels, scores if scores.shape[1] > 2 else scores[:, 1], multi_class="ovr"),
        *np.concatenate(precision_recall_fscore_support(labels, predicted, zero_division=0)[:3]),
    ]


@pytest.mark.parametrize("classes", [2, 3])
def test_draws_are_sklearn_metrics_of_copied_groups(classes):
    labels, scores, groups = data(classes)
    names = tuple("abc"[:classes])
    found = intervals.classification(labels, scores, groups, names, draws=40, seed=3)
    assert list(found)[:4] == ["accuracy", "balanced accuracy", "macro-F1", "AUROC"]
    assert [e.value for e in found.values()] == pytest.approx(sklearn_metrics(labels, scores), abs=1e-12)
    counts = intervals.draw_groups(len(set(groups)), 40, seed=3)
    for draw in range(40):
        rows = np.concatenate([np.tile(np.flatnonzero(groups == g), counts[draw][g]) for g in range(12)])
        naive = sklearn_metrics(labels[rows], scores[rows])
        assert [e.draws[draw] for e in found.values()] == pytest.approx(naive, abs=1e-12)
    low, high = np.quantile(found["AUROC"].draws, [0.025, 0.975])
    assert (found["AUROC"].low, found["AUROC"].high) == pytest.approx((low, high))
    assert low < found["AUROC"].value < high


def test_a_draw_without_a_class_has_no_value():
    labels, groups = np.array([0, 0, 1, 1]), np.array(["a", "b", "c", "d"])
    found = intervals.classification(labels, np.eye(2)[labels], groups, ("x", "y"), draws=200)
    counts = intervals.draw_groups(4, 200, 0)
    lacking = (counts[:, :2].sum(1) == 0) | (counts[:, 2:].sum(1) == 0)
    assert 0 < lacking.sum() < 100
    for estimate in found.values():
        assert np.array_equal(np.isnan(estimate.draws), lacking)
        assert estimate.to_dict() == {"value": 1, "low": 1, "high": 1, "undefined_draws": lacking.sum()}


def test_groups_make_the_interval_wider_than_frames_would():
    """100 frames of each of 8 patients, all right or all wrong: there are 8 observations, not 800."""
    groups = np.repeat(np.arange(8), 100)
    labels = np.tile([0, 1], 400)
    right = groups < 6
    scores = np.eye(2)[np.where(right, labels, 1 - labels)]
    by_patient = intervals.classification(labels, scores, groups, ("x", "y"))["accuracy"]
    by_frame = intervals.classification(labels, scores, np.arange(800), ("x", "y"))["accuracy"]
    assert by_patient.value == by_frame.value == 0.75
    assert by_patient.high - by_patient.low > 5 * (by_frame.high - by_frame.low)


def test_differences_are_paired_and_only_clear_ones_are_called_better():
    labels, scores, groups = data(2)
    worse = scores.copy()
    worse[::3] = worse[::3, ::-1]
    a, b = (intervals.classification(labels, s, groups, ("x", "y"), draws=300)["accuracy"] for s in (scores, worse))
    assert np.array_equal((a - b).draws, a.draws - b.draws)
    assert (a - b).high - (a - b).low < (a.high - a.low) + (b.high - b.low)  # what pairing is for
    assert intervals.verdict(a - b) == "better" and intervals.verdict(b - a) == "worse"
    assert intervals.verdict(a - a) == "no difference shown"
    assert intervals.verdict(Estimate(0.1, np.array([-0.01, 0.1, 0.2]))) == "no difference shown"


def test_mean_of_rows_against_naive():
    rng = np.random.default_rng(0)
    values, groups = rng.random(50), rng.integers(0, 7, 50)
    found = intervals.mean_of_rows({"Dice": values}, groups, draws=20)["Dice"]
    counts = intervals.draw_groups(7, 20, 0)
    naive = [np.average(values, weights=c[groups]) for c in counts]
    assert found.value == pytest.approx(values.mean()) and found.draws == pytest.approx(naive)


def test_one_group_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 groups"):
        intervals.draw_groups(1, 10, 0)
