"""Frame cache: every clip decoded once, cropped, resized, kept as grey uint8 in one memory-mapped file.

out/<settings key>/
  settings.json   what the frames were made with; another setting is another folder
  frames.u8       (total frames, size, size), clips back to back
  index.jsonl     one line a clip, written only after its frames: id, content hash, offset, frames, fps, region, ...
  report.json     the last ingest: files that could not be read and why, duplicates, notes
A single writer appends; whatever an interruption leaves behind the last complete line is cut off at the next start.
"""

import hashlib
import json
import mmap
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
from tqdm import tqdm

from uscl_hub.clips.crop import before_after_sheet
from uscl_hub.clips.media import Clip, UnreadableClip, content_hash, find_clips
from uscl_hub.clips.read import read_clip
from uscl_hub.files import InUse, locked, write_whole

VERSION = 1  # of everything that decides the frames' values: decoding, cropping, resizing
_CLIP_SECONDS = 600  # of one clip's decoding; a decoder that hangs is ended
_FLUSH_SECONDS = 2.0


class CacheError(RuntimeError):
    """The cache folder cannot be used: in use, damaged, or too few clips; the message says which and what to do."""


class ClipRecord(NamedTuple):
    id: str
    source: str
    sha256: str
    frames: int
    offset: int
    fps: float | None


class FrameCache:
    """Random access to cached frames. Pickles as a path and columns, so that worker processes share the mapping.

    ids, sources, sha256: lists of str; lengths, offsets: int64 (clips,); fps: float32 (clips,), NaN if unknown.
    All sorted by id. frames: uint8 memory map (total frames, size, size), which may hold clips not listed here.
    """

    def __init__(self, path: Path, size: int, records: Sequence[dict]):
        records = sorted(records, key=lambda record: record["id"])
        self.path, self.size = Path(path), size
        self.ids = [record["id"] for record in records]
        self.sources = [sys.intern(record["source"]) for record in records]
        self.sha256 = [record["sha256"] for record in records]
        self.lengths = np.array([record["frames"] for record in records], np.int64)
        self.offsets = np.array([record["offset"] for record in records], np.int64)
        self.fps = np.array([record["fps"] or np.nan for record in records], np.float32)

    @classmethod
    def open(cls, path: Path | str) -> "FrameCache":
        """The cache in `path`: a settings folder, or the folder around exactly one. Identical contents count once."""
        path = Path(path)
        if not (path / "settings.json").is_file():
            inside = sorted(path.glob("*/settings.json"))
            if len(inside) != 1:
                raise CacheError(
                    f"{path}: "
                    + (
                        "holds no frame cache; run the ingest first"
                        if not inside
                        else f"holds {len(inside)} caches with different settings; name one: "
                        + ", ".join(p.parent.name for p in inside)
                    )
                )
            path = inside[0].parent
        size = json.loads((path / "settings.json").read_text())["size"]
        lines, _ = _read_index(path, size)
        return cls(path, size, _unique(lines.values())[0])

    @cached_property
    def frames(self) -> np.ndarray:
        file = self.path / "frames.u8"
        total = file.stat().st_size // self.size**2 if file.exists() else 0
        if total == 0:
            return np.empty((0, self.size, self.size), np.uint8)
        with open(file, "rb") as f:
            pages = mmap.mmap(f.fileno(), total * self.size**2, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # training wants single frames: the usual read-ahead would be 20 times as much
            pages.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(pages, np.uint8).reshape(total, self.size, self.size)

    @cached_property
    def clips(self) -> list[ClipRecord]:
        return [self.record(i) for i in range(len(self))]

    def record(self, i: int) -> ClipRecord:
        fps = float(self.fps[i])
        return ClipRecord(
            self.ids[i],
            self.sources[i],
            self.sha256[i],
            int(self.lengths[i]),
            int(self.offsets[i]),
            None if np.isnan(fps) else fps,
        )

    def clip(self, i: int) -> np.ndarray:
        """uint8 (T, size, size), a view of the memory map."""
        return self.frames[self.offsets[i] : self.offsets[i] + self.lengths[i]]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self):
        return f"FrameCache({self.path}, {len(self)} clips, {int(self.lengths.sum())} frames of {self.size} px)"

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key not in ("frames", "clips")}


