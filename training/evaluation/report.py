"""The report of an evaluation, from its folder's results.json and arrays.npz: Markdown, plots, one HTML page, tables
of a model card. `python training/evaluation/report.py FOLDER` writes it again.
"""

import base64
import html
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from markdown import Markdown  # noqa: E402
from sklearn.metrics import ConfusionMatrixDisplay, RocCurveDisplay  # noqa: E402

from training.evaluation.datasets import EvaluationError  # noqa: E402
from training.messages import markdown as escaped  # noqa: E402
from training.messages import one_line  # noqa: E402
from uscl_hub.files import write_text, write_whole  # noqa: E402

NAMES = {
    "knn": "kNN",
    "linear": "linear probe",
    "finetune_last": "fine-tune last block",
    "finetune_full": "fine-tune all",
    "maskrcnn": "Mask R-CNN",
    "unet": "U-Net",
}
METRICS = ("accuracy", "balanced accuracy", "macro-F1", "AUROC", "Dice", "PPV", "sensitivity", "COCO AP", "COCO AP50")
COMPARED = ("macro-F1", "AUROC", "Dice", "COCO AP")


def write(folder: Path):
    """report.md, report.html and figures/*.png beside results.json."""
    folder = Path(folder)
    result = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    with np.load(folder / "arrays.npz") as saved:
        arrays = dict(saved)
    figures = draw(result, arrays, folder / "figures")
    pictures = "\n\n".join(f"![{caption}](figures/{path.name})" for path, caption in figures)
    text = "\n\n".join(
        ["# Evaluation of ultrasound backbones", about(result), markdown_tables(result), data_notes(result)]
    )
    write_text(folder / "report.md", f"{text}\n\n## Plots\n\n{pictures}\n")
    write_text(folder / "report.html", page(text, figures))


# ---------------------------------------------------------------------------------------------------------- text


def interval(estimate: dict | None, sign: str = "") -> str:
    """'61.2 [50.3, 70.1]', in points of 100. sign: '+' shows it."""
    if estimate is None:
        return "–"
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table of plain text: nothing in it is markup."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(escaped, line)) + " |" for line in lines)


def about(result: dict) -> str:
    """What was run on what, with which backbones."""
    config, environment = result["config"], ", ".join(f"{k} {v}" for k, v in result["environment"].items())
    command = one_line(result["command"]).replace("`", " ")
    text = (
        f"{result['created']} by `{command}`; {environment}. Folds by group: {config['folds']}; seeds: "
        f"{', '.join(map(str, config['seeds']))}. Brackets hold the 95 % interval of a bootstrap over groups "
        f"({config['draws']} draws), folds and seeds pooled. Several seeds repeat the folds, not the patients: they do "
        "not narrow what few patients leave open."
    )
    rows = []
    for name, b in result["backbones"].items():
        known = b["provenance"]
        origin = ", ".join(f"{key} {known[key]}" for key in ("method", "steps", "seed") if key in known)
        origin = "untrained" if b["untrained"] else f"pretrained ({origin or 'how is not recorded'})"
        if not b["untrained"] and not b["leaks_checked"]:
            origin += "; names no training clips: whether it has seen test patients CANNOT be checked"
        rows.append([name, b["architecture"], b["px"], ", ".join(sha[:12] for sha in b["sha"]), origin])
    parts = [text, table(["backbone", "architecture", "px", "weights (sha256)", "origin"], rows)]
    parts += [
        f"**Left out:** {escaped(r['backbone'])} on {result['tasks'][r['task']]['title']}: it was pretrained on "
        f"{r['groups']} of the groups that this task tests."
        for r in result["refused"]
    ]
    return "\n\n".join(parts)


def _order(row: dict) -> tuple:
    """What is to be compared stands together: backbones are the last to change."""
    return list(NAMES).index(row["protocol"]), row["fraction"], row["level"] == "frame"


def _kind(row: dict) -> list[str]:
    return [row["backbone"], NAMES[row["protocol"]], f"{row['fraction']:.0%}", row["level"]]


