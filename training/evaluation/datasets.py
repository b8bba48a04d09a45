"""The downstream tasks: which files, which label, which group (patient), which frames, which folds.

Nothing is dropped silently: a file that cannot be used stays in the task's `excluded` with the reason, and the
report prints both counts. A task of which too much is excluded does not run.
"""

import hashlib
import json
import os
import re
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Callable

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from uscl_hub.checkpoints import sha256
from uscl_hub.clips import Clip, UnreadableClip, content_hash
from uscl_hub.clips.clip import IMAGE, VIDEO
from uscl_hub.clips.decode import decode
from uscl_hub.clips.read import read_clip
from uscl_hub.errors import UserError
from uscl_hub.files import open_regular, write_whole
from uscl_hub.labels.groups import DUPLICATE, near_duplicates
from uscl_hub.labels.rows import read_rows

UNKNOWN_FPS = 25.0  # of a moving file that does not say
NAMES = ("pocus", "busi", "busi3", "blues", "blues_point", "busi_seg", "bus_uc", "ovary")
VERSION = 1  # of everything that decides cached numbers: decoding, protocols, training


class EvaluationError(UserError):
    """Something in an evaluation's settings or data that the user can mend."""


class TaskError(EvaluationError):
    """A data set that cannot be evaluated as it is."""


@dataclass(frozen=True)
class Item:
    """One labelled file. aliases: other names under which its group may stand in a checkpoint's provenance."""

    id: str
    path: Path
    kind: str  # 'video', 'image', 'dicom' or 'frames'
    label: str
    group: str
    masks: tuple[Path, ...] = ()
    aliases: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()  # of a numbered series, whose first one is path
    values: tuple[float, ...] = ()  # of several labels (0 or 1) or of a regression

    @property
    def clip(self) -> Clip:
        return Clip(self.id, "", self.kind, self.files or (self.path,))

    @cached_property
    def sha256(self) -> str:
        """Of the content, as uscl_hub.clips.content_hash has it."""
        return content_hash(self.clip)

    @cached_property
    def file_sha256(self) -> tuple[str, ...]:
        """Of each file of a numbered series."""
        return tuple(sha256(path) for path in self.files)


