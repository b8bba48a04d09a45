"""The plots of report.html, each a matplotlib figure."""

import matplotlib
import numpy as np
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_curve, roc_auc_score, roc_curve

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from training.evaluation import intervals  # noqa: E402
from training.tuning.scores import reliability  # noqa: E402

GRID = np.linspace(0, 1, 101)
DRAWS = 200  # of the bands around curves
COLUMNS = 8  # of a contact sheet


def confusion(targets: np.ndarray, predicted: np.ndarray, names: tuple[str, ...]):
    """Counts, and colour by the share of the true class."""
    counts = confusion_matrix(targets, predicted, labels=range(len(names)))
    side = max(3.5, 0.8 * len(names) + 2)
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    axis.imshow(counts / counts.sum(1, keepdims=True).clip(min=1), cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        dark = count > 0.5 * counts[row].sum()
        axis.text(column, row, count, ha="center", va="center", color="white" if dark else "black")
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="predicted", ylabel="true")
    return figure


def curves(positive: np.ndarray, scores: np.ndarray, groups: np.ndarray, names: tuple[str, ...]):
    """ROC and precision-recall of every class against the rest, with 95 % bands over groups. positive: bool and
    scores: float (items, names)."""
    _, group = np.unique(groups, return_inverse=True)
    draws = intervals.draw_groups(group.max() + 1, DRAWS, 0)[:, group]
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for c, name in enumerate(names):
        true, score = positive[:, c], scores[:, c]
        for axis, curve, area in ((axes[0], _roc, roc_auc_score), (axes[1], _pr, average_precision_score)):
            drawn = [curve(true, score, w) for w in draws if 0 < w[true].sum() < w.sum()]
            (line,) = axis.plot(GRID, curve(true, score, None), label=f"{name} {area(true, score):.3f}")
            low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
            axis.fill_between(GRID, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axes[0].plot([0, 1], [0, 1], "k:", lw=1)
    axes[0].set(xlabel="false positive rate", ylabel="sensitivity", title="ROC (area)")
    axes[1].set(xlabel="sensitivity", ylabel="precision", title="precision and recall (average precision)")
    for axis in axes:
        axis.set(xlim=(0, 1), ylim=(0, 1.02))
        axis.legend()
    return figure


def _roc(positive, score, weight):
    x, y, _ = roc_curve(positive, score, sample_weight=weight)
    return np.interp(GRID, x, y)


def _pr(positive, score, weight):
    precision, recall, _ = precision_recall_curve(positive, score, sample_weight=weight)
    return np.interp(GRID, recall[::-1], precision[::-1])


def calibration(positive: np.ndarray, scores: np.ndarray, weight: np.ndarray, names: tuple[str, ...]):
    """Reliability, the area of a dot is its share. positive: bool, scores and weight: float, (items, names)."""
    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    axis.plot([0, 1], [0, 1], "k:", lw=1)
    for c, name in enumerate(names):
        total, said, true = reliability(positive[:, c], scores[:, c], weight[:, c]).T
        (line,) = axis.plot(said, true, "-", label=name)
        axis.scatter(said, true, s=4 + 200 * total / total.sum(), color=line.get_color())
    axis.set(xlabel="probability said", ylabel="share that is so, classes counting alike", xlim=(0, 1), ylim=(0, 1))
    axis.legend()
    return figure


def regression(targets: np.ndarray, values: np.ndarray, names: tuple[str, ...]):
    """Predicted against true, and Bland-Altman, one row a target."""
    figure, axes = plt.subplots(len(names), 2, figsize=(10, 4.5 * len(names)), squeeze=False, layout="constrained")
    for (left, right), name, t, v in zip(axes, names, targets.T, values.T):
        ends = [min(t.min(), v.min()), max(t.max(), v.max())]
        left.plot(ends, ends, "k:", lw=1)
        left.plot(t, v, ".", alpha=0.6)
        left.set(xlabel=f"true {name}", ylabel="predicted, out of fold")
        difference = v - t
        right.plot((t + v) / 2, difference, ".", alpha=0.6)
        for level, style in ((0, "-"), (-1.96, "--"), (1.96, "--")):
            height = difference.mean() + level * difference.std(ddof=1)
            right.axhline(height, color="k", ls=style, lw=1)
            right.annotate(f"{height:.3g}", (1, height), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        right.set(xlabel="mean of both", ylabel="predicted - true", title="Bland-Altman: mean and limits of agreement")
    return figure


def sheet(images: list[np.ndarray], titles: list[str], heat=None):
    """Grey images with a line of text over each; heat: float (px, px) in [0, 1] an image, laid over it."""
    rows = -(-len(images) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(1.6 * COLUMNS, 2.1 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image, title) in enumerate(zip(axes.flat, images, titles)):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        if heat is not None:
            axis.imshow(heat[i], cmap="inferno", alpha=0.45, vmin=0, vmax=1)
        axis.set_title(title, fontsize=7)
    return figure


def outlines(images: np.ndarray, masks: np.ndarray, predicted: np.ndarray, titles: list[str]):
    """True outlines green, predicted ones orange."""
    figure = sheet(list(images), titles)
    for axis, mask, found in zip(figure.axes, masks, predicted):
        for plane, colour in ((mask, "lime"), (found, "orange")):
            if plane.any() and not plane.all():
                axis.contour(plane, [0.5], colors=colour, linewidths=0.8)
    return figure
