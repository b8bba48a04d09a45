"""Decode clips into a frame cache: only what is new or changed, by several processes, safe against interruptions.

A single writer appends; whatever an interruption leaves behind the last complete line is cut off at the next start.
"""

import hashlib
import json
import os
import sys
import time
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from training.data import workers as processes
from training.data.cache import CacheError, FrameCache, read_damage, read_index, unique
from uscl_hub.clips import Clip, Report, UnreadableClip, content_hash, find_clips
from uscl_hub.clips.pictures import before_after_sheet
from uscl_hub.clips.read import read_clip
from uscl_hub.files import InUse, locked, write_json, write_whole

VERSION = 2  # of everything that decides the frames' values: decoding, cropping, resizing
FLUSH_SECONDS = 2.0
CHECK_BYTES = 2 << 30  # of kept frames: so many are compared with their checksums at the start, a second's work
RECENT_SECONDS = 2.0  # a file changed so shortly before may change again without another time stamp

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
    """Where the frames go, what they are like, and how the work is done: see `ingest`."""

    folder: Path
    settings: FrameSettings
    workers: int | None
    progress: bool
    sheets: bool


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
    frames: str = "auto",
) -> FrameCache:  # 11 arguments: all but the first three have a default, and a caller names those that differ
    """Decode everything below `roots` into a frame cache below `out`; only what is new or changed is decoded.

    What earlier trainings wrote below `roots` (their figures and caches) is left out. Called from a script, it needs
    the usual `if __name__ == '__main__':` guard.

    Args:
        roots: folders or files, see `uscl_hub.clips.find_clips`.
        size: pixels of the square frames.
        crop: 'crop', 'blank' or 'none', see `uscl_hub.clips.crop`.
        max_frames, stride: of each clip, every stride-th frame and at most so many.
        workers: processes, default one a core; 0 decodes in this process.
        progress: show a bar and a summary.
        min_clips: fewer readable clips than this are an error.
        sheets: write before/after pictures of the crop, sheets/*.png, for the newly decoded clips.
        frames: what numbered images of one folder are, see `uscl_hub.clips.find_clips`.

    Returns:
        The cache of the clips found below `roots` now, the first of those with identical content. Unreadable clips are
        listed in report.json and skipped.

    Raises:
        CacheError: fewer than `min_clips` clips remain, another process is writing to the same cache, it is damaged, or
            it is read-only and not complete.
        OSError: the disk is full; what is complete stays.
    """
    if processes.imported_by_a_worker():  # a script without a guard: its parent says what is wrong, once
        raise SystemExit(1)
    settings = FrameSettings(size, crop, max_frames, stride)
    work = Work(Path(out) / settings.key, settings, workers, progress, sheets)
    passed = Report()
    clips, ours = without_results(find_clips(roots, frames, passed), roots)
    records, report = update(clips, work, {"own_results_left_out": ours} | passed.as_dict())
    if progress:
        print_summary(report, work.folder, passed)
    if len(records) < min_clips:
        raise too_few(report, min_clips, roots, work.folder)
    return FrameCache(work.folder, size, records)


def update(clips: list[Clip], work: Work, about: dict) -> tuple[list[dict], dict]:
    """Decode what is new or changed, and write report.json. Returns the index lines of `clips`, those with identical
    content once, and the report, which begins with `about`."""
    folder, size = work.folder, work.settings.size
    with writing(folder) as writable:
        if writable:
            write_json(folder / "settings.json", asdict(work.settings))
        lines, end = read_index(folder, size, repair=writable)
        redo = read_damage(folder)
        drop_damaged(lines, redo)
        failed, todo = missing(clips, lines)
        if todo and not writable:
            raise CacheError(
                f"{folder}: is read-only and lacks {len(todo)} of {len(clips)} clips, such as {todo[0][0].id}; "
                "name another cache folder"
            )
        check_kept(FrameCache(folder, size, [lines[c.id] for c in clips if c.id in lines and c.id not in failed]))
        if todo:
            failed |= append(todo, lines, end, work)
        if redo and writable:
            (folder / "damaged.txt").unlink(missing_ok=True)
        records, same = unique(lines[clip.id] for clip in clips if clip.id in lines and clip.id not in failed)
        report = describe(records, same, failed, len(clips)) | about
        if writable:
            write_json(folder / "report.json", report)
    return records, report


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


# ------------------------------------------------------------------------------------------- what is to be done


def without_results(clips: list[Clip], roots) -> tuple[list[Clip], int]:
    """The clips that are not figures or caches of ours below `roots`, and the number of those that are."""
    roots = [roots] if isinstance(roots, (str, Path)) else roots
    tops = {Path(root).resolve() for root in roots}
    tops |= {path.parent for path in tops if path.is_file()}

    @lru_cache(maxsize=None)
    def ours(folder: Path) -> bool:
        """In a run's folder or a cache below a root; what the user names as a root is meant."""
        if folder in tops or folder == folder.parent:
            return False
        marks = (("config.yaml", "log.jsonl"), ("settings.json", "frames.u8"))
        return any(all((folder / name).is_file() for name in both) for both in marks) or ours(folder.parent)

    kept = [clip for clip in clips if not ours(clip.files[0].parent)]
    return kept, len(clips) - len(kept)


def stamp(clip: Clip) -> list[int]:
    """Number of files, bytes and latest change: enough to see that a clip need not be hashed again."""
    stats = [path.stat() for path in clip.files]
    return [len(stats), sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)]