@dataclass
class Task:
    """A question and the files that it is asked of.

    classes: of several labels or of a regression the names of the columns. excluded: (id, reason) of files that belong
    to the task and cannot be used. notes: what a reader must know. kind: 'classification', 'segmentation',
    'multilabel' or 'regression'. external: items whose id is in it are tested once, by what all others taught; empty:
    the task is tested in folds.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    items: list[Item]
    excluded: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kind: str = "classification"
    external: frozenset[str] = frozenset()

    @property
    def found(self) -> int:
        return len(self.items) + len(self.excluded)

    @property
    def labels(self) -> np.ndarray:  # int (items,), an index into classes
        return np.array([self.classes.index(item.label) for item in self.items])

    @property
    def targets(self) -> np.ndarray:
        """What is to be predicted: labels, or float32 (items, classes) for several labels and regression."""
        if self.kind in ("multilabel", "regression"):
            return np.array([item.values for item in self.items], np.float32)
        return self.labels

    @property
    def strata(self) -> np.ndarray:
        """What folds and subsets are balanced by, int (items,): labels; for regression fifths of the first column."""
        if self.kind == "regression":
            first = self.targets[:, 0]
            return np.searchsorted(np.quantile(first, (0.2, 0.4, 0.6, 0.8)), first)
        return np.zeros(len(self.items), int) if self.kind == "multilabel" else self.labels

    @property
    def groups(self) -> np.ndarray:  # str (items,)
        return np.array([item.group for item in self.items])

    @property
    def has_video(self) -> bool:
        return any(item.kind == "video" for item in self.items)


def load_task(name: str, data: Path, blues: Path) -> Task:
    """One of NAMES. Raises TaskError.

    data: the folder with pocus_lung, busi, bus_uc and ovary; blues: the folder covid_blues.
    """
    if name not in NAMES:
        raise TaskError(f"no task {name!r}: choose from {', '.join(NAMES)}")
    if name == "pocus":
        return pocus(Path(data) / "pocus_lung")
    if name == "bus_uc":
        return bus_uc(Path(data) / "bus_uc")
    if name == "ovary":
        return ovary(Path(data) / "ovary")
    return covid_blues(Path(blues), name) if name.startswith("blues") else busi(Path(data) / "busi", name)


# ------------------------------------------------------------------------------------------------- the data sets


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


def covid_blues(root: Path, name: str = "blues") -> Task:
    """COVID-BLUES (Wiedemann et al. 2025), grouped by patient.

    name: 'blues' (severity score >= 2 against < 2 of a clip), or 'blues_point' (at which of a lung's three BLUE points
    the clip was taken, from its name: a question that needs no expert, for tuning a pretraining).
    """
    if name == "blues_point":
        return _blue_points(root)
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


def _blue_points(root: Path) -> Task:
    items, excluded = [], []
    for path in _files(root, VIDEO):
        if match := re.match(r"(patient_\d+)_[LR]([123])(_\d+)?$", path.stem):
            group = f"{root.name}/{match[1]}"
            items.append(Item(_id(path, root), path, "video", f"point {match[2]}", group, aliases=(match[1],)))
        else:
            excluded.append((_id(path, root), "its name is not patient_N and a point from L1 to R3"))
    classes, notes = ("point 1", "point 2", "point 3"), ["the group is the patient"]
    return _same_file_in_one_group(Task("blues_point", "COVID-BLUES scan point", classes, items, excluded, notes))


def busi(root: Path, name: str = "busi") -> Task:
    """BUSI breast images (Al-Dhabyani et al. 2020), grouped by near-duplicate cluster over all three classes.

    name: 'busi' (benign, malignant), 'busi3' (and normal), or 'busi_seg', where an image without its mask is excluded.
    """
    title, classes = {
        "busi": ("BUSI benign / malignant", ("benign", "malignant")),
        "busi3": ("BUSI 3 classes", ("benign", "malignant", "normal")),
        "busi_seg": ("BUSI lesion segmentation", ("benign", "malignant")),
    }[name]
    return _class_folders(Task(name, title, classes, []), root, ("benign", "malignant", "normal"), name == "busi_seg")


def bus_uc(root: Path) -> Task:
    """BUS-UC breast images, benign and malignant, grouped by near-duplicate cluster."""
    classes = ("benign", "malignant")
    return _class_folders(Task("bus_uc", "BUS-UC benign / malignant", classes, []), root, classes)


def ovary(root: Path) -> Task:
    """Ovarian images (part of MMOTU), 8 classes, grouped by near-duplicate cluster."""
    classes = ("chocolate_cyst", "high_grade_serous", "mucinous_cystadenoma", "normal", "serous_cystadenoma")
    classes += ("simple_cyst", "teratoma", "theca_cell_tumour")
    return _class_folders(Task("ovary", "Ovary 8 classes", classes, []), root, classes)


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
    if not root.is_dir():
        raise TaskError(f"{root}: no such folder")
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in extensions and path.is_file() and not path.name.startswith(".")
    )


def _id(path: Path, root: Path) -> str:
    return f"{root.name}/{path.relative_to(root).as_posix()}"


# ----------------------------------------------------------------------------------------------------- frames


@dataclass
class Frames:
    """images: uint8 (N, px, px); item: int (N,), each frame's index into task.items. key: of all they depend on."""

    images: np.ndarray
    item: np.ndarray
    key: str


def load_frames(
    task: Task,
    px: int,
    cache: Path,
    rate: float = 3.0,
    crop: str = "none",
    workers: int = 0,
    max_excluded: float = 0.05,
) -> Frames:
    """Decode every item once, at about `rate` frames per second, to px squares; later calls read the cache.

    crop: 'none', or 'crop' / 'blank' for the detected moving region (uscl_hub/clips/crop.py). workers: threads, 0: one
    a core. Items that cannot be decoded are moved from task.items to task.excluded with the reason. Raises TaskError if
    more than the share `max_excluded` of all found items is excluded by then.
    """

    def decode_all():
        jobs = [(item, px, rate, crop) for item in task.items]
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:  # decoders and resizing release the GIL
            decoded = list(pool.map(_decode, jobs))
        return {
            "images": np.concatenate([np.zeros((0, px, px), np.uint8), *(frames for frames, _, _ in decoded)]),
            "item": np.repeat(np.arange(len(decoded)), [len(frames) for frames, _, _ in decoded]),
            "reasons": np.array([reason for _, reason, _ in decoded]),
            "notes": np.array([note for _, _, note in decoded]),
        }

    described = ["frames", px, rate, crop, [(item.id, item.sha256) for item in task.items]]
    saved = cached(cache, described, decode_all)
    unreadable = np.flatnonzero(saved["reasons"] != "")
    task.excluded += [(task.items[i].id, f"unreadable: {saved['reasons'][i]}") for i in unreadable]
    notes = [f"{item.id}: {note}" for item, note in zip(task.items, saved["notes"]) if note]
    task.notes += [note for note in notes if note not in task.notes]  # said once, however many sizes are decoded
    kept = np.setdiff1d(np.arange(len(task.items)), unreadable)
    task.items = [task.items[i] for i in kept]
    check_excluded(task, max_excluded)
    return Frames(saved["images"], np.searchsorted(kept, saved["item"]), digest(described))


