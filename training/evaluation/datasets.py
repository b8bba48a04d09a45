"""The built-in tasks. Another one is another function here: see `built_in`.

Nothing is dropped silently: a file that cannot be used stays in the task's `excluded` with the reason, and the
report prints both counts. A task of which too much is excluded does not run.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from training.evaluation.folds import label_subset, make_folds  # noqa: F401  (their names here before)
from training.evaluation.frames import TaskFrames, cached, digest, frame_numbers, load_frames  # noqa: F401
from training.evaluation.task import EvaluationError, Item, Task, TaskError, check_excluded  # noqa: F401
from uscl_hub.clips import Clip, UnreadableClip
from uscl_hub.clips.clip import IMAGE, VIDEO
from uscl_hub.clips.decode import decode
from uscl_hub.errors import UserError
from uscl_hub.labels.groups import DUPLICATE, near_duplicates
from uscl_hub.labels.rows import read_rows

BUILT_IN: dict[str, tuple[str, Callable[[Path], Task]]] = {}  # name: (folder, function)


def built_in(folder: str):
    """Make a function a task of --tasks by its own name: it gets the path of `folder` and returns a Task.

    folder: in --data; 'covid_blues' is --blues itself.
    """

    def add(function):
        BUILT_IN[function.__name__] = folder, function
        return function

    return add


def load_task(name: str, data: Path, blues: Path) -> Task:
    """One of NAMES. Raises TaskError.

    data: the folder with pocus_lung, busi, bus_uc and ovary; blues: the folder covid_blues.
    """
    if name not in BUILT_IN:
        raise TaskError(f"no task {name!r}: choose from {', '.join(NAMES)}")
    folder, function = BUILT_IN[name]
    return function(Path(blues) if folder == "covid_blues" else Path(data) / folder)


# ------------------------------------------------------------------------------------------------- the data sets


@built_in("pocus_lung")
def pocus(root: Path) -> Task:
    """POCUS lung (Born et al. 2021): videos and images, 3 classes, grouped by patient, else by source.

    The label is the folder, and the same in file_index.csv.
    """
    classes, left_out = ("covid", "pneumonia", "regular"), ("viral", "uncertain")
    index = root / "file_index.csv"
    by_tail, by_stem = {}, defaultdict(list)
    for row in read_csv(index, ("path", "label", "patient_id", "source_id")):
        by_tail["/".join(row["path"].split("/")[-4:]).lower()] = row
        by_stem[Path(row["path"]).stem.lower()].append(row)
    items, excluded, skipped, used = [], [], Counter(), set()
    for path in _files(root, VIDEO | IMAGE):
        name, folder = _id(path, root), path.parent.name
        row = by_tail.get("/".join(path.parts[-4:]).lower())
        same = by_stem[path.stem.lower()]
        if row is None and len(same) == 1:  # listed under another folder or extension: the label must still agree
            row = same[0]
        if row is not None:
            used.add(row["path"])
        if folder in left_out and (row is None or row["label"] == folder):
            skipped[folder] += 1
        elif row is None:
            excluded.append((name, f"not in {index.name}: label and patient unknown; add a row for it"))
        elif row["label"] != folder:
            excluded.append((name, f"two labels: its folder says {folder}, {index.name} says {row['label']}"))
        elif folder not in classes:
            excluded.append((name, f"unknown label {folder!r}; expected one of {', '.join(classes + left_out)}"))
        elif not (row["patient_id"] or row["source_id"]):
            excluded.append((name, f"{index.name} gives neither patient_id nor source_id: its group is unknown"))
        else:
            group = f"patient_{row['patient_id']}" if row["patient_id"] else f"source_{row['source_id']}"
            kind = "video" if path.suffix.lower() in VIDEO else "image"
            items.append(Item(name, path, kind, folder, f"{root.name}/{group}"))
    kinds = Counter(item.kind for item in items)
    notes = [f"{kinds['video']} videos and {kinds['image']} images; the group is patient_id, else source_id"]
    notes += [f"left out by definition of the task: {n} {label}" for label, n in sorted(skipped.items())]
    if absent := sum(row["label"] in classes and row["path"] not in used for row in by_tail.values()):
        notes.append(f"{absent} rows of {index.name} have no file here (not all may be redistributed)")
    return _same_file_in_one_group(Task("pocus", "POCUS lung", classes, items, excluded, notes))


@built_in("covid_blues")
def blues(root: Path) -> Task:
    """COVID-BLUES (Wiedemann et al. 2025): severity score >= 2 against < 2 of a clip, grouped by patient."""
    table, scores = root / "severity.csv", defaultdict(set)
    for row in read_csv(table, ("video_file", "Severity Score")):
        scores[row["video_file"].removesuffix(".mp4")].add(row["Severity Score"])
    items, excluded, files = [], [], _files(root, VIDEO)
    for path in files:
        name, patient, given = _id(path, root), re.match(r"patient_\d+", path.stem), scores[path.stem]
        if not given - {""}:
            excluded.append((name, f"no severity score in {table.name}"))
        elif len(given) > 1:
            excluded.append((name, f"two labels: the scores {' and '.join(sorted(given))} in {table.name}"))
        elif not re.fullmatch(r"[0-3](\.\d*)?", *given):
            excluded.append((name, f"the score {''.join(given)!r} in {table.name} is not a number from 0 to 3"))
        elif patient is None:
            excluded.append((name, "its name does not begin with patient_N: the patient is unknown"))
        else:
            label = "score >= 2" if float(*given) >= 2 else "score < 2"
            items.append(Item(name, path, "video", label, f"{root.name}/{patient[0]}", aliases=(patient[0],)))
    for stem in sorted(scores.keys() - {path.stem for path in files}):
        excluded.append((f"{root.name}/{stem}", f"scored in {table.name}, but there is no video of that name"))
    classes, notes = ("score < 2", "score >= 2"), ["the group is the patient"]
    return _same_file_in_one_group(Task("blues", "COVID-BLUES severity", classes, items, excluded, notes))


@built_in("covid_blues")
def blues_point(root: Path) -> Task:
    """At which of a lung's three BLUE points a COVID-BLUES clip was taken, from its name: a question that needs no
    expert, for tuning a pretraining."""
    items, excluded = [], []
    for path in _files(root, VIDEO):
        if match := re.match(r"(patient_\d+)_[LR]([123])(_\d+)?$", path.stem):
            group = f"{root.name}/{match[1]}"
            items.append(Item(_id(path, root), path, "video", f"point {match[2]}", group, aliases=(match[1],)))
        else:
            excluded.append((_id(path, root), "its name is not patient_N and a point from L1 to R3"))
    classes, notes = ("point 1", "point 2", "point 3"), ["the group is the patient"]
    return _same_file_in_one_group(Task("blues_point", "COVID-BLUES scan point", classes, items, excluded, notes))


BUSI = ("benign", "malignant", "normal")  # Al-Dhabyani et al. 2020; clusters are over all three classes


@built_in("busi")
def busi(root: Path) -> Task:
    """BUSI breast images, benign and malignant, grouped by near-duplicate cluster."""
    return _class_folders(Task("busi", "BUSI benign / malignant", BUSI[:2], []), root, BUSI)


@built_in("busi")
def busi3(root: Path) -> Task:
    """BUSI breast images of all classes."""
    return _class_folders(Task("busi3", "BUSI 3 classes", BUSI, []), root, BUSI)


@built_in("busi")
def busi_seg(root: Path) -> Task:
    """The lesions of BUSI; an image without its mask is excluded."""
    task = Task("busi_seg", "BUSI lesion segmentation", BUSI[:2], [], kind="segmentation")
    return _class_folders(task, root, BUSI, with_masks=True)


@built_in("bus_uc")
def bus_uc(root: Path) -> Task:
    """BUS-UC breast images, benign and malignant, grouped by near-duplicate cluster."""
    classes = ("benign", "malignant")
    return _class_folders(Task("bus_uc", "BUS-UC benign / malignant", classes, []), root, classes)


@built_in("ovary")
def ovary(root: Path) -> Task:
    """Ovarian images (part of MMOTU), 8 classes, grouped by near-duplicate cluster."""
    classes = ("chocolate_cyst", "high_grade_serous", "mucinous_cystadenoma", "normal", "serous_cystadenoma")
    classes += ("simple_cyst", "teratoma", "theca_cell_tumour")
    return _class_folders(Task("ovary", "Ovary 8 classes", classes, []), root, classes)


NAMES = tuple(BUILT_IN)


@dataclass
class _Images:
    """What the folders of a data set hold, by id; masks by (label, stem of their image)."""

    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    path: dict[str, Path] = field(default_factory=dict)
    label: dict[str, str] = field(default_factory=dict)
    masks: dict[tuple[str, str], list[Path]] = field(default_factory=lambda: defaultdict(list))
    unreadable: list[tuple[str, str, str]] = field(default_factory=list)  # (id, label, reason)


def _read_images(root: Path, labels: tuple[str, ...]) -> _Images:
    found = _Images()
    for label in labels:
        for path in _files(root / label, IMAGE):
            if match := re.fullmatch(r"(.*)_mask(_\d+)?", path.stem):
                found.masks[label, match[1]].append(path)
                continue
            key = _id(path, root)
            try:
                found.pixels[key] = decode(Clip(key, root.name, "image", (path,)))[0][0]
                found.path[key], found.label[key] = path, label
            except UnreadableClip as error:
                found.unreadable.append((key, label, f"unreadable: {error.reason}"))
    return found


def _class_folders(task: Task, root: Path, labels: tuple[str, ...], with_masks: bool = False) -> Task:
    """Fills the empty task with the images of root/LABEL, grouped by near-duplicate cluster over all `labels`.

    Images of labels that are none of task.classes only count in the clusters. with_masks: an image without is excluded.
    """
    found = _read_images(root, labels)
    task.excluded = [(key, reason) for key, label, reason in found.unreadable if label in task.classes]
    keys, labels_of_pixels = list(found.pixels), defaultdict(dict)
    for key, image in found.pixels.items():
        labels_of_pixels[image.shape, image.tobytes()].setdefault(found.label[key], key)
    clusters = near_duplicates(list(found.pixels.values()))
    for key, cluster in zip(keys, clusters):
        label, image, stem = found.label[key], found.pixels[key], found.path[key].stem
        twins = [twin for other, twin in labels_of_pixels[image.shape, image.tobytes()].items() if other != label]
        own = found.masks[label, stem]
        if label not in task.classes:
            continue
        if twins:
            other = found.label[twins[0]]
            task.excluded.append((key, f"two labels on the same image: {label} here, {other} as {twins[0]}"))
        elif with_masks and not own:
            task.excluded.append((key, f"image without its mask: there is no {stem}_mask beside it"))
        else:
            own = tuple(sorted(own)) if with_masks else ()
            task.items.append(Item(key, found.path[key], "image", label, f"{root.name}/{keys[cluster]}", own))
    task.notes = _notes_on_images(task, found, len(set(clusters)))
    return task


def _notes_on_images(task: Task, found: _Images, clusters: int) -> list[str]:
    notes = [
        f"{clusters} near-duplicate clusters among all {len(found.path)} images (correlation of the 32 px images "
        f"above {DUPLICATE}); a cluster stays in one fold"
    ]
    members = defaultdict(list)
    for item in task.items:
        members[item.group].append(item)
    if mixed := [m for m in members.values() if len({item.label for item in m}) > 1]:
        named = "; ".join(" = ".join(item.path.name for item in m) for m in mixed)
        notes.append(f"near-duplicates, not identical, with different labels, kept, in one fold: {named}")
    if several := sum(len(item.masks) > 1 for item in task.items):
        notes.append(f"{several} images have several lesions: their masks are merged")
    with_image = {(found.label[key], path.stem) for key, path in found.path.items()}
    if orphans := sorted(path.name for key, files in found.masks.items() if key not in with_image for path in files):
        notes.append(f"masks without a readable image: {', '.join(orphans)}")
    return notes


def _same_file_in_one_group(task: Task) -> Task:
    """Identical bytes: with two labels they are excluded; with one, their groups become one."""
    same, joined, bad = defaultdict(list), {}, {}
    for item in task.items:
        same[item.sha256].append(item)

    def root(group):
        while group in joined:
            group = joined[group]
        return group

    for first, *copies in same.values():
        if len({item.label for item in (first, *copies)}) > 1:
            text = ", ".join(f"{item.id} ({item.label})" for item in (first, *copies))
            bad |= dict.fromkeys((item.id for item in (first, *copies)), f"two labels on the same file: {text}")
        for item in copies:
            task.notes.append(f"{item.id} and {first.id} are the same file: their groups are joined")
            if root(item.group) != root(first.group):
                joined[root(item.group)] = root(first.group)
    task.items = [
        replace(item, group=root(item.group), aliases=(*item.aliases, item.group))
        for item in task.items
        if item.id not in bad
    ]
    task.excluded += sorted(bad.items())
    return task


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict]:
    if not path.is_file():
        raise TaskError(f"{path}: no such file; it gives the labels (set --data or --blues to the data folder)")
    try:
        rows = read_rows(path)
    except UserError as error:
        raise TaskError(str(error)) from None
    if missing := set(columns) - set(rows[0]):
        raise TaskError(f"{path}: no column {', '.join(sorted(missing))}")
    return [{key: row[key] for key in columns} for row in rows]


def _files(root: Path, extensions: set[str]) -> list[Path]:
    """Files below a folder, sorted; linked folders are followed, each once."""
    if not root.is_dir():
        raise TaskError(f"{root}: no such folder")
    found, seen = [], set()
    for parent, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in extensions and path.is_file())


def _id(path: Path, root: Path) -> str:
    return f"{root.name}/{path.relative_to(root).as_posix()}"
