"""Metrics and their draws against scikit-learn and scipy on copied groups."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
)

from training.evaluation import intervals, metrics

GROUPS = 12


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def groups(rng):
    return rng.choice(GROUPS, 300, p=np.arange(1, GROUPS + 1) / np.arange(1, GROUPS + 1).sum())


def copies(groups, draws=30):
    """For each draw the rows of the groups that it has, as often as it has them."""
    counts = intervals.draw_groups(GROUPS, draws, 0)
    return [np.repeat(np.arange(len(groups)), c[groups]) for c in counts]


def naive_error(confidence, right):
    """Expected calibration error by its definition."""
    total = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def compare(found, rows, naive):
    """Value and draws of an Estimate with a function of an index of rows."""
    assert found.value == pytest.approx(naive(slice(None)), abs=1e-9)
    assert found.draws == pytest.approx([naive(index) for index in rows], abs=1e-9)


@pytest.mark.parametrize("classes", [2, 3])
def test_classification(rng, groups, classes):
    labels = rng.integers(0, classes, 300)
    scores = rng.integers(1, 20, (300, classes)) + 6 * np.eye(classes)[labels]  # many ties
    scores /= scores.sum(1, keepdims=True)
    names = tuple("abc"[:classes])
    found = metrics.estimates("classification", labels, scores, groups, names, 30)
    known = intervals.classification(labels, scores, groups, names, 30)
    assert list(found)[:6] == list(known)[:4] + ["average precision", "expected calibration error"]
    for name, estimate in known.items():
        assert found[name].value == estimate.value and np.array_equal(found[name].draws, estimate.draws)
    columns = range(3) if classes == 3 else (1,)
    rows = copies(groups)
    compare(
        found["average precision"], rows,
        lambda i: np.mean([average_precision_score(labels[i] == c, scores[i, c]) for c in columns]),
    )  # fmt: skip
    compare(
        found["expected calibration error"], rows,
        lambda i: naive_error(scores[i].max(1), scores[i].argmax(1) == labels[i]),
    )  # fmt: skip


def test_several_labels(rng, groups):
    targets = rng.integers(0, 2, (300, 2))
    scores = np.clip(0.3 * targets + rng.integers(0, 14, (300, 2)) / 20, 0.01, 0.99)
    found, rows = metrics.estimates("multilabel", targets, scores, groups, ("fluid", "gas"), 30), copies(groups)
    pairs = {
        "AUROC": roc_auc_score,
        "average precision": average_precision_score,
        "F1": lambda y, s: f1_score(y, s > 0.5),
        "balanced accuracy": lambda y, s: balanced_accuracy_score(y, s > 0.5),
        "expected calibration error": lambda y, s: naive_error(np.where(s > 0.5, s, 1 - s), (s > 0.5) == y),
    }
    for name, function in pairs.items():
        for column, label in enumerate(("fluid", "gas")):
            compare(found[f"{name} {label}"], rows, lambda i: function(targets[i, column], scores[i, column]))
        both = [found[f"{name} {label}"] for label in ("fluid", "gas")]
        mean = found["macro-F1" if name == "F1" else name]
        assert mean.value == pytest.approx(np.mean([e.value for e in both]))
        assert mean.draws == pytest.approx(np.mean([e.draws for e in both], axis=0))


def test_a_label_that_nothing_has_leaves_no_value(groups):
    targets = np.stack([np.zeros(300), np.arange(300) % 2], 1)
    found = metrics.multilabel(targets, np.full((300, 2), 0.4), groups, ("none", "half"), 30)
    for name in ("AUROC", "F1", "balanced accuracy", "average precision"):
        own, mean = found[f"{name} none"], found["macro-F1" if name == "F1" else name]
        assert np.isnan([own.value, mean.value, *own.draws, *mean.draws]).all(), name
        assert np.isfinite(found[f"{name} half"].value)


def test_a_rare_label_leaves_draws_without_a_value(groups):
    targets = np.stack([groups == 0, np.arange(300) % 2], axis=1)
    found = metrics.multilabel(targets, np.full((300, 2), 0.4), groups, ("rare", "common"), 30)
    lacking = [not (groups[index] == 0).any() for index in copies(groups)]
    assert any(lacking) and np.isnan(found["AUROC rare"].draws).tolist() == lacking
    assert not np.isnan(found["AUROC common"].draws).any() and np.isnan(found["AUROC"].draws).tolist() == lacking


def test_regression(rng, groups):
    targets = rng.normal(5000, 2, (300, 2))
    values = targets + rng.normal(0, [1, 4], (300, 2))
    values[:50] = values[50]
    found, rows = metrics.estimates("regression", targets, values, groups, ("area", "depth"), 30), copies(groups)
    functions = {"R2": r2_score, "MAE": mean_absolute_error, "Spearman": lambda y, p: spearmanr(y, p).statistic}
    for name, function in functions.items():
        for column, label in enumerate(("area", "depth")):
            compare(found[f"{name} {label}"], rows, lambda i: function(targets[i, column], values[i, column]))
        assert found[name].value == pytest.approx((found[f"{name} area"].value + found[f"{name} depth"].value) / 2)
    assert list(metrics.regression(targets[:, :1], values[:, :1], groups, ("area",), 30)) == ["R2", "MAE", "Spearman"]


def test_equal_values_order_nothing_and_equal_targets_have_no_r2(groups):
    found = metrics.regression(np.arange(300.0)[:, None], np.full((300, 1), 7.0), groups, ("x",), 10)
    assert found["Spearman"].value == 0 and (found["Spearman"].draws == 0).all() and found["R2"].value <= 0
    same = (groups < 11).astype(float)[:, None]  # groups 0 to 10 have equal targets
    found = metrics.regression(same, same, groups, ("x",), 30)
    lacking = [len(set(same[index, 0])) < 2 for index in copies(groups)]
    assert any(lacking) and np.isnan(found["R2"].draws).tolist() == lacking


@pytest.mark.parametrize(
    "metric, unit, lower",
    [
        ("AUROC", "%", False),
        ("F1 MAE", "%", False),
        ("expected calibration error", "%", True),
        ("expected calibration error gas", "%", True),
        ("R2 area", "", False),
        ("MAE", "", True),
        ("HD95", "px", True),
    ],
)
def test_units_and_directions(metric, unit, lower):
    assert (metrics.unit(metric), metrics.lower_is_better(metric)) == (unit, lower)


def test_less_of_an_error_is_better():
    less = intervals.Estimate(-1.0, np.full(10, -1.0))
    assert intervals.verdict(less) == "worse" and intervals.verdict(less, lower_is_better=True) == "better"
    more = intervals.Estimate(1.0, np.full(10, 1.0))
    assert intervals.verdict(more, lower_is_better=True) == "worse"
