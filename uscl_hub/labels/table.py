"""Labels of a table: path and label, or several columns of labels; group, split and mask if wanted."""

import math
import os
from pathlib import Path

import numpy as np

from uscl_hub.clips import Clip, find_clips
from uscl_hub.files import existing
from uscl_hub.labels.folder import segmentation
from uscl_hub.labels.items import Item, LabelError, Labels
from uscl_hub.labels.rows import as_number, read_rows

ABSENT = ("", "nan", "null", "na", "n/a")  # what programs write for a value that is not there
RESERVED = ("path", "group", "split", "mask")


def from_table(path: Path, task: str | None, columns: tuple[str, ...]) -> Labels:
    rows = read_rows(path)
    names = list(rows[0])
    for name in ("path", *columns):
        if name not in names:
            raise LabelError(f"{path}: has no column {name!r}; its columns are {', '.join(names)}")
    chosen = tuple(columns) or (("label",) if "label" in names else tuple(n for n in names if n not in RESERVED))
    known = "group" in names
    if known and (empty := [i for i, row in enumerate(rows) if not row["group"]]):
        raise LabelError(f"{path}: row {empty[0] + 2}: 'group' is empty ({len(empty)} such rows). Fill it in")
    clips, masks = _clips(path, rows), _masks(path, rows)
    items = [
        Item(row["path"], clip, " ".join(row[n] for n in chosen), row.get("group", ""), row.get("split", ""), own)
        for row, clip, own in zip(rows, clips, masks)
    ]
    if task == "segmentation" or (task is None and "mask" in names and not chosen):
        if "mask" not in names:
            raise LabelError(f"{path}: has no column 'mask', which segmentation needs")
        return segmentation(path, items, (), known)
    if not chosen:
        raise LabelError(f"{path}: has no column of labels; its columns are {', '.join(names)}")
    task, classes, targets, notes = _targets(path, rows, chosen, task)
    return Labels(path, task, classes, tuple(items), targets, known, tuple(notes))


def _clips(table: Path, rows: list[dict[str, str]]) -> list[Clip]:
    absent, clips = [], []
    seen: dict[Path, int] = {}
    for number, row in enumerate(rows, start=2):
        path = _existing(table.parent, row["path"])
        if path is None:
            absent.append((number, row["path"]))
            continue
        if path in seen:
            raise LabelError(f"{table}: rows {seen[path]} and {number} both name {row['path']}. Keep one of them")
        seen[path] = number
        if Path(os.path.realpath(path)) in Path(os.path.realpath(table)).parents:
            raise LabelError(f"{table}: row {number}: {row['path']} is a folder that holds this table, not one clip")
        found = find_clips([path], frames="clip")
        if len(found) != 1:
            raise LabelError(f"{table}: row {number}: {path} is not one image, video, DICOM file or folder of frames")
        clips.append(Clip(row["path"], found[0].source, found[0].kind, found[0].files))
    if absent:
        number, name = absent[0]
        raise LabelError(
            f"{table}: {len(absent)} of {len(rows)} files are missing, the first in row {number}: {name or '(empty)'}. "
            "Paths count from the table's folder"
        )
    return clips


def _masks(table: Path, rows: list[dict[str, str]]) -> list[tuple[Path, ...]]:
    out = []
    for number, row in enumerate(rows, start=2):
        own = [(name.strip(), _existing(table.parent, name.strip())) for name in row.get("mask", "").split(";") if name]
        if absent := [name for name, path in own if path is None or not path.is_file()]:
            raise LabelError(f"{table}: row {number}: the mask {absent[0]} is missing")
        out.append(tuple(path for _, path in own if path is not None))
    return out


def _existing(folder: Path, name: str) -> Path | None:
    """The path as written, or with Windows' separators."""
    for text in (name, name.replace("\\", "/")) if name else ():
        if found := existing(folder / text):
            return found
    return None


def _targets(path: Path, rows: list[dict[str, str]], names: tuple[str, ...], task: str | None):
    """-> (task, classes, targets, notes)."""
    for name in names:
        values = [row[name] for row in rows]
        for number, value in enumerate(values, start=2):
            if value.lower() in ABSENT:
                shown = value or "empty"
                raise LabelError(f"{path}: row {number}: {name!r} is {shown}. Fill it in, or leave the row out")
        if task == "classification" or not any(_number(value) is not None for value in values):
            continue  # 'none' and 'inf' may be classes
        for number, value in enumerate(values, start=2):
            if value.lower() == "none" or _infinite(value):
                raise LabelError(
                    f"{path}: row {number}: {name!r} is {value}, among numbers. Fill it in, leave the row out, or, "
                    "if it is a class, say task='classification' (--task classification)"
                )
    numbers = _numbers(rows, names)
    notes = []
    if task is None:
        task = _task(path, names, numbers)
        if task == "regression" and numbers is not None and _few_whole(numbers):
            name = names[0]
            notes.append(
                f"{name!r} holds few whole numbers, taken as a quantity; "
                "for classes say task='classification' (--task classification)"
            )
    if task == "classification":
        if len(names) > 1:
            raise LabelError(f"{path}: classification needs one column of classes, not {', '.join(names)}")
        text = [row[names[0]] for row in rows]
        classes = tuple(sorted(set(text), key=_natural))
        return task, classes, np.array([classes.index(value) for value in text], np.int64), notes
    if numbers is None:
        number, name = next((i, n) for i, row in enumerate(rows, start=2) for n in names if _number(row[n]) is None)
        raise LabelError(
            f"{path}: row {number}: {name!r} is {rows[number - 2][name]!r}: not a number, which {task} needs"
        )
    if task == "multilabel" and not np.isin(numbers, (0, 1)).all():
        raise LabelError(f"{path}: columns of several labels hold 0 and 1 only ({', '.join(names)})")
    return task, names, numbers, notes


def _task(path: Path, names: tuple[str, ...], numbers: np.ndarray | None) -> str:
    if numbers is None and len(names) > 1:
        raise LabelError(
            f"{path}: the columns {', '.join(names)} could all be labels, and not all are numbers. "
            "Name one of them 'label', or choose with columns="
        )
    if numbers is None:
        return "classification"
    return "multilabel" if len(names) > 1 and np.isin(numbers, (0, 1)).all() else "regression"


def _few_whole(numbers: np.ndarray) -> bool:
    return numbers.shape[1] == 1 and len(np.unique(numbers)) <= 10 and not np.mod(numbers, 1).any()


def _natural(text: str):
    number = _number(text)
    return (0, number, text) if number is not None else (1, 0.0, text)


def _number(text: str) -> float | None:
    value = as_number(text)
    return value if value is not None and math.isfinite(value) else None


def _infinite(text: str) -> bool:
    value = as_number(text)
    return value is not None and not math.isfinite(value)


def _numbers(rows, names) -> np.ndarray | None:
    values = [[_number(row[name]) for name in names] for row in rows]
    return None if any(v is None for row in values for v in row) else np.array(values, np.float32)
