"""The plots of an evaluation, as PNG files."""

from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # names of folders and classes are text
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.metrics import ConfusionMatrixDisplay, RocCurveDisplay  # noqa: E402

from training.evaluation.metrics import unit  # noqa: E402
from training.evaluation.tables import NAMES, heading, in_order, labels_kept  # noqa: E402
from uscl_hub.files import write_whole  # noqa: E402


def plot(result: dict, arrays: dict, folder: Path) -> list[tuple[Path, str]]:
    """All plots as PNG, with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []

    def save(figure, name, caption):
        write_whole(folder / f"{name}.png", partial(figure.savefig, dpi=110, bbox_inches="tight"))
        plt.close(figure)
        drawn.append((folder / f"{name}.png", caption))

    for number, alike in enumerate(result.get("look_alikes", ())):  # drawn when they were found
        caption = f"{alike['backbone']}: beside each file the picture it looks like (alone: only its hash is known)"
        drawn.append((folder / f"look_alikes_{number}.png", caption))
    for name, task in result["tasks"].items():
        rows = sorted((r for r in result["results"] if r["task"] == name and r["level"] != "frame"), key=in_order)
        if rows:
            for figure, kind, caption in _of_task(name, task, rows, arrays):
                save(figure, f"{name}_{kind}", f"{task['title']}: {caption}")
    return drawn


def _of_task(name: str, task: dict, rows: list[dict], arrays: dict):
    """Yields (figure, kind, caption)."""
    title, metric = task["title"], next(m for m in ("macro-F1", "Dice", "R2") if m in rows[0]["metrics"])
    yield bars(rows, metric, title), "bars", f"{metric} with 95 % intervals"
    if len({r["fraction"] for r in rows}) > 1:
        yield label_curves(rows, metric, title), "labels", f"{metric} by labels"
    if metric == "Dice":
        shown = {key: value for key, value in arrays.items() if key.startswith(f"overlay/{name}/")}
        yield overlays(shown), "overlays", "reference (green), prediction of a model that has not seen the image (red)"
        return
    full = [r for r in rows if r["fraction"] == max(x["fraction"] for x in rows)]
    kind = task.get("kind", "classification")
    if kind == "regression":
        yield scatter(full, task["classes"], arrays), "scatter", "predicted against true values"
        return
    if kind == "classification":
        yield confusions(full, task["classes"]), "confusion", "confusion, each row in %"
    caption = f"ROC of {rows[0]['level']}s, each class against the rest"
    yield roc(full, task["classes"], arrays), "roc", caption
    if kind == "classification":
        yield embeddings(arrays, name, task["classes"]), "tsne", "t-SNE of the frozen features"


def _errors(row: dict, metric: str) -> tuple[float, list[float]]:
    e, factor = row["metrics"][metric], 100 if unit(metric) == "%" else 1
    return factor * e["value"], [factor * max(0, e["value"] - e["low"]), factor * max(0, e["high"] - e["value"])]


def _axis(metric: str) -> dict:
    return {"ylabel": heading(metric)} | ({"ylim": (0, 100)} if unit(metric) == "%" else {})


def bars(rows: list[dict], metric: str, title: str):
    places = list(dict.fromkeys((r["protocol"], r["fraction"]) for r in rows))
    backbones = list(dict.fromkeys(r["backbone"] for r in rows))
    figure, axis = plt.subplots(figsize=(max(5, len(places) * (0.8 + 0.4 * len(backbones))), 3.6))
    width = 0.8 / len(backbones)
    for i, backbone in enumerate(backbones):
        own = [r for r in rows if r["backbone"] == backbone]
        x = [places.index((r["protocol"], r["fraction"])) + (i - (len(backbones) - 1) / 2) * width for r in own]
        values, errors = zip(*(_errors(r, metric) for r in own))
        axis.bar(x, values, width * 0.92, yerr=np.transpose(errors), capsize=3, color=f"C{i}", label=backbone)
    names = [NAMES[p].replace(" ", "\n", 1) + f"\n{labels_kept(f)} of labels" for p, f in places]
    axis.set_xticks(range(len(places)), names)
    axis.set(title=title, **_axis(metric))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, fontsize=8, frameon=False)
    return figure


def label_curves(rows: list[dict], metric: str, title: str):
    """A panel a protocol, a line a backbone."""
    names, share = list(dict.fromkeys(r["protocol"] for r in rows)), rows[0]["fraction"] <= 1
    figure, axes = _grid(len(names), 3.4)
    for axis, protocol in zip(axes, names):
        for backbone in dict.fromkeys(r["backbone"] for r in rows):
            line = [r for r in rows if (r["protocol"], r["backbone"]) == (protocol, backbone)]
            values, errors = zip(*(_errors(r, metric) for r in line))
            x = [r["fraction"] * (100 if share else 1) for r in line]
            axis.errorbar(x, values, yerr=np.transpose(errors), capsize=3, marker="o", label=backbone)
        axis.set(xlabel="labels (%)" if share else "labelled files", **_axis(metric))
        axis.set_title(NAMES[protocol], fontsize=9)
        axis.legend(fontsize=7)
    figure.suptitle(title)
    return figure


def _grid(count: int, size: float = 3.0):
    columns = min(4, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, squeeze=False, figsize=(size * columns, size * lines), layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, axes.flat


def _caption(row: dict) -> str:
    return f"{row['backbone']}\n{NAMES[row['protocol']]}"


def confusions(rows: list[dict], classes: list[str]):
    figure, axes = _grid(len(rows))
    for axis, row in zip(axes, rows):
        matrix = np.array(row["confusion"], float)
        matrix *= 100 / np.maximum(matrix.sum(1, keepdims=True), 1)
        shown = ConfusionMatrixDisplay(matrix, display_labels=classes)
        style = {"colorbar": False, "cmap": "Blues", "values_format": ".0f", "im_kw": {"vmin": 0, "vmax": 100}}
        shown.plot(ax=axis, xticks_rotation=30, **style)
        axis.set_title(_caption(row), fontsize=9)
    return figure


def _scores(row: dict, arrays: dict) -> tuple[np.ndarray, np.ndarray]:
    """Targets and predictions of a row's items, once a seed."""
    scores = arrays["/".join(["scores", row["task"], row["backbone"], row["protocol"], f"{row['fraction']:g}"])]
    targets = arrays[f"labels/{row['task']}"]
    return np.concatenate([targets] * (len(scores) // len(targets))), scores


def roc(rows: list[dict], classes: list[str], arrays: dict):
    figure, axes = _grid(len(rows), 3.6)
    for axis, row in zip(axes, rows):
        targets, scores = _scores(row, arrays)
        several = targets.ndim == 2
        for i, name in enumerate(classes):
            positive = targets[:, i] > 0 if several else targets == i
            if several or len(classes) > 2 or i == 1:
                kwargs = {"name": name, "curve_kwargs": {"color": f"C{i}"}}
                RocCurveDisplay.from_predictions(positive, scores[:, i], ax=axis, **kwargs)
        axis.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
        axis.set_title(_caption(row), fontsize=9)
        axis.set(xlabel="false positive rate", ylabel="true positive rate")
        axis.legend(fontsize=7, loc="lower right")
    return figure


def scatter(rows: list[dict], columns: list[str], arrays: dict):
    """Predicted against true values, a panel a row and column."""
    figure, axes = _grid(len(rows) * len(columns), 3.4)
    panels = ((row, i) for row in rows for i in range(len(columns)))
    for axis, (row, i) in zip(axes, panels):
        targets, values = _scores(row, arrays)
        axis.scatter(targets[:, i], values[:, i], s=8)
        ends = [targets[:, i].min(), targets[:, i].max()]
        axis.plot(ends, ends, ":", color="grey", linewidth=1)
        axis.set_title(_caption(row), fontsize=9)
        axis.set(xlabel=f"true {columns[i]}", ylabel="predicted")
    return figure


def embeddings(arrays: dict, task: str, classes: list[str]):
    prefix = f"tsne/{task}/"
    found = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    figure, axes = _grid(len(found), 3.4)
    for axis, (backbone, points) in zip(axes, found.items()):
        for i, name in enumerate(classes):
            axis.scatter(*points[arrays[f"labels/{task}"] == i].T, s=8, label=name, color=f"C{i}")
        axis.set_title(backbone, fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.legend(fontsize=7)
    return figure


def overlays(shown: dict[str, np.ndarray]):
    """One row a backbone and head: images with the outlines of reference and prediction."""
    columns = len(next(iter(shown.values())))
    size = 1.8 * columns, 1.9 * len(shown)
    figure, axes = plt.subplots(len(shown), columns, squeeze=False, figsize=size, layout="constrained")
    for line, (key, stack) in zip(axes, shown.items()):
        backbone, head, fraction = key.split("/", 2)[2].rsplit("/", 2)
        for axis, (image, reference, predicted) in zip(line, stack):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            for mask, colour in ((reference, "lime"), (predicted, "red")):
                if mask.any() and not mask.all():
                    axis.contour(mask, [127], colors=colour, linewidths=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(f"{backbone}\n{NAMES[head]}, {labels_kept(float(fraction))}", fontsize=7)
    return figure