# ---------------------------------------------------------------------------------------------------- ingest


@dataclass(frozen=True)
class Settings:
    """What decides the cached frames; its hash names the folder."""

    size: int
    crop: str
    max_frames: int | None
    stride: int
    version: int = VERSION

    @property
    def key(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.size}px-{self.crop}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def ingest(
    roots,
    out: Path | str,
    *,
    size: int,
    crop: str = "crop",
    max_frames: int | None = None,
    stride: int = 1,
    workers: int | None = None,
    progress: bool = True,
    min_clips: int = 1,
    sheets: bool = False,
) -> FrameCache:
    """Decode everything below `roots` into a frame cache below `out`; only what is new or changed is decoded.

    roots: folders or files, see `uscl_hub.clips.media.find_clips`. size: pixels of the square frames. crop: 'crop',
    'blank' or 'none', see `uscl_hub.clips.crop`. max_frames, stride: of each clip, every stride-th frame and at most so
    many. workers: processes, default one a core; 0 decodes in this process. sheets: write before/after pictures of the
    crop, sheets/*.png, for the newly decoded clips. Called from a script, it needs the usual
    `if __name__ == '__main__':` guard.
    Returns the cache of the clips found below `roots` now, the first of those with identical content. Unreadable
    clips are listed in report.json and skipped.
    Raises CacheError if fewer than `min_clips` clips remain, if another process is writing to the same cache, or if
    the cache is damaged; OSError if the disk is full (what is complete stays).
    """
    if crop not in ("crop", "blank", "none"):
        raise ValueError(f"crop {crop!r} is not 'crop', 'blank' or 'none'")
    if size < 1 or stride < 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(f"size, stride and max_frames must be at least 1, got {size}, {stride} and {max_frames}")
    clips = find_clips(roots)
    settings = Settings(size, crop, max_frames, stride)
    folder = Path(out) / settings.key
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            _write_json(folder / "settings.json", asdict(settings))
            lines, end = _read_index(folder, size, repair=True)
            failed = _append(clips, lines, end, folder, settings, workers, progress, sheets)
    except InUse as error:
        raise CacheError(str(error)) from None

    records, same = _unique(lines[clip.id] for clip in clips if clip.id in lines and clip.id not in failed)
    report = {
        "clips": len(records),
        "frames": sum(record["frames"] for record in records),
        "found": len(clips),
        "unreadable": [{"id": name, "reason": failed[name]} for name in sorted(failed)],
        "duplicates": [{"id": a, "same_as": b} for a, b in same],
        "notes": [{"id": r["id"], "note": note} for r in records for note in r["notes"]],
        "burned_in_text_suspected": [r["id"] for r in records if r["text"]],
    }
    _write_json(folder / "report.json", report)
    if progress:
        _summary(report, folder)
    if len(records) < min_clips:
        some = "".join(f"\n  {name}: {failed[name]}" for name in sorted(failed)[:5])
        where = ", ".join(str(root) for root in ([roots] if isinstance(roots, (str, Path)) else roots))
        raise CacheError(
            f"{len(records)} readable clips below {where}, at least {min_clips} needed "
            f"({len(failed)} unreadable, see {folder / 'report.json'}){some}"
        )
    return FrameCache(folder, size, records)


