"""What must hold across all labelled files. Headers are read, and files of equal size; of images that have masks, png
files are decoded, as their EXIF may come last."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from uscl_hub.clips import content_hash
from uscl_hub.clips.image import ORIENTATION
from uscl_hub.labels.groups import few_groups
from uscl_hub.labels.items import Item, LabelError, Labels

IMAGE_FORMATS = ("PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP", "PPM", "JPEG2000")


def checked(found: Labels) -> Labels:
    found = _without_contradictions(found)
    if len(found.items) < 2:
        raise LabelError(f"{found.source}: {len(found.items)} labelled file(s): too few for anything")
    if found.task == "classification" and len(set(found.targets)) < 2:
        name = found.classes[found.targets[0]]
        raise LabelError(f"{found.source}: there is only one class, {name!r}. At least two are needed")
    if found.task in ("multilabel", "regression"):
        for column, name in enumerate(found.classes):
            if len(set(found.targets[:, column])) < 2:
                raise LabelError(f"{found.source}: every {name!r} is {found.targets[0, column]:g}: nothing to learn")
    check_splits(found)
    notes = _check_masks(found) if found.task == "segmentation" else []
    notes += few_groups(found) if found.groups_known else []
    return replace(found, notes=(*found.notes, *notes))


def _check_masks(found: Labels) -> list[str]:
    """Of the pixels' number and orientation. -> notes."""
    close: list[str] = []
    wrong: list[str] = []
    for item in found.items:
        if item.masks and item.kind not in ("image", "dicom"):
            raise LabelError(f"{item.path}: a {item.kind} has a mask; masks are understood for single images only")
        own = _size(item.path, upright=bool(item.masks)) if item.kind == "image" else None
        for file in item.masks:
            size = _size(file)
            if own and size != own:
                text = f"{file} has {size[0]} x {size[1]} pixels, its image {item.path.name} {own[0]} x {own[1]}"
                (close if is_close(size, own) else wrong).append(text)
    if wrong:
        raise LabelError(f"{found.source}: {len(wrong)} mask(s) have another size than their image: {wrong[0]}")
    return [f"{len(close)} mask(s) differ by a pixel or two from their image and are stretched"] if close else []


def is_close(size: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Sizes that differ by rounding only."""
    return all(abs(a - b) <= 2 for a, b in zip(size, other))


def _size(path: Path, upright: bool = False) -> tuple[int, int]:
    """upright: whether an image that is shown turned is refused."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            size, turned = image.size, upright and image.getexif().get(ORIENTATION, 1) != 1
    except Exception as error:  # noqa: BLE001 - Pillow's parsers raise nearly anything
        raise LabelError(f"{path}: is not an image that can be read ({type(error).__name__})") from error
    if turned:
        raise LabelError(f"{path}: it is shown turned, by its EXIF, and its mask is not. Save it upright, without EXIF")
    return size


def check_splits(found: Labels):
    """Raises LabelError if a group, or the very same file, is in two splits."""
    where = defaultdict(set)
    for item in found.items:
        if item.group:
            where[item.group].add(item.split)
    both = {group: splits for group, splits in where.items() if len(splits) > 1}
    if both:
        group, splits = min(both.items())
        raise LabelError(
            f"{found.source}: {len(both)} group(s) are in two splits, as {group!r} in "
            f"{' and '.join(sorted(s or '(none)' for s in splits))}. Give every group one split"
        )
    for first, second in _twins(found.items):
        if first.split != second.split:
            raise LabelError(
                f"{found.source}: {first.id} ({first.split or 'no split'}) and {second.id} "
                f"({second.split or 'no split'}) are the same file. Keep one of them"
            )


def _twins(items):
    """Pairs of items whose files are equal byte for byte. Only files of equal size are read."""
    sizes = defaultdict(list)
    for item in items:
        sizes[tuple(file.stat().st_size for file in item.clip.files)].append(item)
    same: dict[str, Item] = {}
    for members in sizes.values():
        for item in members if len(members) > 1 else ():
            first = same.setdefault(content_hash(item.clip), item)
            if first is not item:
                yield first, item


def _without_contradictions(found: Labels) -> Labels:
    """The same file under two labels is left out, both times, and said."""
    if found.task == "segmentation":
        return found
    place = {item.id: i for i, item in enumerate(found.items)}
    bad, notes = set(), []
    for first, second in _twins(found.items):
        a, b = place[first.id], place[second.id]
        if not np.array_equal(found.targets[a], found.targets[b]):
            bad |= {a, b}
            notes.append(f"left out: {first.id} ({first.label}) and {second.id} ({second.label}) are the same file")
    if not bad:
        return found
    kept = [i for i in range(len(found.items)) if i not in bad]
    return replace(found.subset(kept), notes=(*found.notes, *notes))
