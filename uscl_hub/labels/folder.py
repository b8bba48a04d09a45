"""Labels of a folder: `CLASS/file`, or images with masks."""

from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np

from uscl_hub.clips import find_clips
from uscl_hub.clips.clip import IMAGE
from uscl_hub.clips.find import MASK_FOLDERS, OF_A_MASK, walk
from uscl_hub.labels.items import Item, LabelError, Labels

SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


def from_folder(root: Path, task: str | None, frames: str) -> Labels:
    if task in ("regression", "multilabel"):
        raise LabelError(f"{root}: a folder gives classes or masks, not {task}: write a labels.csv (path, label, ...)")
    base = root / "images" if (root / "images").is_dir() else root
    items = _images_with_masks(root, base, frames)
    labels = sorted({item.label for item in items if item.label})
    if not items:
        raise LabelError(f"{root}: holds no image, video or DICOM file")
    if task == "segmentation" or (task is None and not labels and any(item.masks for item in items)):
        return segmentation(root, items, ())
    if not labels:
        raise LabelError(
            f"{root}: has no folders of classes (CLASS/file), no masks and no labels.csv: "
            "nothing says what the files show"
        )
    if {label.lower() for label in labels} <= SPLIT_NAMES:
        raise LabelError(
            f"{root}: its folders are {', '.join(labels)}: splits, not classes. Give one of them, or a labels.csv with "
            "the columns path, label and split"
        )
    notes = []
    if loose := [item.id for item in items if not item.label]:
        notes.append(f"{len(loose)} file(s) are in no folder of a class and are left out, the first: {loose[0]}")
    if any(item.masks for item in items):
        notes.append("there are masks as well: say task='segmentation' (--task segmentation) to use them")
    items = [item for item in items if item.label]
    targets = np.array([labels.index(item.label) for item in items], np.int64)
    return Labels(root, "classification", tuple(labels), tuple(items), targets, False, tuple(notes))


def _images_with_masks(root: Path, base: Path, frames: str) -> list[Item]:
    """Every file below `base` but the masks, each with its own masks. The label is the first folder's name, or ''."""
    try:
        clips = find_clips([base], frames=frames)
    except ValueError as error:
        raise LabelError(str(error)) from None
    masks = masks_below(root)
    owned = {file for files in masks.values() for file in files}
    resolved = cache(Path.resolve)
    items = []
    for clip in clips:
        file = resolved(clip.files[0].parent) / clip.files[0].name  # as `masks_below` has it
        if file in owned:  # a mask
            continue
        parts = clip.id.removeprefix(clip.source + "/").split("/")
        label = parts[0] if len(parts) > 1 else ""
        items.append(Item("/".join(parts), clip, label, masks=tuple(masks.get(file.with_suffix(""), ()))))
    return items


def masks_below(root: Path) -> dict[Path, list[Path]]:
    """Image without its extension -> its masks: x_mask.png, x_mask_1.png beside it, or masks/x.png beside images/.

    Linked folders are followed, once; folders are spelled without links, files by their own names.
    """
    root = root.resolve()
    if root.name == "images" and (root.parent / "masks").is_dir():
        root = root.parent
    found = defaultdict(list)
    resolved = cache(Path.resolve)  # a folder holds many files
    files = (parent / name for parent, names in walk(root, set()) for name in names or () if not name.startswith("."))
    for path in sorted(p for p in files if p.suffix.lower() in IMAGE and p.is_file()):
        match = OF_A_MASK.fullmatch(path.stem)
        parts = path.relative_to(root).parent.parts
        i = next((i for i, name in enumerate(parts) if name in MASK_FOLDERS), None)
        if i is not None and (parts[i] == "masks" or root.joinpath(*parts[:i], "images").is_dir()):
            images = ("images",) if root.joinpath(*parts[:i], "images").is_dir() else ()
            folder = root.joinpath(*parts[:i], *images, *parts[i + 1 :])
        elif match:
            folder = path.parent
        else:
            continue
        found[resolved(folder) / (match[1] if match else path.stem)].append(resolved(path.parent) / path.name)
    return found


def segmentation(source: Path, items: list[Item], notes: tuple[str, ...], known: bool = False) -> Labels:
    kept = [item for item in items if item.masks]
    if not kept:
        raise LabelError(
            f"{source}: no image has a mask (x_mask.png beside x.png, masks/x.png beside images/, or 'mask')"
        )
    if without := [item.id for item in items if not item.masks]:
        notes = (*notes, f"{len(without)} image(s) have no mask and are left out, the first: {without[0]}")
    return Labels(source, "segmentation", ("foreground",), tuple(kept), np.zeros(len(kept), np.int64), known, notes)