def markdown_tables(result: dict, by_class: bool = True) -> str:
    """For every task its results, the differences from the backbones of `compare` (default: the first one), and the
    results by class."""
    parts, head = [], ["backbone", "protocol", "labels", "level"]
    for name, task in result["tasks"].items():
        rows = sorted((r for r in result["results"] if r["task"] == name), key=_order)
        if not rows:
            continue
        metrics = [m for m in METRICS if any(m in r["metrics"] for r in rows)]
        parts += [f"## {task['title']}", counts(task)]
        cells = [[*_kind(r), r["n"], *(interval(r["metrics"].get(m)) for m in metrics)] for r in rows]
        parts.append(table([*head, "n", *(f"{m} (%)" for m in metrics)], cells))
        undefined = max(e["undefined_draws"] for r in rows for e in r["metrics"].values())
        if undefined:
            parts.append(f"Up to {undefined} draws lacked a class; the intervals are of the others.")
        for first in result["config"].get("compare") or [rows[0]["backbone"]]:  # of what was tested on this task
            found = [
                [*_kind(d), d["metric"], interval(d, "+"), d["verdict"]]
                for d in sorted(result["differences"], key=_order)
                if d["task"] == name and d["against"] == first and d["metric"] in COMPARED
            ]
            if found:
                parts.append(
                    f'Paired differences from {escaped(first)}, on the same folds and draws; "better" and "worse" '
                    "only where the interval excludes 0:"
                )
                parts.append(table([*head, "metric", "difference (points)", "verdict"], found))
        if not by_class:
            continue
        rows_by_class = [
            [*_kind(r), c, *(interval(r["metrics"][f"{m} {c}"]) for m in ("precision", "recall", "F1"))]
            for r in rows
            for c in task["classes"]
            if f"F1 {c}" in r["metrics"]
        ]
        if rows_by_class:
            parts += ["By class:", table([*head, "class", "precision (%)", "recall (%)", "F1 (%)"], rows_by_class)]
    return "\n\n".join(parts)


def counts(task: dict) -> str:
    of = ", ".join(f"{n} {c} ({task['groups_by_class'][c]} groups)" for c, n in task["by_class"].items())
    return (
        f"{task['found']} files found, {task['used']} used, {len(task['excluded'])} excluded; "
        f"{task['groups']} groups; {of}."
    )


def data_notes(result: dict) -> str:
    """What was excluded and why, and what a reader must know of each task."""
    parts = ["## Data"]
    for task in result["tasks"].values():
        lines = [f"- {escaped(note)}" for note in task["notes"]]
        lines += [f"- excluded: {escaped(name)}: {escaped(reason)}" for name, reason in task["excluded"]]
        parts += [f"### {task['title']}", counts(task), "\n".join(lines)]
    return "\n\n".join(parts)


def update_model_card(path: Path, result: dict, section: str = ""):
    """Replace a section's tables in a model card; see `replace_section`. Results by class are left to the report."""
    tables = markdown_tables(result, by_class=False).replace("## ", "### ")  # the section has a heading of its own
    replace_section(path, section, f"{about(result)}\n\n{tables}")


def replace_section(path: Path, section: str, body: str):
    """Replace what stands between the markers of a section of a model card; a missing card is made.

    Raises EvaluationError if the card lacks the markers.
    """
    name = f"results:{section}" if section else "results"
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = path.read_text(encoding="utf-8") if path.exists() else f"# Model card\n\n{begin}\n{end}\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise EvaluationError(f"{path}: needs one line {begin} and after it one line {end}, around its result tables")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    note = "*Written by the command below; changes by hand are lost.*"
    text = f"{before}{begin}\n{note}\n\n{body}\n{end}{after}"
    write_text(path, text)


# --------------------------------------------------------------------------------------------------------- plots


