"""Has a backbone seen what it is tested on? The same files or groups are refused; pictures that look alike are shown.

What it has seen is in its provenance, and in that of the networks it started from or learned from.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from training import config as configs
from training.data.cache import CacheError, FrameCache
from training.data.groups import fingerprint
from training.data.perceptual import bits, difference, frame_hashes, positions
from training.data.provenance import chain
from training.evaluation.frames import cached
from training.evaluation.task import EvaluationError, Task
from uscl_hub.clips import UnreadableClip
from uscl_hub.clips.pictures import contact_sheet, tile
from uscl_hub.clips.read import read_clip
from uscl_hub.errors import UserError
from uscl_hub.files import write_whole

ALIKE = 40  # bits of the 256 that may differ; docs/trust.md has how often that is wrong
SIDE = 64  # pixels of the frames that are hashed
LONG = ("groups", "clips", "files", "frame_hashes", "frame_hashes_of")  # what a report leaves out of a provenance
SHOWN = 12  # pairs in a picture


class LeakError(EvaluationError):
    """A backbone was pretrained on clips of the patients it is to be tested on."""


def names_clips(provenance: dict | None) -> bool:
    """Whether a provenance says by hashes what was seen."""
    return any(known.get("groups") or known.get("clips") for known in chain(provenance))


def brief(provenance: dict | None) -> dict:
    """A provenance without its long lists of hashes, its parents' included."""
    short = {key: value for key, value in (provenance or {}).items() if key not in LONG}
    if isinstance(parents := short.get("parents"), list):
        short["parents"] = [brief(parent) for parent in parents if isinstance(parent, dict)]
    return short


# -------------------------------------------------------------------------------------------------- the very same


def find_leaks(backbone, task: Task) -> list[str]:
    """Tested groups that the backbone was pretrained on: by group id (or its fingerprint) or a file's content.

    A group is known as the task names it ('covid_blues/patient_7'), by its aliases ('patient_7') and by the names that
    uscl_hub.clips.find_clips gives its files; a file also as one of a numbered series.
    """
    groups, contents = set(), set()
    for known in chain(backbone.provenance):
        groups |= set(map(str, known.get("groups") or ()))
        contents |= {*(known.get("clips") or ()), *(known.get("files") or ())}
    leaks = {}
    series = _series(task) if contents else {}
    for item in task.tested:
        names = {item.group, *item.aliases, item.id, _series_name(item)}
        if groups & (names | set(map(fingerprint, names))):
            leaks[item.group] = None
        elif contents and not contents.isdisjoint({item.sha256, *item.file_sha256, series.get(item.id, "")}):
            leaks[item.group] = None
    return list(leaks)


def refuse_leaks(backbone, task: Task):
    """Raises LeakError if the backbone was pretrained on any of the task's groups."""
    if leaks := find_leaks(backbone, task):
        tested = len({item.group for item in task.tested})
        raise LeakError(
            f"{backbone.name} was pretrained on {len(leaks)} of the {tested} groups that {task.title} tests "
            f"({', '.join(leaks[:5])}{', ...' if len(leaks) > 5 else ''}): its result "
            f"would mean nothing. Pretrain without them, or leave {task.name!r} out of --tasks, or pass "
            "--leaks skip to leave out just this pair and say so in the report. If these are other patients of the "
            "same names, name their groups otherwise"
        )


def _series_name(item) -> str:
    """The id of the clip that numbered images of one folder are together."""
    series = re.sub(r"\d+(?=\D*$)", "#", Path(item.id).stem)
    return str(Path(item.id).with_name(series + item.path.suffix.lower()))


def _series(task: Task) -> dict[str, str]:
    """The content hash of the numbered series that an image would be one of, by its id."""
    members = defaultdict(list)
    for item in task.items:
        if item.kind == "image" and (number := re.search(r"(\d+)\D*$", item.path.stem)):
            members[item.path.parent, Path(_series_name(item)).name].append((int(number[1]), item.path.name, item))
    found = {}
    for items in members.values():
        ordered = [item for *_, item in sorted(items, key=lambda entry: entry[:2])]
        digest = hashlib.sha256(b"".join(bytes.fromhex(item.sha256) for item in ordered)).hexdigest()
        found |= dict.fromkeys((item.id for item in ordered), digest)
    return found


# ------------------------------------------------------------------------------------------------------ look-alikes


@dataclass
class LookAlike:
    """An item of a task that looks like a clip of the pretraining, or a test item that looks like one of the training.

    clip: SHA-256 of the pretraining's clip, or the training item's id; bits: that differ, of 256; image: uint8
    (SIDE, SIDE), the item's frame; other: the clip's, None where only its hash is known.
    """

    item: str
    clip: str
    bits: int
    image: np.ndarray
    other: np.ndarray | None = None

    def to_dict(self) -> dict:
        return {"item": self.item, "clip": self.clip, "bits": self.bits}