def _append(clips, lines, end, folder, settings, workers, progress, sheets) -> dict[str, str]:
    """Decode what is missing and append it; updates `lines`; returns the reason of every clip that failed."""
    todo = []
    failed = {}
    for clip in clips:
        try:
            stamp = _stamp(clip)
        except OSError as error:  # vanished since it was listed
            failed[clip.id] = f"{type(error).__name__}: {error.strerror}"
            continue
        if clip.id not in lines or lines[clip.id]["stamp"] != stamp:
            todo.append((clip, stamp))
    if not todo:
        return failed
    by_content = {line["sha256"]: line for line in lines.values()}
    tiles = []
    writer = _Writer(folder, end)
    try:
        results = _prepared([clip for clip, _ in todo], settings, frozenset(by_content), workers, sheets)
        for (clip, stamp), result in zip(todo, tqdm(results, "ingest", len(todo), unit="clip", disable=not progress)):
            if isinstance(result, str):
                failed[clip.id] = result
                continue
            about, frames, tile = result
            line = by_content.get(about["sha256"])
            if line is None:
                about["offset"] = writer.frames(frames)
                line = about
            line = dict(line, id=clip.id, source=clip.source, stamp=stamp)
            by_content.setdefault(line["sha256"], line)
            lines[clip.id] = line
            writer.line(line)
            if tile is not None:
                tiles.append((clip.id, *tile))
    finally:
        writer.close()
    for i in range(0, len(tiles), 40):
        (folder / "sheets").mkdir(exist_ok=True)
        before_after_sheet(tiles[i : i + 40], folder / "sheets" / f"{i // 40:03d}.png")
    return failed


class _Writer:
    """Appends to frames.u8 and, once those bytes are on disk, to index.jsonl."""

    def __init__(self, folder: Path, end: int):
        self.folder, self.end, self.pending, self.last = folder, end, [], time.monotonic()
        self.data = open(folder / "frames.u8", "ab", buffering=0)
        self.index = open(folder / "index.jsonl", "ab", buffering=0)

    def frames(self, frames: np.ndarray) -> int:
        offset = self.end
        view = memoryview(np.ascontiguousarray(frames)).cast("B")
        with self._disk("frames.u8"):
            while view:
                view = view[self.data.write(view) :]
        self.end += len(frames)
        return offset

    def line(self, line: dict):
        self.pending.append(json.dumps(line, ensure_ascii=True) + "\n")
        if time.monotonic() - self.last > _FLUSH_SECONDS:
            self.flush()

    def flush(self):
        with self._disk("index.jsonl"):
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
    def _disk(self, name):
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write the frame cache ({error.strerror}); the clips written so far "
                "are kept: free some space and run it again",
                str(self.folder / name),
            ) from error


def _read_index(folder: Path, size: int, repair: bool = False) -> tuple[dict[str, dict], int]:
    """The latest line of every clip id, and the end (in frames) of what they use.

    With `repair` (the one writer), an unfinished last line and frames without a line are cut off; a reader just
    leaves them aside.
    """
    index, data = folder / "index.jsonl", folder / "frames.u8"
    text = index.read_bytes() if index.exists() else b""
    complete = text[: text.rfind(b"\n") + 1]
    have = data.stat().st_size // size**2 if data.exists() else 0
    lines, end = {}, 0
    for number, row in enumerate(complete.splitlines(), start=1):
        try:
            line = json.loads(row)
            stop = line["offset"] + line["frames"]
            lines[line["id"]] = line
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{index}, line {number} is damaged: delete {folder} and ingest again") from error
        end = max(end, stop)
    if end > have:
        raise CacheError(f"{data} ends at frame {have} but its index needs {end}: delete {folder} and ingest again")
    if repair:
        if len(complete) < len(text):
            os.truncate(index, len(complete))
        if data.exists() and data.stat().st_size > end * size**2:
            os.truncate(data, end * size**2)
    return lines, end


def _unique(lines) -> tuple[list[dict], list[tuple[str, str]]]:
    """One line for each content, the first by id; and the (id, id it equals) of the others."""
    first, same = {}, []
    for line in sorted(lines, key=lambda line: line["id"]):
        kept = first.setdefault(line["sha256"], line)
        if kept is not line:
            same.append((line["id"], kept["id"]))
    return list(first.values()), same


def _write_json(path: Path, value):
    write_whole(path, lambda file: file.write_text(json.dumps(value, indent=1) + "\n"))