def draw(result: dict, arrays: dict, folder: Path) -> list[tuple[Path, str]]:
    """All plots as PNG, with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []

    def save(figure, name, caption):
        write_whole(folder / f"{name}.png", partial(figure.savefig, dpi=110, bbox_inches="tight"))
        plt.close(figure)
        drawn.append((folder / f"{name}.png", caption))

    for name, task in result["tasks"].items():
        rows = sorted((r for r in result["results"] if r["task"] == name and r["level"] != "frame"), key=_order)
        if not rows:
            continue
        title, metric = task["title"], "macro-F1" if "macro-F1" in rows[0]["metrics"] else "Dice"
        save(bars(rows, metric, title), f"{name}_bars", f"{title}: {metric} with 95 % intervals")
        if len({r["fraction"] for r in rows}) > 1:
            save(label_curves(rows, metric, title), f"{name}_labels", f"{title}: {metric} by share of labels")
        if metric == "Dice":
            shown = {key: value for key, value in arrays.items() if key.startswith(f"overlay/{name}/")}
            caption = f"{title}: reference (green), prediction of a model that has not seen the image (red)"
            save(overlays(shown), f"{name}_overlays", caption)
            continue
        full = [r for r in rows if r["fraction"] == max(x["fraction"] for x in rows)]
        save(confusions(full, task["classes"]), f"{name}_confusion", f"{title}: confusion, each row in %")
        roc_caption = f"{title}: ROC of {rows[0]['level']}s, each class against the rest"
        save(roc(full, task["classes"], arrays), f"{name}_roc", roc_caption)
        save(embeddings(arrays, name, task["classes"]), f"{name}_tsne", f"{title}: t-SNE of the frozen features")
    return drawn


def _errors(row: dict, metric: str) -> tuple[float, list[float]]:
    e = row["metrics"][metric]
    return 100 * e["value"], [100 * max(0, e["value"] - e["low"]), 100 * max(0, e["high"] - e["value"])]


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
    axis.set_xticks(range(len(places)), [NAMES[p].replace(" ", "\n", 1) + f"\n{f:.0%} of labels" for p, f in places])
    axis.set(ylabel=f"{metric} (%)", ylim=(0, 100), title=title)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, fontsize=8, frameon=False)
    return figure


def label_curves(rows: list[dict], metric: str, title: str):
    """A panel a protocol, a line a backbone."""
    names = list(dict.fromkeys(r["protocol"] for r in rows))
    figure, axes = _grid(len(names), 3.4)
    for axis, protocol in zip(axes, names):
        for backbone in dict.fromkeys(r["backbone"] for r in rows):
            line = [r for r in rows if (r["protocol"], r["backbone"]) == (protocol, backbone)]
            values, errors = zip(*(_errors(r, metric) for r in line))
            x = [100 * r["fraction"] for r in line]
            axis.errorbar(x, values, yerr=np.transpose(errors), capsize=3, marker="o", label=backbone)
        axis.set(xlabel="labels (%)", ylabel=f"{metric} (%)", ylim=(0, 100))
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


def roc(rows: list[dict], classes: list[str], arrays: dict):
    figure, axes = _grid(len(rows), 3.6)
    for axis, row in zip(axes, rows):
        scores = arrays["/".join(["scores", row["task"], row["backbone"], row["protocol"], f"{row['fraction']:g}"])]
        labels = np.resize(arrays[f"labels/{row['task']}"], len(scores))  # once a seed
        for i, name in enumerate(classes):
            if len(classes) > 2 or i == 1:
                kwargs = {"name": name, "curve_kwargs": {"color": f"C{i}"}}
                RocCurveDisplay.from_predictions(labels == i, scores[:, i], ax=axis, **kwargs)
        axis.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
        axis.set_title(_caption(row), fontsize=9)
        axis.set(xlabel="false positive rate", ylabel="true positive rate")
        axis.legend(fontsize=7, loc="lower right")
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
        line[0].set_ylabel(f"{backbone}\n{NAMES[head]}, {float(fraction):.0%}", fontsize=7)
    return figure


# ---------------------------------------------------------------------------------------------------------- HTML

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;margin:1em 0;display:block;overflow-x:auto}
td,th{border-bottom:1px solid #ddd;padding:3px 9px;text-align:left;white-space:nowrap}th{background:#f4f4f4}
figure{margin:1.5em 0}img{max-width:100%}figcaption{color:#555;font-size:13px}
code{background:#f4f4f4;overflow-wrap:anywhere}"""


def page(text: str, figures: list[tuple[Path, str]]) -> str:
    """One HTML file without any outside reference: the plots are in it."""
    pictures = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"><figcaption>{html.escape(caption)}</figcaption></figure>\n'
        for path, caption in figures
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation of ultrasound backbones'
        f"</title><style>{STYLE}</style></head><body>\n{to_html(text)}\n<h2>Plots</h2>\n{pictures}</body></html>\n"
    )


def to_html(text: str) -> str:
    """Markdown without HTML, links and pictures: these stay text."""
    converter = Markdown(extensions=["tables"])
    converter.preprocessors.deregister("html_block")
    for name in ("html", "link", "image_link", "reference", "image_reference", "short_reference", "short_image_ref"):
        converter.inlinePatterns.deregister(name)
    for name in ("autolink", "automail"):
        converter.inlinePatterns.deregister(name)
    return converter.convert(text)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "results.json").is_file():
        sys.exit("usage: python training/evaluation/report.py FOLDER (with results.json and arrays.npz)")
    write(Path(sys.argv[1]))
