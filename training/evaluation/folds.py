"""Folds and shares of labels, by whole groups, from one seed."""

import warnings
from collections import defaultdict

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from training.evaluation.task import Task, TaskError


def task_folds(task: Task, folds: int, seed: int) -> np.ndarray:
    """The test fold of every item, int (items,); -1 for those that an external test only learns from."""
    if task.external:
        return np.array([0 if item.id in task.external else -1 for item in task.items])
    if task.kind in ("classification", "segmentation"):
        return make_folds(task.labels, task.groups, task.classes, folds, seed, task.title)
    if (groups := len(set(task.groups))) < folds:
        raise TaskError(
            f"{task.title}: {groups} group(s) are too few for {folds} folds; use fewer --folds or more data"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few items in a fifth: the folds are merely less alike
        return stratified(task.strata, task.groups, folds, seed)


def stratified(strata: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The test fold of every item, int (items,): no group in two folds; each stratum, an int, is spread over them, but
    for strata that are all of fewer items than there are folds."""
    if np.unique(strata, return_counts=True)[1].max() < folds:
        strata = np.zeros(len(strata), int)
    assigned = np.full(len(strata), -1)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for fold, (_, test) in enumerate(splitter.split(strata, strata, groups)):
        assigned[test] = fold
    return assigned


def make_folds(
    labels: np.ndarray, groups: np.ndarray, classes: tuple[str, ...], folds: int, seed: int, name: str = "task"
) -> np.ndarray:
    """The test fold of every item, int (items,): stratified by label, no group in two folds, from one seed.

    labels: int (items,). Raises TaskError, naming the class and its number of groups, if a test fold or what remains
    for training would lack a class.
    """
    for label, class_name in enumerate(classes):
        count = len(set(groups[labels == label]))
        if count < folds:
            raise TaskError(
                f"{name}: class {class_name!r} has {count} group(s), too few for {folds} folds that each "
                "hold every class; use fewer --folds or more data"
            )
    assigned = stratified(labels, groups, folds, seed)
    for fold in range(folds):
        for label, class_name in enumerate(classes):
            for part, where in ((labels[assigned == fold], "test part"), (labels[assigned != fold], "training part")):
                if not (part == label).any():
                    raise TaskError(
                        f"{name}: the {where} of fold {fold} (seed {seed}) has no {class_name!r}; use "
                        f"fewer --folds or another seed"
                    )
    return assigned


def label_subset(labels: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which training items keep their label, bool (items,): whole groups, of every class at least one.

    fraction: up to 1 a share of the groups of every class; above 1 a number of items, the classes in proportion: groups
    are added until they hold that many, so that the last one may bring a few more. A group counts to the class of most
    of its items. A smaller subset is part of a larger one with the same seed. Raises TaskError if items are too few.
    """
    if not 0 < fraction < np.inf:
        raise ValueError(f"a label fraction must be above 0, got {fraction}")
    if fraction > len(groups):
        raise TaskError(f"{fraction:g} labelled files were asked for, the training part has {len(groups)}")
    by_class = defaultdict(list)
    for group in sorted(set(groups)):
        by_class[int(np.bincount(labels[groups == group]).argmax())].append(group)
    kept, waiting = [], []  # waiting: (place in its class's order as a share, group)
    for label, members in sorted(by_class.items()):
        order = [members[i] for i in np.random.default_rng([seed, label]).permutation(len(members))]
        first = max(1, round(fraction * len(members))) if fraction <= 1 else 1
        kept += order[:first]
        waiting += [((i + 0.5) / len(order), group) for i, group in enumerate(order) if i >= first]
    if fraction > 1:
        size = dict(zip(*np.unique(groups, return_counts=True)))
        total = sum(size[group] for group in kept)
        for _, group in sorted(waiting):
            if total >= fraction:
                break
            kept.append(group)
            total += size[group]
    return np.isin(groups, kept)
