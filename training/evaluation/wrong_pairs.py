"""What the weights did with pairs that were made wrong on purpose (pairs.corrupt), read from a training's log.jsonl."""

import json
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from training.evaluation.tables import table

NAMES = ("weight", "similarity", "loss")


def read(path):
    """The logged pairs of a training, a dict of arrays (pairs,): step, clip, fault, similarity, loss, weight.

    fault: '' of a right pair, else its kind.

    A weight is relative to the mean of its batch (only ratios count): 1 in plain steps. Returns None where no pair was
    made wrong on purpose.
    """
    columns = {name: [] for name in ("step", "clip", "fault", "similarity", "loss", "weight")}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "faults" not in row:
            continue
        weights = np.array(row.get("weights") or np.ones(len(row["clips"])))
        columns["step"].append(np.full(len(row["clips"]), row["step"]))
        columns["clip"].append(row["clips"])
        columns["fault"].append(row["faults"])
        columns["similarity"].append(row["similarity"])
        columns["loss"].append(row["losses"])
        columns["weight"].append(weights / weights.mean())
    return {name: np.concatenate(parts) for name, parts in columns.items()} if columns["step"] else None


def parts_of_training(pairs, count=5):
    """(first step, last step, the pairs of these steps) for equal parts of the training."""
    edges = np.linspace(pairs["step"].min() - 1, pairs["step"].max(), count + 1).round().astype(int)
    for low, high in zip(edges, edges[1:]):
        chosen = (pairs["step"] > low) & (pairs["step"] <= high)
        yield low + 1, high, {name: values[chosen] for name, values in pairs.items()}


def auroc(pairs, name):
    """Of finding the wrong pairs by a low weight or similarity, or a high loss; NaN without both kinds of pairs."""
    wrong = pairs["fault"] != ""
    if len(set(wrong)) < 2:
        return float("nan")
    return float(roc_auc_score(wrong, pairs[name] if name == "loss" else -pairs[name]))


def without(pairs, kind):
    """All pairs but those of one kind of fault."""
    return {name: values[pairs["fault"] != kind] for name, values in pairs.items()}


def only(pairs, kind):
    """The right pairs and those of one kind of fault."""
    chosen = (pairs["fault"] == "") | (pairs["fault"] == kind)
    return {name: values[chosen] for name, values in pairs.items()}


def effective_share(pairs):
    """Mean over the steps of the effective sample size 1 / sum(w ** 2), w of sum 1, as a share of the batch.

    >>> effective_share({"step": np.array([1, 1, 2, 2]), "weight": np.array([1.0, 1.0, 2.0, 0.0])})
    0.75
    """
    if not len(pairs["step"]):
        return float("nan")
    _, step, size = np.unique(pairs["step"], return_inverse=True, return_counts=True)
    total, squares = np.bincount(step, pairs["weight"]), np.bincount(step, pairs["weight"] ** 2)
    return float(np.mean(total**2 / squares / size))


def compare(logs):
    """Markdown: how well the weights of several arms find the wrong pairs, in the last fifth of their trainings.

    logs: by arm, a list of what `read` gave, one for each seed; AUROCs are means over them.
    """
    rows = []
    for arm, seeds in logs.items():
        parts = [[part for *_, part in parts_of_training(pairs)] for pairs in seeds]
        last = [of_seed[-1] for of_seed in parts]
        through = [f"{np.mean([auroc(p[i], 'weight') for p in parts]):.2f}" for i in range(len(parts[0]))]
        found = [f"{np.mean([auroc(part, name) for part in last]):.3f}" for name in NAMES]
        visible = [np.mean([auroc(without(part, "frozen"), name) for part in last]) for name in NAMES]
        cells = [f"{a} ({b:.3f})" for a, b in zip(found, visible)]
        rows.append([arm, len(seeds), " ".join(through), *cells, f"{np.mean(list(map(effective_share, last))):.3f}"])
    head = ["arm", "seeds", "AUROC of weight, by fifths of the training"]
    head += ["of weight in the last fifth (without frozen)", "of similarity", "of loss", "effective share of the batch"]
    return table(head, rows)


def describe(pairs, sources):
    """Markdown, by fifths of the training: AUROC of weight, similarity and loss, effective sample size, mean weights;
    and of the last fifth the AUROC by kind of fault.

    sources: the name of every cached clip's source.
    """
    names = sorted(set(np.asarray(sources)[pairs["clip"]]))
    rows = []
    for first, last, part in parts_of_training(pairs):
        source = np.asarray(sources)[part["clip"]]
        wrong = part["fault"] != ""
        means = [part["weight"][wrong].mean() if wrong.any() else np.nan]
        means += [part["weight"][source == name].mean() if (source == name).any() else np.nan for name in names]
        found = [f"{auroc(part, name):.3f}" for name in NAMES]
        rows.append([f"{first}–{last}", *found, f"{effective_share(part):.3f}", *(f"{m:.3f}" for m in means)])
    head = ["steps", "AUROC of weight", "of similarity", "of loss", "effective share of the batch"]
    head += ["mean weight of wrong pairs", *(f"of {name}" for name in names)]
    kinds = sorted(set(part["fault"]) - {""})
    by_kind = [[name, *(f"{auroc(only(part, kind), name):.3f}" for kind in kinds)] for name in NAMES]
    return (
        f"Pairs made wrong on purpose: {np.mean(pairs['fault'] != ''):.1%} of {len(pairs['fault'])}. "
        f"The mean weight of a batch is 1.\n\n{table(head, rows)}\n\n"
        f"AUROC in the steps {first}–{last} by kind of fault:\n\n{table(['by', *kinds], by_kind)}"
    )
