"""The downstream tasks: which files, which label, which group (patient), which frames, which folds.

Nothing is dropped silently: a file that cannot be used stays in the task's `excluded` with the reason, and the
report prints both counts. A task of which too much is excluded does not run.
"""

import csv
import hashlib
import json
import math
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from uscl_hub.media import IMAGE, VIDEO, Clip, UnreadableClip, decode, iter_frames
from uscl_hub.preprocess import resize

DUPLICATE = 0.94  # correlation of 32 px images; on BUSI few pairs lie between 0.93 and 0.96
UNKNOWN_FPS = 25.0  # of a moving file that does not say


class TaskError(Exception):
    """A data set that cannot be evaluated as it is: the message names the files and says what to do."""


@dataclass(frozen=True)
class Item:
    """One labelled file. aliases: other names under which its group may stand in a checkpoint's provenance."""

    id: str
    path: Path
    kind: str  # 'video' or 'image'
    label: str
    group: str
    masks: tuple[Path, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass
class Task:
    """excluded: (id, reason) of files that belong to the task and cannot be used. notes: what a reader must know."""

    name: str
    title: str
    classes: tuple[str, ...]
    items: list[Item]
    excluded: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def found(self) -> int:
        return len(self.items) + len(self.excluded)

    @property
    def labels(self) -> np.ndarray:  # int (items,), an index into classes
        return np.array([self.classes.index(item.label) for item in self.items])

    @property
    def groups(self) -> np.ndarray:  # str (items,)
        return np.array([item.group for item in self.items])

    @property
    def has_video(self) -> bool:
        return any(item.kind == "video" for item in self.items)


def load_task(name: str, data: Path, blues: Path) -> Task:
    """One of pocus, busi, busi3, blues, busi_seg. data: the folder with pocus_lung and busi; blues: covid_blues."""
    if name == "pocus":
        return pocus(Path(data) / "pocus_lung")
    if name == "blues":
        return covid_blues(Path(blues))
    if name == "busi":
        return busi(Path(data) / "busi", ("benign", "malignant"))
    if name == "busi3":
        return busi(Path(data) / "busi", ("benign", "malignant", "normal"))
    if name == "busi_seg":
        return busi(Path(data) / "busi", ("benign", "malignant"), masks=True)
    raise TaskError(f"no task {name!r}: choose from pocus, busi, busi3, blues, busi_seg")


# ------------------------------------------------------------------------------------------------- the data sets


def pocus(root: Path) -> Task:
    """POCUS lung (Born et al. 2021): videos and images, 3 classes, grouped by patient, else by source."""
    classes, left_out = ("covid", "pneumonia", "regular"), ("viral", "uncertain")
    index = root / "file_index.csv"
    rows = _read_csv(index, ("path", "label", "patient_id", "source_id"))
    by_tail, by_name = {}, defaultdict(list)
    for row in rows:
        by_tail["/".join(row["path"].split("/")[-4:]).lower()] = row
        by_name[Path(row["path"]).stem.lower()].append(row)
    items, excluded, skipped, kinds = [], [], Counter(), Counter()
    for path in _files(root, VIDEO | IMAGE):
        name, folder = _id(path, root), path.parent.name
        row = by_tail.get("/".join(path.parts[-4:]).lower())
        if row is None:  # same name in another place: the label must still agree
            same = by_name[path.stem.lower()]
            row = same[0] if len(same) == 1 else None
        if row is None:
            if folder not in left_out:
                excluded.append((name, f"not in {index.name}: label and patient unknown; add a row for it"))
        elif row["label"] in left_out and folder == row["label"]:
            skipped[folder] += 1
        elif row["label"] != folder:
            excluded.append((name, f"two labels: its folder says {folder}, {index.name} says {row['label']}"))
        elif folder not in classes:
            excluded.append((name, f"unknown label {folder!r}; expected one of {', '.join(classes + left_out)}"))
        elif not (row["patient_id"] or row["source_id"]):
            excluded.append((name, f"{index.name} gives neither patient_id nor source_id: its group is unknown"))
        else:
            patient, source = row["patient_id"], row["source_id"]
            group = f"pocus_lung/patient_{patient}" if patient else f"pocus_lung/source_{source}"
            kind = "video" if path.suffix.lower() in VIDEO else "image"
            kinds[kind] += 1
            items.append(Item(name, path, kind, folder, group))
    notes = [f"{kinds['video']} videos and {kinds['image']} images; the group is patient_id, else source_id"]
    if skipped:
        notes.append(
            "left out by definition of the task: " + ", ".join(f"{n} {label}" for label, n in sorted(skipped.items()))
        )
    task = Task("pocus", "POCUS lung", classes, items, excluded, notes)
    return _same_file_in_one_group(task)


def covid_blues(root: Path) -> Task:
    """COVID-BLUES (Wiedemann et al. 2025): severity score >= 2 against < 2 of a clip, grouped by patient."""
    scores = {}
    table = root / "severity.csv"
    for row in _read_csv(table, ("video_file", "Severity Score")):
        stem = row["video_file"].removesuffix(".mp4")
        if scores.setdefault(stem, row["Severity Score"]) != row["Severity Score"]:
            scores[stem] = "two scores"
    files = {path.stem: path for path in _files(root, VIDEO)}
    items, excluded = [], []
    for stem in sorted(scores.keys() | files.keys()):
        name = _id(files[stem], root) if stem in files else f"{root.name}/{stem}"
        patient = re.match(r"(patient_\d+)", stem)
        if stem not in files:
            excluded.append((name, f"scored in {table.name}, but there is no video of that name"))
        elif stem not in scores or scores[stem] == "":
            excluded.append((name, f"no severity score in {table.name}"))
        elif scores[stem] == "two scores":
            excluded.append((name, f"two labels: two different scores in {table.name}"))
        elif patient is None:
            excluded.append((name, "its name does not begin with patient_N: the patient is unknown"))
        else:
            label = "score >= 2" if float(scores[stem]) >= 2 else "score < 2"
            items.append(Item(name, files[stem], "video", label, f"covid_blues/{patient[1]}", aliases=(patient[1],)))
    return Task(
        "blues", "COVID-BLUES severity", ("score < 2", "score >= 2"), items, excluded, ["the group is the patient"]
    )


def busi(root: Path, classes: tuple[str, ...], masks: bool = False) -> Task:
    """BUSI breast images (Al-Dhabyani et al. 2020), grouped by near-duplicate cluster over all classes.

    masks: the segmentation task, for which an image without its mask is excluded.
    """
    found, mask_files = {}, defaultdict(list)
    for label in ("benign", "malignant", "normal"):
        if not (root / label).is_dir():
            raise TaskError(f"{root / label}: no such folder; BUSI has benign, malignant and normal")
        for path in _files(root / label, IMAGE):
            match = re.fullmatch(r"(.*)_mask(_\d+)?", path.stem)
            if match:
                mask_files[label, match[1]].append(path)
            else:
                found[_id(path, root)] = (path, label)
    excluded, images = [], {}
    for name, (path, _) in found.items():
        try:
            images[name] = decode(Clip(name, root.name, "image", (path,)))[0][0]
        except UnreadableClip as error:
            excluded.append((name, f"unreadable: {error.reason}"))
    names = list(images)
    clusters = near_duplicates(list(images.values()))
    labels_of_pixels, labels_of_cluster = defaultdict(set), defaultdict(set)
    pixels = {
        name: hashlib.sha256(image.tobytes() + repr(image.shape).encode()).hexdigest() for name, image in images.items()
    }
    for name, cluster in zip(names, clusters):
        labels_of_pixels[pixels[name]].add(found[name][1])
        labels_of_cluster[cluster].add(found[name][1])
    items = []
    for name, cluster in zip(names, clusters):
        path, label = found[name]
        same = [other for other in names if pixels[other] == pixels[name] and found[other][1] != label]
        own_masks = tuple(sorted(mask_files[label, path.stem], key=lambda p: (len(p.name), p.name)))
        if same:
            excluded.append((name, f"two labels on the same image: {label} here, {found[same[0]][1]} as {same[0]}"))
        elif masks and label in classes and not own_masks:
            excluded.append((name, f"image without its mask: no {path.stem}_mask beside it"))
        else:
            items.append(Item(name, path, "image", label, f"busi/{names[cluster]}", own_masks if masks else ()))
    mixed = [
        sorted(n for n, c in zip(names, clusters) if c == cluster)
        for cluster, labels in sorted(labels_of_cluster.items())
        if len(labels) > 1 and len({pixels[n] for n, c in zip(names, clusters) if c == cluster}) > 1
    ]
    items = [item for item in items if item.label in classes]
    excluded = [(name, reason) for name, reason in excluded if found[name][1] in classes]
    notes = [
        f"{len(set(clusters))} near-duplicate clusters among {len(names)} images (correlation of the 32 px "
        f"images above {DUPLICATE}); a cluster stays in one fold"
    ]
    if mixed:
        notes.append(
            "near-duplicates (not identical) with different labels, kept, in one fold: "
            + "; ".join(" = ".join(n.rsplit("/", 1)[-1] for n in names) for names in mixed)
        )
    if masks:
        notes.append(
            f"{sum(len(item.masks) > 1 for item in items)} images have several lesions: their masks are merged"
        )
        title = "BUSI lesion segmentation"
    else:
        title = "BUSI " + ("benign / malignant" if len(classes) == 2 else f"{len(classes)} classes")
    return Task(
        "busi_seg" if masks else "busi" if len(classes) == 2 else "busi3", title, classes, items, excluded, notes
    )


def near_duplicates(images: list[np.ndarray], threshold: float = DUPLICATE) -> np.ndarray:
    """Cluster of every image, int (N,): the index of the cluster's first image.

    images: uint8 (H, W), any sizes. Two images whose 32 px versions correlate (Pearson) above the threshold are
    linked; clusters are the connected components, so the result does not depend on the order of the pairs.
    """
    if not images:
        return np.zeros(0, int)
    small = np.stack([resize(image, 32).ravel() for image in images]).astype(np.float64)
    small -= small.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(small, axis=1, keepdims=True)
    small = np.divide(small, norm, out=np.zeros_like(small), where=norm > 0)
    _, component = connected_components(csr_matrix(small @ small.T > threshold), directed=False)
    _, first = np.unique(component, return_index=True)
    return first[component]


def _same_file_in_one_group(task: Task) -> Task:
    """Identical bytes: with two labels they are excluded; with one, their groups become one."""
    same = defaultdict(list)
    for item in task.items:
        same[sha256(item.path)].append(item)
    rename, bad = {}, {}
    for copies in same.values():
        if len({item.label for item in copies}) > 1:
            text = ", ".join(f"{item.id} ({item.label})" for item in copies)
            bad.update({item.id: f"two labels on the same file: {text}" for item in copies})
        for item in copies[1:]:
            rename[item.group] = copies[0].group
            task.notes.append(f"{item.id} and {copies[0].id} are the same file: their groups are joined")
    items = [
        item
        if item.group not in rename
        else Item(**{**item.__dict__, "group": rename[item.group], "aliases": item.aliases + (item.group,)})
        for item in task.items
    ]
    task.items = [item for item in items if item.id not in bad]
    task.excluded += sorted(bad.items())
    return task


def _read_csv(path: Path, columns: tuple[str, ...]) -> list[dict]:
    if not path.is_file():
        raise TaskError(f"{path}: no such file; it gives the labels (set --data or --blues to the data folder)")
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = set(columns) - set(reader.fieldnames or ())
        if missing:
            raise TaskError(f"{path}: no column {', '.join(sorted(missing))}")
        return [
            {key: (value or "").strip() for key, value in row.items() if key is not None and isinstance(value, str)}
            | {key: (row[key] or "").strip() for key in columns}
            for row in reader
        ]


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


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


# ----------------------------------------------------------------------------------------------------- frames


@dataclass
class Frames:
    """images: uint8 (N, px, px); item: int (N,), the index of each frame's item in the task. key: what they depend on."""

    images: np.ndarray
    item: np.ndarray
    key: str


def load_frames(
    task: Task,
    px: int,
    cache: Path,
    rate: float = 3.0,
    crop: str = "none",
    workers: int | None = None,
    max_excluded: float = 0.05,
) -> Frames:
    """Decode every item once, at about `rate` frames per second, to px squares; later calls read the cache.

    crop: 'none', or 'crop' / 'blank' for the detected moving region (uscl_hub/crop.py). Items that cannot be decoded
    are moved from task.items to task.excluded with the reason. Raises TaskError if more than the share
    `max_excluded` of all found items is excluded by then.
    """
    described = [task.name, px, rate, crop, [(item.id, sha256(item.path)) for item in task.items]]
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:20]
    file = Path(cache) / f"frames-{task.name}-{px}px-{key}.npz"
    if not file.exists():
        jobs = [(item, px, rate, crop) for item in task.items]
        # spawned, because forking a process that has used torch's threads can hang
        import multiprocessing

        with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
            decoded = list(pool.map(_decode, jobs, chunksize=max(1, len(jobs) // 64)))
        images = [d for d in decoded if isinstance(d, np.ndarray)]
        reasons = [d if isinstance(d, str) else "" for d in decoded]
        item = np.repeat(np.arange(len(decoded)), [len(d) if isinstance(d, np.ndarray) else 0 for d in decoded])
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.tmp")
        with open(partial, "wb") as out:
            np.savez(
                out,
                images=np.concatenate(images) if images else np.zeros((0, px, px), np.uint8),
                item=item,
                reasons=np.array(reasons),
            )
        os.replace(partial, file)
    with np.load(file) as saved:
        images, item, reasons = saved["images"], saved["item"], saved["reasons"].tolist()
    kept = [i for i, reason in enumerate(reasons) if not reason]
    task.excluded += [(task.items[i].id, f"unreadable: {reason}") for i, reason in enumerate(reasons) if reason]
    task.items = [task.items[i] for i in kept]
    check_excluded(task, max_excluded)
    return Frames(images, np.searchsorted(kept, item), key)


def check_excluded(task: Task, max_excluded: float):
    if not task.items or len(task.excluded) > max_excluded * task.found:
        listing = "\n".join(f"  {name}: {reason}" for name, reason in task.excluded[:20])
        raise TaskError(
            f"{task.title}: {len(task.excluded)} of {task.found} files cannot be used, more than "
            f"--max-excluded {max_excluded:g} allows; mend them or raise it:\n{listing}"
        )


def _decode(job) -> np.ndarray | str:
    item, px, rate, crop = job
    clip = Clip(item.id, "", item.kind, (item.path,))
    try:
        if crop == "none":
            return np.stack([resize(frame, px) for frame in _sampled(clip, rate)])
        from uscl_hub.crop import apply_region, detect_region

        frames = np.stack(list(_sampled(clip, rate)))
        return np.stack([resize(frame, px) for frame in apply_region(frames, detect_region(frames), crop)])
    except UnreadableClip as error:
        return error.reason


def _sampled(clip: Clip, rate: float):
    """The frames of a clip nearest after every 1 / rate seconds, the first one always."""
    for i, (frame, fps) in enumerate(iter_frames(clip)):
        fps = max(fps or UNKNOWN_FPS, rate)
        if i == 0 or math.floor(i * rate / fps) > math.floor((i - 1) * rate / fps):
            yield frame


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