def _stamp(clip: Clip) -> list[int]:
    """Number of files, bytes and latest change: enough to see that a clip need not be hashed again."""
    stats = [path.stat() for path in clip.files]
    return [len(stats), sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)]


def _summary(report: dict, folder: Path):
    print(f"{report['clips']} clips, {report['frames']} frames in {folder}", file=sys.stderr)
    for key, text in (
        ("unreadable", "could not be read"),
        ("duplicates", "are copies of another clip: left out"),
        ("notes", "were read with a note"),
        ("burned_in_text_suspected", "may still show burned-in text: look at them before sharing"),
    ):
        if report[key]:
            print(f"  {len(report[key])} {text} (report.json)", file=sys.stderr)


# ------------------------------------------------------------------------------------------- worker processes


def _prepared(clips: list[Clip], settings: Settings, known: frozenset, workers: int | None, sheets: bool):
    """Yields, in the order of `clips`, (index line, frames, tile) or the reason why a clip cannot be read.

    A decoder that crashes its process costs only the clip it was at: the clips in flight are tried again one by one.
    """
    count = (os.cpu_count() or 1) if workers is None else workers
    count = min(count, len(clips))
    if count == 0:
        for clip in clips:
            yield _prepare(clip, settings, known, sheets)
        return
    waiting, flying = deque(clips), deque()
    pool = _pool(count)
    try:
        while waiting or flying:
            while waiting and len(flying) < 2 * count:
                clip = waiting.popleft()
                flying.append((clip, pool.submit(_prepare, clip, settings, known, sheets)))
            clip, future = flying.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                pool.shutdown(wait=True, cancel_futures=True)
                result = _alone(clip, settings, known, sheets)
                again = [clip for clip, _ in flying]
                flying.clear()
                for clip in again:
                    yield result
                    result = _alone(clip, settings, known, sheets)
                pool = _pool(count)
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _alone(clip, settings, known, sheets):
    pool = _pool(1)
    try:
        return pool.submit(_prepare, clip, settings, known, sheets).result()
    except BrokenProcessPool:
        return f"the decoder crashed, or took more than {_CLIP_SECONDS} s"
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(count: int) -> ProcessPoolExecutor:
    import multiprocessing

    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":  # the imports happen once, not once a worker
        context.set_forkserver_preload(["uscl_hub.clips.read"])
    return ProcessPoolExecutor(count, context, _start_worker)


def _start_worker():
    """A worker ignores Ctrl-C, which the parent handles, and ends when its parent is killed."""
    import multiprocessing
    from multiprocessing.connection import wait

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch():
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _prepare(clip: Clip, settings: Settings, known: frozenset, sheets: bool):
    """One clip: its index line (without the offset), its frames uint8 (T, size, size) unless the content is already
    known, and, if wanted, its tile for the sheet. A str is the reason why it cannot be read."""
    limited = hasattr(signal, "alarm") and threading.current_thread() is threading.main_thread()
    if limited and _in_worker():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process: a hung decoder sees no exception
        signal.alarm(_CLIP_SECONDS)
    try:
        sha256 = content_hash(clip)
        if sha256 in known:
            return {"sha256": sha256}, None, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the decoders, and without the file's name
            read = read_clip(
                clip, settings.size, crop=settings.crop, stride=settings.stride, max_frames=settings.max_frames
            )
        about = {
            "sha256": sha256,
            "frames": len(read.images),
            "fps": read.fps,
            "region": list(read.region.box),
            "masked": read.region.mask is not None,
            "height": read.before.shape[0],
            "width": read.before.shape[1],
            "text": read.text,
            "notes": list(read.notes),
        }
        return about, read.images, (read.before, read.region, read.after) if sheets else None
    except UnreadableClip as error:
        return error.reason
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror or error}"
    finally:
        if limited and _in_worker():
            signal.alarm(0)


def _in_worker() -> bool:
    import multiprocessing

    return multiprocessing.parent_process() is not None
