"""The tables of an evaluation as Markdown."""

from training.evaluation.metrics import unit
from training.messages import markdown as escaped
from training.messages import one_line

NAMES = {
    "knn": "kNN",
    "linear": "linear probe",
    "finetune_last": "fine-tune last block",
    "finetune_full": "fine-tune all",
    "maskrcnn": "Mask R-CNN",
    "unet": "U-Net",
}
METRICS = ("accuracy", "balanced accuracy", "macro-F1", "AUROC", "average precision", "expected calibration error")
METRICS += ("R2", "MAE", "Spearman", "Dice", "PPV", "sensitivity", "HD95", "COCO AP", "COCO AP50")
COMPARED = ("macro-F1", "AUROC", "R2", "Dice", "COCO AP")


def interval(estimate: dict | None, sign: str = "", metric: str = "") -> str:
    """'61.2 [50.3, 70.1]', in points of 100, or of R2 and others as they are. sign: '+' shows it."""
    if estimate is None:
        return "–"
    factor, digits = (100, 1) if unit(metric) == "%" else (1, 1 if unit(metric) else 3)
    value, low, high = (factor * estimate[key] for key in ("value", "low", "high"))
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def heading(metric: str) -> str:
    """'AUROC (%)', 'HD95 (px)', 'R2'."""
    return f"{metric} ({unit(metric)})" if unit(metric) else metric


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
        f"**Left out:** {escaped(r['backbone'])} on {escaped(result['tasks'][r['task']]['title'])}: it was "
        f"pretrained on {r['groups']} of the groups that this task tests."
        for r in result["refused"]
    ]
    parts += [
        f"**Look-alikes:** {len(a['pairs'])} of the files of {escaped(result['tasks'][a['task']]['title'])} look like "
        f"some of {escaped(a['backbone'])}: they may be the same pictures, encoded again or resized. See the plots."
        for a in result.get("look_alikes", ())
    ]
    return "\n\n".join(parts)


def in_order(row: dict) -> tuple:
    """What is to be compared stands together: backbones are the last to change."""
    return list(NAMES).index(row["protocol"]), row["fraction"], row["level"] == "frame"


def labels_kept(fraction: float) -> str:
    """A share of the labels in percent, or their number."""
    return f"{fraction:.0%}" if fraction <= 1 else f"{fraction:g}"


def _kind(row: dict) -> list[str]:
    return [row["backbone"], NAMES[row["protocol"]], labels_kept(row["fraction"]), row["level"]]


HEAD = ["backbone", "protocol", "labels", "level"]


def markdown_tables(result: dict, by_class: bool = True) -> str:
    """For every task its results, the differences from the backbones of `compare` (default: the first one), and the
    results by class."""
    parts = []
    for name, task in result["tasks"].items():
        rows = sorted((r for r in result["results"] if r["task"] == name), key=in_order)
        if not rows:
            continue
        metrics = [m for m in METRICS if any(m in r["metrics"] for r in rows)]
        parts += [f"## {escaped(task['title'])}", counts(task)]
        cells = [[*_kind(r), r["n"], *(interval(r["metrics"].get(m), "", m) for m in metrics)] for r in rows]
        parts.append(table([*HEAD, "n", *map(heading, metrics)], cells))
        undefined = max(e["undefined_draws"] for r in rows for e in r["metrics"].values())
        if undefined:
            parts.append(f"Up to {undefined} draws lacked a class; the intervals are of the others.")
        for first in result["config"].get("compare") or [rows[0]["backbone"]]:  # of what was tested on this task
            parts += _differences(result, name, first)
        if by_class:
            parts += _by_class(rows, task["classes"])
    return "\n\n".join(parts)


def _differences(result: dict, task: str, first: str) -> list[str]:
    found = [
        [*_kind(d), d["metric"], interval(d, "+", d["metric"]), d["verdict"]]
        for d in sorted(result["differences"], key=in_order)
        if d["task"] == task and d["against"] == first and d["metric"] in COMPARED
    ]
    if not found:
        return []
    words = (
        f'Paired differences from {escaped(first)}, on the same folds and draws; "better" and "worse" '
        "only where the interval excludes 0:"
    )
    return [words, table([*HEAD, "metric", "difference (points)", "verdict"], found)]


def _by_class(rows: list[dict], classes: list[str]) -> list[str]:
    """What every class, label or column reaches on its own."""
    for metrics in (("precision", "recall", "F1"), ("F1", "AUROC", "average precision"), ("R2", "MAE", "Spearman")):
        cells = [
            [*_kind(r), c, *(interval(r["metrics"][f"{m} {c}"], "", m) for m in metrics)]
            for r in rows
            for c in classes
            if all(f"{m} {c}" in r["metrics"] for m in metrics)
        ]
        if cells:
            what = "By class:" if metrics[0] == "precision" else "By column:"
            return [what, table([*HEAD, what[3:-1], *map(heading, metrics)], cells)]
    return []


def counts(task: dict) -> str:
    of = [f"{n} {escaped(c)} ({task['groups_by_class'][c]} groups)" for c, n in task["by_class"].items()]
    of += [
        f"{escaped(name)} {known['mean']:.4g} on average ({known['min']:.4g} to {known['max']:.4g})"
        for name, known in task.get("columns", {}).items()
    ]
    text = (
        f"{task['found']} files found, {task['used']} used, {len(task['excluded'])} excluded; "
        f"{task['groups']} groups; {', '.join(of)}."
    )
    if once := task.get("tested_once"):
        text += f" No folds: {once} are tested once, by what the other {task['used'] - once} taught."
    return text


def data_notes(result: dict) -> str:
    """What was excluded and why, and what a reader must know of each task."""
    parts = ["## Data"]
    for task in result["tasks"].values():
        lines = [f"- {escaped(note)}" for note in task["notes"]]
        lines += [f"- excluded: {escaped(name)}: {escaped(reason)}" for name, reason in task["excluded"]]
        parts += [f"### {escaped(task['title'])}", counts(task), "\n".join(lines)]
    return "\n\n".join(parts)