def missing(clips: list[Clip], lines: dict[str, dict]) -> tuple[dict[str, str], list[tuple[Clip, list[int]]]]:
    """The reasons of clips that are gone, and the (clip, stamp) of those without a line or changed since."""
    failed, todo = {}, []
    for clip in clips:
        try:
            now = stamp(clip)
        except OSError as error:  # vanished since it was listed
            failed[clip.id] = f"{type(error).__name__}: {error.strerror}"
            continue
        if clip.id not in lines or lines[clip.id].get("stamp") != now:
            todo.append((clip, now))
    return failed, todo


def drop_damaged(lines: dict[str, dict], ids: set[str]) -> None:
    """Forget the lines of damaged clips, and those of copies, which share the frames."""
    contents = {lines[name]["sha256"] for name in ids if name in lines}
    for name in [name for name, line in lines.items() if line["sha256"] in contents]:
        del lines[name]


def check_kept(cache: FrameCache) -> None:
    """Compare kept clips with their checksums, the first CHECK_BYTES of them; others when they are first read."""
    used = np.cumsum(cache.lengths) * cache.size**2
    cache.check(np.flatnonzero(used <= CHECK_BYTES))


# ------------------------------------------------------------------------------------------------- doing it


def append(todo, lines: dict[str, dict], end: int, work: Work) -> dict[str, str]:
    """Decode (clip, stamp)s and append them; updates `lines`; returns the reason of every clip that failed."""
    failed, tiles = {}, []
    by_content = {line["sha256"]: line for line in lines.values()}
    count = min((os.cpu_count() or 1) if work.workers is None else work.workers, len(todo))
    task = partial(prepare, settings=work.settings, known=frozenset(by_content), sheets=work.sheets)
    results = processes.ordered(task, [clip for clip, _ in todo], count, "uscl_hub.clips.read")
    writer = Writer(work.folder, end)
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
            line = dict(line, id=clip.id, source=clip.source, stamp=then)
            by_content.setdefault(line["sha256"], line)
            lines[clip.id] = line
            writer.line(line)
            if tile is not None:
                tiles.append((clip.id, *tile))
    finally:
        results.close()  # first: it ends the workers at once
        writer.close()
    for i in range(0, len(tiles), 40):
        path = work.folder / "sheets" / f"{i // 40:03d}.png"
        write_whole(path, partial(before_after_sheet, tiles[i : i + 40]))
    return failed


def prepare(clip: Clip, settings: FrameSettings, known: frozenset, sheets: bool):
    """One clip: its index line (without the offset), its frames uint8 (T, size, size) unless the content is already
    known, and, if wanted, its tile for the sheet. A str is the reason why it cannot be read."""
    try:
        for _ in range(2):  # a file that changes while it is read gets a second try
            before, sha256, hashed = stamp(clip), content_hash(clip), time.time()
            if sha256 in known:
                return {"sha256": sha256}, None, None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the decoders, and without the file's name
                read = read_clip(
                    clip, settings.size, crop=settings.crop, stride=settings.stride, max_frames=settings.max_frames
                )
            recent = abs(hashed - before[2] / 1e9) < RECENT_SECONDS
            if (stamp(clip) == before and not recent) or content_hash(clip) == sha256:
                line = index_line(read, sha256)
                if len(clip.files) > 1:  # a test may hold single ones of them
                    line["files"] = [content_hash(replace(clip, files=(path,))) for path in clip.files]
                return line, read.images, (read.before, read.region, read.after) if sheets else None
        return "the file changes while it is read"
    except UnreadableClip as error:
        return error.reason
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror or error}"


def index_line(read, sha256: str) -> dict:
    return {
        "sha256": sha256,
        "frames": len(read.images),
        "crc32": zlib.crc32(np.ascontiguousarray(read.images)),
        "fps": read.fps,
        "region": list(read.region.box),
        "masked": read.region.mask is not None,
        "height": read.before.shape[0],
        "width": read.before.shape[1],
        "text": read.text,
        "notes": list(read.notes),
    }


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


# ---------------------------------------------------------------------------------------------- what was done


def describe(records, same, failed: dict[str, str], found: int) -> dict:
    """The report of an ingest."""
    return {
        "clips": len(records),
        "frames": sum(record["frames"] for record in records),
        "found": found,
        "unreadable": [{"id": name, "reason": failed[name]} for name in sorted(failed)],
        "duplicates": [{"id": a, "same_as": b} for a, b in same],
        "notes": [{"id": r["id"], "note": note} for r in records for note in r.get("notes", ())],
        "burned_in_text_suspected": [r["id"] for r in records if r.get("text")],
    }


def too_few(report: dict, least: int, roots, folder: Path) -> CacheError:
    """What is said of fewer readable clips than `least`."""
    unreadable = report["unreadable"]
    some = "".join(f"; {row['id']}: {row['reason']}" for row in unreadable[:5])
    where = ", ".join(str(root) for root in ([roots] if isinstance(roots, (str, Path)) else roots))
    return CacheError(
        f"{report['clips']} readable clips below {where}, at least {least} needed "
        f"({len(unreadable)} unreadable, see {folder / 'report.json'}){some}"
    )


def print_summary(report: dict, folder: Path, passed: Report):
    print(f"{report['clips']} clips, {report['frames']} frames in {folder}", file=sys.stderr)
    if report["own_results_left_out"]:
        print(f"  {report['own_results_left_out']} pictures of earlier results: left out", file=sys.stderr)
    for key, text in (
        ("unreadable", "could not be read"),
        ("duplicates", "are copies of another clip: left out"),
        ("notes", "were read with a note"),
        ("burned_in_text_suspected", "may still show burned-in text: look at them before sharing"),
    ):
        if report[key]:
            print(f"  {len(report[key])} {text} (report.json)", file=sys.stderr)
    for line in passed.lines():
        print(f"  {line}", file=sys.stderr)
