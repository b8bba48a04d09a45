"""Own labelled data as a task: a folder or a table, and if wanted another one that is tested once."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from training.evaluation.task import Item, Task, TaskError
from uscl_hub.labels import Item as Labelled
from uscl_hub.labels import Labels, cluster, read_labels

NAME = "own"
TITLES = {"multilabel": "several labels", "regression": "regression", "segmentation": "segmentation"}


@dataclass(frozen=True)
class OwnData:
    """Where the labels are and how they are read. data, test: see `uscl_hub.labels.read_labels`; test: '' for folds.
    task: 'classification', 'multilabel', 'regression', 'segmentation', '' to see from the labels. columns: of the
    table; (): all labels. classes: only these, in this order; (): all. frames: 'images' or 'clip'."""

    data: str
    test: str = ""
    task: str = ""
    columns: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    frames: str = "images"


def load_own(source: OwnData) -> Task:
    """The task of own data. Raises UserError, in one line, for labels that cannot be used."""
    found = _read(source, source.data)
    held_out = found.splits == "test"
    if source.test:
        if held_out.any():
            raise TaskError(
                f"{source.data}: has rows of the split 'test', and --test names another test set; leave one of them out"
            )
        parts = [found, _read(replace(source, task=found.task), source.test)]
        _same_question(*parts)
    elif held_out.all():
        raise TaskError(f"{source.data}: every row is of the split 'test': nothing is left to learn from")
    else:
        found = cluster(found)
        parts = [found.subset(~held_out), found.subset(held_out)] if held_out.any() else [found]
    return _task(source, [cluster(part) for part in parts])


def _read(source: OwnData, where: str) -> Labels:
    found = read_labels(where, source.task or None, columns=source.columns, frames=source.frames)
    if not source.classes:
        return found
    if found.task != "classification":
        raise TaskError(f"{where}: --classes is for classification, this is {found.task}; choose with --columns")
    if absent := sorted(set(source.classes) - set(found.classes)):
        raise TaskError(f"{where}: --classes: no {', '.join(absent)}; its classes are {', '.join(found.classes)}")
    names = np.array(found.classes)[found.targets]
    kept = np.isin(names, source.classes)
    targets = np.array([source.classes.index(name) for name in names[kept]])
    return replace(found.subset(kept), classes=source.classes, targets=targets)


def _same_question(found: Labels, test: Labels):
    """Raises TaskError where the second data set cannot test what the first one teaches, or shares files with it."""
    if test.classes != found.classes:
        raise TaskError(
            f"{test.source}: its classes or columns are {', '.join(test.classes)}, those of {found.source} "
            f"{', '.join(found.classes)}. Name the same ones, or choose with --classes (or --columns)"
        )
    known = {item.sha256: item.id for item in map(_item, found.items)}
    if same := [(known[item.sha256], item.id) for item in map(_item, test.items) if item.sha256 in known]:
        raise TaskError(
            f"{test.source}: {len(same)} file(s) are in the training data too, as {same[0][1]} = {same[0][0]}. Leave "
            "them out of one of the two"
        )


def _item(
    item: Labelled, name: str = "", prefix: str = "", values: tuple[float, ...] = (), named: bool = False
) -> Item:
    """named: whether the group's name is one that was given, so that a training may know it, too."""
    files = item.clip.files if item.kind == "frames" else ()
    group = f"{prefix}{item.group or item.id}"
    id = f"{prefix}{item.id}"
    aliases = (item.group,) if named else ()
    return Item(id, item.clip.files[0], item.kind, name, group, item.masks, aliases, files=files, values=values)


def _task(source: OwnData, parts: list[Labels]) -> Task:
    first, names = parts[0], [_name(part) for part in parts]
    items, external, notes = [], set(), []
    for number, (part, name) in enumerate(zip(parts, names)):
        tested = number == 1
        prefix = f"{name}/" if len(set(names)) == len(names) or not tested else f"test/{name}/"
        own = [_item(*row, named=part.groups_known) for row in _rows(part, prefix)]
        items += own
        external |= {item.id for item in own} if tested else set()
        where = f"{name}: " if len(parts) > 1 else ""
        notes += [f"{where}{note.replace(f'{part.source.parent}/', '')}" for note in part.notes]
    notes += _of_the_split(parts, names)
    title = f"{names[0]}: {TITLES.get(first.task, ' / '.join(first.classes) if len(first.classes) < 4 else 'classes')}"
    title += f", tested on {names[1]}" if source.test else ", tested on its split 'test'" if len(parts) > 1 else ""
    return Task(NAME, title, first.classes, items, notes=list(dict.fromkeys(notes)), kind=first.task,
                external=frozenset(external))  # fmt: skip


def _name(labels: Labels) -> str:
    """Of a table its own name, or for labels.csv its folder's."""
    path = labels.source.resolve()
    return path.parent.name if path.is_file() and path.stem == "labels" else path.stem if path.is_file() else path.name


def _rows(part: Labels, prefix: str):
    for item, target in zip(part.items, part.targets):
        if part.task in ("multilabel", "regression"):
            yield item, "", prefix, tuple(map(float, target))
        else:
            yield item, part.classes[target], prefix


def _of_the_split(parts: list[Labels], names: list[str]) -> list[str]:
    """What a reader must know of an external test."""
    if len(parts) == 1:
        return []
    train, test = parts
    notes = [f"trained on all {len(train.items)} files of {names[0]}, tested once on {len(test.items)} of {names[1]}"]
    if both := sorted({item.group for item in train.items if item.group} & {i.group for i in test.items if i.group}):
        notes.append(
            f"{len(both)} group name(s) stand in both sets, as {both[0]}, and are taken for different patients"
        )
    if train.task == "classification":
        for part, name in zip(parts, names):
            counts = Counter(part.targets.tolist())
            if absent := [label for i, label in enumerate(part.classes) if not counts[i]]:
                raise TaskError(f"{name}: has no file of {', '.join(absent)}; choose the others with --classes")
    return notes