def digest(described) -> str:
    """20 hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:20]


def cached(folder: Path, described: list, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of make(), kept in `folder` by what they depend on; a damaged file is made again.

    described: JSON values, the first one its kind. Raises EvaluationError: they cannot be kept.
    """
    file = Path(folder) / f"{described[0]}-{digest([VERSION, *described])}.npz"
    with suppress(OSError, EOFError, ValueError, zipfile.BadZipFile), open_regular(file) as opened:
        with np.load(opened) as saved:
            return dict(saved)
    arrays = {name: np.asarray(value) for name, value in make().items()}
    try:
        write_whole(file, partial(np.savez, **arrays))
    except OSError as error:
        reason = error.strerror or error
        raise EvaluationError(f"{file}: cannot be written ({reason}); make room, or choose another --cache") from error
    return arrays


def check_excluded(task: Task, max_excluded: float):
    if not task.items or len(task.excluded) > max_excluded * task.found:
        listing = "\n".join(f"  {name}: {reason}" for name, reason in task.excluded[:20])
        raise TaskError(
            f"{task.title}: {len(task.excluded)} of {task.found} files cannot be used, more than "
            f"--max-excluded {max_excluded:g} allows; mend them or raise it:\n{listing}"
        )


def _decode(job) -> tuple[np.ndarray, str, str]:
    """Frames, uint8 (T, px, px), the reason why there are none, and what a reader should know of them."""
    item, px, rate, crop = job
    try:
        clip = read_clip(item.clip, px, crop=crop)
    except UnreadableClip as error:
        return np.zeros((0, px, px), np.uint8), error.reason, ""
    return clip.images[frame_numbers(len(clip.images), clip.fps, rate)], "", "; ".join(clip.notes)


def frame_numbers(frames: int, fps: float | None, rate: float) -> np.ndarray:
    """Which frames of a clip are taken, int: the first one at or after every 1 / rate seconds, each once."""
    step = max(1.0, (fps or UNKNOWN_FPS) / rate)
    return np.ceil(np.arange(0, frames, step) - 1e-9).astype(int).clip(max=frames - 1)


# ------------------------------------------------------------------------------------------------------ folds


def make_folds(
    labels: np.ndarray, groups: np.ndarray, classes: tuple[str, ...], folds: int, seed: int, name: str = "task"
) -> np.ndarray:
    """The test fold of every item, int (items,): stratified by label, no group in two folds, from one seed.

    labels: int (items,). Raises TaskError, naming the class and its number of groups, if a test fold or what remains
    for training would lack a class.
    """
    assigned = np.full(len(labels), -1)
    for label, class_name in enumerate(classes):
        count = len(set(groups[labels == label]))
        if count < folds:
            raise TaskError(
                f"{name}: class {class_name!r} has {count} group(s), too few for {folds} folds that each "
                "hold every class; use fewer --folds or more data"
            )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for fold, (_, test) in enumerate(splitter.split(np.zeros(len(labels)), labels, groups)):
        assigned[test] = fold
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
    """Which training items keep their label, bool (items,): a share of the groups of every class, at least one.

    A group counts to the class of most of its items. A smaller share is a subset of a larger one with the same seed.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"label fraction must be in (0, 1], got {fraction}")
    by_class = defaultdict(list)
    for group in sorted(set(groups)):
        by_class[int(np.bincount(labels[groups == group]).argmax())].append(group)
    kept = set()
    for label, members in sorted(by_class.items()):
        order = np.random.default_rng([seed, label]).permutation(len(members))
        kept.update(members[i] for i in order[: max(1, round(fraction * len(members)))])
    return np.isin(groups, sorted(kept))
