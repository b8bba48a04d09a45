"""Decode clips and append them to one shard of a frame cache: by one writer, in several processes.

A clip's frames are on the disk before its line is. Whatever an interruption leaves behind the last whole line is cut
off at the next start.
"""

import hashlib
import json
import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
from tqdm import tqdm

from training import distributed
from training.data import workers as processes
from training.data.cache import read_damage
from training.data.index import CacheError, drop_damaged, read_log
from uscl_hub.clips.pictures import contact_sheet
from uscl_hub.files import InUse, locked, write_whole

VERSION = 3  # of everything that decides the frames' values: decoding, cropping, resizing
FLUSH_SECONDS = 2.0
PATIENCE = 60.0  # seconds that an ingest waits for another one into the same cache: trainings may start together


@dataclass(frozen=True)
class FrameSettings:
    """What decides the cached frames; its hash names the folder."""

    size: int
    crop: str
    max_frames: int | None
    stride: int
    version: int = VERSION

    def __post_init__(self):
        if self.crop not in ("crop", "blank", "none"):
            raise ValueError(f"crop {self.crop!r} is not 'crop', 'blank' or 'none'")
        if min(self.size, self.stride, self.max_frames or 1) < 1 or self.max_frames == 0:
            raise ValueError(
                f"size, stride and max_frames must be at least 1, got {self.size}, {self.stride} and {self.max_frames}"
            )

    @property
    def key(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.size}px-{self.crop}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Work:
    """Where the frames go, what they are like, and how the work is done: see `ingest`. run: the ingest's number."""

    folders: list[Path]
    settings: FrameSettings
    workers: int | None
    progress: bool
    sheets: bool
    run: int = 0

    @property
    def shard(self) -> Path:
        """Where this rank writes."""
        rank = distributed.rank()
        folder = self.folders[rank % len(self.folders)]
        return folder / f"shard_{rank:03d}" if rank else folder


@contextmanager
def writing(folder: Path):
    """Hold the cache folder as its one writer. Yields whether it can be written to: a read-only one can be read."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise CacheError(f"{folder}: cannot be made ({error.strerror}); name another cache folder") from None
    if not writable:
        yield False
        return
    try:
        with locked(folder, PATIENCE):
            yield True
    except InUse as error:
        raise CacheError(str(error)) from None


def do_share(share: tuple[int, list[tuple]], work: Work, prepare: Callable) -> dict[str, str]:
    """Decode this rank's share into its shard, then wait for the others. Returns why clips failed, on the first rank
    those of all. prepare: see `append`."""
    run, todo = share
    failed = {}
    if todo:
        with writing(work.shard) if distributed.rank() else nullcontext(True) as writable:
            if not writable:
                raise CacheError(f"{work.shard}: cannot be written to; name another cache folder")
            lines, end = read_log(work.shard, work.settings.size, repair=True)
            drop_damaged(lines, read_damage(work.shard))
            failed = append(todo, (lines, end), replace(work, run=run), prepare)
    return {name: reason for part in distributed.gather_values(failed) for name, reason in part.items()}


def append(todo, shard: tuple[dict[str, dict], int], work: Work, prepare: Callable) -> dict[str, str]:
    """Decode (clip, stamp)s and append them to the shard; returns the reason of every clip that failed.

    Args:
        shard: its lines, by id, and the end of their frames.
        prepare: reads a clip, in another process: `ingest.prepare`.
    """
    lines, end = shard
    failed, sheets = {}, Sheets(work.shard / "sheets")
    by_content = {line["sha256"]: line for line in lines.values()}
    cores = max(1, (os.cpu_count() or 1) // distributed.local_world())
    count = min(cores if work.workers is None else work.workers, len(todo))
    task = partial(prepare, settings=work.settings, known=frozenset(by_content), sheets=work.sheets)
    results = processes.ordered(task, [clip for clip, _ in todo], count, "uscl_hub.clips.read")
    writer = Writer(work.shard, end)
    try:
        bar = tqdm(results, "ingest", len(todo), unit="clip", disable=not work.progress)
        for (clip, then), result in zip(todo, bar):
            if isinstance(result, str):
                failed[clip.id] = result
                continue
            about, frames, tile = result
            line = by_content.get(about["sha256"])
            if line is None:
                about["offset"] = writer.frames(frames)
                line = about
            line = dict(line, id=clip.id, source=clip.source, stamp=then, run=work.run)
            by_content.setdefault(line["sha256"], line)
            writer.line(line)
            if tile is not None:
                sheets.add(tile)
    finally:
        results.close()  # first: it ends the workers at once
        writer.close()
        sheets.close()
    return failed


class Sheets:
    """Contact sheets of what the crop does, 40 clips each, numbered on from those of earlier ingests."""

    def __init__(self, folder: Path):
        self.folder, self.tiles = folder, []
        self.number = 1 + max((int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()), default=-1)

    def add(self, picture):
        self.tiles.append(picture)
        if len(self.tiles) == 40:
            self.close()

    def close(self):
        """Write what has not been written."""
        if self.tiles:
            sheet = contact_sheet(self.tiles)
            write_whole(self.folder / f"{self.number:03d}.png", lambda part: sheet.save(part, "PNG"))
            self.tiles, self.number = [], self.number + 1


class Writer:
    """Appends to frames.u8 and, once those bytes are on disk, to index.jsonl."""

    def __init__(self, folder: Path, end: int):
        self.folder, self.end, self.pending, self.last = folder, end, [], time.monotonic()
        self.data = open(folder / "frames.u8", "ab", buffering=0)
        self.index = open(folder / "index.jsonl", "ab", buffering=0)

    def frames(self, frames: np.ndarray) -> int:
        offset = self.end
        view = memoryview(np.ascontiguousarray(frames)).cast("B")
        with self.disk("frames.u8"):
            while view:
                view = view[self.data.write(view) :]
        self.end += len(frames)
        return offset

    def line(self, line: dict):
        self.pending.append(json.dumps(line, ensure_ascii=True) + "\n")
        if time.monotonic() - self.last > FLUSH_SECONDS:
            self.flush()

    def flush(self):
        with self.disk("index.jsonl"):
            os.fsync(self.data.fileno())
            view = memoryview("".join(self.pending).encode())
            self.pending = []
            while view:
                view = view[self.index.write(view) :]
            os.fsync(self.index.fileno())
        self.last = time.monotonic()

    def close(self):
        try:
            self.flush()
        finally:
            self.data.close()
            self.index.close()

    @contextmanager
    def disk(self, name):
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write the frame cache ({error.strerror}); the clips written so far "
                "are kept: free some space and run it again",
                str(self.folder / name),
            ) from error
