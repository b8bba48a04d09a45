"""Clips whose pairs look wrong: a ranking, how well rankings find faults that were planted, a table and pictures."""

import csv
from functools import partial

import numpy as np
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from uscl_hub.clips.pictures import contact_sheet, tile
from uscl_hub.files import write_whole

RANKINGS = {"weight": 1, "similarity": 1, "loss": -1}  # times it: the lower, the more suspicious


def by_clip(pairs):
    """The pairs' numbers averaged by clip.

    Args:
        pairs: arrays (n,): clip, fault ('' for right pairs), and those of RANKINGS that are known.

    Returns:
        The same for clips (m,), sorted by clip, with `pairs`, the number of each; a clip's fault is that of any pair.
    """
    clips, row, count = np.unique(pairs["clip"], return_inverse=True, return_counts=True)
    found = {"clip": clips, "pairs": count, "fault": np.full(len(clips), "", object)}
    for name in RANKINGS.keys() & pairs.keys():
        found[name] = np.bincount(row, pairs[name]) / count
    for i, fault in zip(row, pairs["fault"]):
        found["fault"][i] = fault or found["fault"][i]
    return found


def order(found, by):
    """Rows of `by_clip`, the most suspicious first."""
    return np.argsort(RANKINGS[by] * found[by], kind="stable")


def quality(found, top):
    """How well each ranking finds the planted faults.

    Args:
        found: of `by_clip`, with faults.
        top: clips that somebody would look at.

    Returns:
        By ranking: precision and recall of the first `top`, average precision, AUROC, and the recall by kind of fault.

    >>> found = {"fault": np.array(["cut", "", "", "black"]), "loss": np.array([4.0, 1.0, 3.0, 2.0])}
    >>> quality(found, 2)["loss"]["precision"], quality(found, 2)["loss"]["kinds"]
    (0.5, {'black': 0.0, 'cut': 1.0})
    """
    wrong, result = found["fault"] != "", {}
    for name in RANKINGS:
        if name in found:
            first = order(found, name)[:top]
            kinds = sorted(set(found["fault"][wrong]))
            score = -RANKINGS[name] * found[name]
            result[name] = {
                "precision": float(wrong[first].mean()),
                "recall": float(wrong[first].sum() / wrong.sum()),
                "average_precision": float(average_precision_score(wrong, score)),
                "auroc": float(roc_auc_score(wrong, score)),
                "kinds": {k: float((found["fault"][first] == k).sum() / (found["fault"] == k).sum()) for k in kinds},
            }
    return result


def write_csv(path, found, rows, names):
    """The clips of these rows, in this order: rank, clip's id, number of pairs, mean numbers, planted fault if any."""
    columns = [name for name in RANKINGS if name in found]
    planted = ["fault"] if any(found["fault"]) else []

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["rank", "clip", "pairs", *columns, *planted])
            for rank, row in enumerate(rows, start=1):
                numbers = [f"{found[name][row]:.5f}" for name in columns]
                name = names[found["clip"][row]]
                table.writerow([rank, name, found["pairs"][row], *numbers, *(found[p][row] for p in planted)])

    write_whole(path, write)


def write_sheet(path, pictures, titles, columns=5):
    """A contact sheet as PNG: the two views of each clip side by side.

    Args:
        pictures: uint8 (n, 2, S, S); titles: n lines of text.
    """
    tiles = [tile([Image.fromarray(view) for view in pair], title) for pair, title in zip(pictures, titles)]
    write_whole(path, partial(contact_sheet(tiles, columns).save, format="PNG"))
