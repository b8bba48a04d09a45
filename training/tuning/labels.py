"""The labels of a run: read, grouped, and cut to the classes and the number that are asked for."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from uscl_hub.labels import LabelError, Labels, cluster, read_labels


def read(
    source,
    task: str = "auto",
    columns: tuple[str, ...] = (),
    classes: tuple[str, ...] = (),
    frames: str = "images",
) -> Labels:
    """Labels with groups; see `uscl_hub.labels.read_labels`.

    Args:
        task: 'auto', or one of uscl_hub.labels.TASKS.
        classes: only these, in this order; (): all.

    Raises:
        LabelError: in one line.
    """
    found = read_labels(Path(source), None if task == "auto" else task, columns=columns, frames=frames)
    found = cluster(only(found, classes))
    if len(set(found.groups)) < 2:
        raise LabelError(f"{source}: all files belong to one group (or look alike): no part is left to test on")
    return found


def only(found: Labels, classes: tuple[str, ...]) -> Labels:
    if not classes:
        return found
    if found.task != "classification" or set(classes) - set(found.classes):
        raise LabelError(f"classes: {', '.join(classes)} are not all among {', '.join(found.classes)}")
    names = np.array(found.classes)[found.targets]
    kept = np.isin(names, classes)
    targets = np.array([classes.index(name) for name in names[kept]])
    if len(set(targets)) < 2:
        raise LabelError(f"classes: there are files of {len(set(targets))} of them only; at least two are needed")
    return replace(found.subset(kept), classes=tuple(classes), targets=targets)


def without_test(found: Labels) -> tuple[Labels, Labels | None]:
    """What may be learned from, and the rows whose column `split` says 'test', if any."""
    test = found.splits == "test"
    if not test.any():
        return found, None
    if test.all():
        raise LabelError(f"{found.source}: every row is of the split 'test': nothing is left to learn from")
    learned, tested = found.subset(~test), found.subset(test)
    check_whole(learned, f"{found.source}, without the rows of the split 'test',")
    check_whole(tested, f"{found.source}: the split 'test'")
    return learned, tested


def check_whole(found: Labels, where: str) -> None:
    """Raises LabelError, which begins with `where`, if a class is missing or all files belong to one group: scores and
    their intervals would not be defined."""
    if found.task == "classification":
        if lacking := sorted(set(range(len(found.classes))) - set(found.targets.tolist())):
            names = ", ".join(found.classes[c] for c in lacking)
            raise LabelError(f"{where} has no file of {names}: it needs files of every class")
    if len(set(found.groups)) < 2:
        raise LabelError(f"{where} is of one group: it needs files of two at least")


def limited(found: Labels, count: int, seed: int) -> Labels:
    """`count` items: groups of every class in a random order of their own, interleaved; nested for one seed."""
    if not count or count >= len(found.items):
        return found
    groups = found.groups
    first = {g: i for i, g in reversed(list(enumerate(groups)))}
    strata = found.targets if found.task == "classification" else np.zeros(len(groups), int)
    place = {}
    for c in sorted(set(strata[list(first.values())])):
        own = sorted(g for g, i in first.items() if strata[i] == c)
        for rank, i in enumerate(np.random.default_rng([seed, int(c)]).permutation(len(own))):
            place[own[i]] = (rank + 0.5) / len(own), int(c)
    order = sorted(range(len(groups)), key=lambda i: (place[groups[i]], groups[i], i))
    chosen = found.subset(np.sort(order[:count]))
    note = f"limited to {count} of {len(found.items)} labelled files (seed {seed})"
    return replace(chosen, notes=(*chosen.notes, note))