def find_near(backbone, task: Task, cache: Path) -> list[LookAlike]:
    """The closest pair of every tested item that looks like a clip of the pretraining, closest first.

    Backbones whose provenance has no hashes of frames give none. Raises EvaluationError for damaged ones.
    """
    closest: dict[str, LookAlike] = {}
    tested = {item.id for item in task.tested}
    for clips, hashes, settings in _hashed(backbone):
        item, images, own = _hashed_items(task, cache, settings)
        for start in range(0, len(own), 4096):
            part = own[start : start + 4096]
            distance = (part.shape[1] - part @ hashes.T) / 2
            for i in np.flatnonzero(distance.min(1) <= ALIKE):
                best, name = int(distance[i].argmin()), task.items[item[start + i]].id
                if name not in tested:
                    continue
                pair = LookAlike(name, clips[best], int(distance[i, best]), images[start + i])
                if name not in closest or pair.bits < closest[name].bits:
                    closest[name] = pair
    return sorted(closest.values(), key=lambda pair: (pair.bits, pair.item))


def find_crossing(task: Task, cache: Path) -> list[LookAlike]:
    """The items of an external test that look like an item of the training, closest first."""
    item, images, hashes = _hashed_items(task, cache, {"crop": "none"})
    tested = np.array([task.items[i].id in task.external for i in item], bool)
    if not tested.any() or tested.all():
        return []
    train, closest = np.flatnonzero(~tested), {}
    for i in np.flatnonzero(tested):
        distance = (hashes.shape[1] - hashes[train] @ hashes[i]) / 2
        best, name = int(distance.argmin()), task.items[item[i]].id
        if distance[best] <= ALIKE and (name not in closest or distance[best] < closest[name].bits):
            other = task.items[item[train[best]]].id
            closest[name] = LookAlike(name, other, int(distance[best]), images[i], images[train[best]])
    return sorted(closest.values(), key=lambda pair: (pair.bits, pair.item))


def _hashed(backbone) -> Iterator[tuple[list[str], np.ndarray, dict]]:
    """Of every network of the chain that names frames: a clip and a row of bits each frame, and how they were read."""
    for known in chain(backbone.provenance):
        if not (lists := known.get("frame_hashes")):
            continue
        try:
            pairs = [(clip, text) for clip, own in zip(known["clips"], lists, strict=True) for text in own]
            settings = known.get("frame_hashes_of") or {}
            kept = {key: settings[key] for key in ("crop", "stride", "max_frames") if settings.get(key)}
            hashes = bits([text for _, text in pairs])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EvaluationError(f"{backbone.name}: the provenance's frame_hashes are damaged ({error})") from error
        if pairs:
            yield [clip for clip, _ in pairs], hashes, kept


def _hashed_items(task: Task, cache: Path, settings: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A few frames of every item: the item's index (n,), uint8 (n, SIDE, SIDE), the bits of the hash (n, 256)."""

    def make():
        rows = [(i, *row) for i, item in enumerate(task.items) for row in _frames_of(item, settings)]
        images = np.array([image for _, image, _ in rows], np.uint8).reshape(-1, SIDE, SIDE)
        hashes = np.array([text for *_, text in rows], "U64")
        return {"item": np.array([i for i, *_ in rows], int), "images": images, "hashes": hashes}

    described = ["hashes", SIDE, settings, [(item.id, item.sha256) for item in task.items]]
    saved = cached(cache, described, make)
    return saved["item"], saved["images"], bits(saved["hashes"].tolist())


def _frames_of(item, settings: dict) -> list[tuple[np.ndarray, str]]:
    try:
        read = read_clip(item.clip, SIDE, **settings)
    except UnreadableClip:  # it is excluded, with the reason, when the task is decoded
        return []
    frames = read.images[positions(len(read.images))]
    return [(frame, text) for frame in frames for text in frame_hashes(frame[None])]


def picture(pairs: list[LookAlike], folder: Path, path: Path) -> bool:
    """Write the first pairs: the item's frame, and beside it what it looks like where that is here.

    folder: of the backbone; its training's frame cache is looked for beside it. Returns whether there was anything.
    """
    wanted = {pair.clip for pair in pairs[:SHOWN] if pair.other is None}
    frames = _pretraining(folder, wanted) if wanted else {}
    frames |= {pair.clip: pair.other[None] for pair in pairs[:SHOWN] if pair.other is not None}
    tiles = []
    for pair in pairs[:SHOWN]:
        others = frames.get(pair.clip, ())
        best = sorted(others, key=lambda frame: difference(frame, pair.image))[:1]
        shown = [Image.fromarray(frame).resize((2 * SIDE, 2 * SIDE)) for frame in (pair.image, *best)]
        tiles.append(tile(shown))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: contact_sheet(tiles).save(part, "PNG"))
    return bool(frames)


def _pretraining(folder: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """A few frames of clips by SHA-256, from the frame cache of the training that wrote `folder`; {} if it is gone."""
    run = folder.parent
    try:
        cache = FrameCache.open(configs.cache_folders(configs.load(configs.Config, run / "config.yaml"), run))
        found = [(i, sha) for i, sha in enumerate(cache.sha256) if sha in wanted]
        return {sha: cache.clip(i)[positions(int(cache.lengths[i]))] for i, sha in found}
    except (CacheError, UserError, OSError):
        return {}
