"""Frames of a task's items, decoded once; and the cache of everything that takes long."""

import hashlib
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np

from training.evaluation.task import EvaluationError, Task
from uscl_hub.clips import UnreadableClip
from uscl_hub.clips.read import read_clip
from uscl_hub.files import open_regular, write_whole

UNKNOWN_FPS = 25.0  # of a moving file that does not say
VERSION = 1  # of everything that decides cached numbers: decoding, protocols, training


@dataclass
class TaskFrames:
    """images: uint8 (N, px, px); item: int (N,), each frame's index into task.items. key: of all they depend on."""

    images: np.ndarray
    item: np.ndarray
    key: str


def load_frames(
    task: Task, px: int, cache: Path, rate: float = 3.0, crop: str = "none", workers: int = 0
) -> TaskFrames:
    """Decode every item once, at about `rate` frames per second, to px squares; later calls read the cache.

    crop: 'none', or 'crop' / 'blank' for the detected moving region (uscl_hub/clips/crop.py). workers: threads, 0: one
    a core. Items that cannot be decoded are moved from task.items to task.excluded with the reason: how many may be is
    for `check_excluded`.
    """

    def decode_all():
        jobs = [(item, px, rate, crop) for item in task.items]
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:  # decoders and resizing release the GIL
            decoded = list(pool.map(decode_item, jobs))
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
    return TaskFrames(saved["images"], np.searchsorted(kept, saved["item"]), digest(described))


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


def decode_item(job) -> tuple[np.ndarray, str, str]:
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
