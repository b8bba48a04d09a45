"""Ingest: decode into a frame cache what is new or changed, by one process or by all ranks of a process group.

The first rank finds what is to be done and deals it out; each rank appends its share to a shard of its own (`shard`);
the first one joins them in the index. What an interruption leaves undone is done at the next start, nothing twice.
"""

import json
import sys
import time
import warnings
import zlib
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training import distributed
from training.data import index
from training.data import workers as processes
from training.data.cache import FrameCache, read_damage
from training.data.index import CacheError, Log, drop_damaged, join, read_log, unique
from training.data.shard import FrameSettings, Work, do_share, writing
from uscl_hub.clips import Clip, Report, UnreadableClip, content_hash, find_clips
from uscl_hub.clips.pictures import before_after
from uscl_hub.clips.read import read_clip
from uscl_hub.files import write_json

UNREADABLE = "unreadable.json"  # in the cache's first folder
RECENT_SECONDS = 2.0  # a file changed so shortly before may change again without another time stamp
CHECK_BYTES = 2 << 30  # of kept frames: so many are compared with their checksums at the start, a second's work


def ingest(
    roots,
    out: Path | str | list[Path | str],
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
    the usual `if __name__ == '__main__':` guard. Called by all ranks of a process group, each decodes its share.

    Args:
        roots: folders or files, see `uscl_hub.clips.find_clips`.
        out: a folder, or several, on several disks: rank r of R writes to number r mod their number, and all are read.
        size: pixels of the square frames.
        crop: 'crop', 'blank' or 'none', see `uscl_hub.clips.crop`.
        max_frames, stride: of each clip, every stride-th frame and at most so many.
        workers: processes a rank, default one a core, shared with the machine's other ranks; 0 decodes in this process.
        progress: show a bar (of the first rank's share) and a summary.
        min_clips: fewer readable clips than this are an error.
        sheets: write before/after pictures of the crop, sheets/*.png, for the newly decoded clips.
        frames: what numbered images of one folder are, see `uscl_hub.clips.find_clips`.

    Returns:
        The cache of the clips found below `roots` now, the first of those with identical content, on every rank alike.
        Unreadable clips are listed in report.json and skipped.

    Raises:
        CacheError: fewer than `min_clips` clips remain, another process is writing to the same cache, it is damaged, or
            it is read-only and not complete.
        OSError: the disk is full; what is complete stays.
    """
    if processes.imported_by_a_worker():  # a script without a guard: its parent says what is wrong, once
        raise SystemExit(1)
    settings = FrameSettings(size, crop, max_frames, stride)
    folders = [Path(folder) / settings.key for folder in ([out] if isinstance(out, (str, Path)) else out)]
    work = Work(folders, settings, workers, progress and distributed.rank() == 0, sheets)
    if distributed.rank() != 0:
        do_share(distributed.scatter(None), work, prepare)
        return distributed.broadcast(None)
    passed = Report()
    clips, ours = without_results(find_clips(roots, frames, passed), roots)
    cache, report = update(clips, work, {"own_results_left_out": ours} | passed.as_dict())
    if progress:
        print_summary(report, folders[0], passed)
    if len(cache) < min_clips:
        raise too_few(report, min_clips, roots, folders[0])
    return distributed.broadcast(cache)


def update(clips: list[Clip], work: Work, about: dict) -> tuple[FrameCache, dict]:
    """The first rank's part: see what is new or changed, have it decoded, write report.json and the index. Returns the
    cache of `clips`, those with identical content once, and the report, which begins with `about`."""
    folder = work.folders[0]
    with writing(folder) as writable:
        logs = index.find_logs(work.folders)
        lines, runs, redo = read_shards(work, logs, damage=True)
        failed, todo = missing(clips, lines)
        before = read_unreadable(folder)
        if todo and not writable:
            known = {clip.id: before[clip.id]["reason"] for clip, now in todo if unchanged(before.get(clip.id), now)}
            failed |= known
            todo = [(clip, now) for clip, now in todo if clip.id not in known]
        if todo and not writable:
            raise CacheError(
                f"{folder}: is read-only and lacks {len(todo)} of {len(clips)} clips, such as {todo[0][0].id}; "
                "name another cache folder"
            )
        if writable:
            for place in work.folders:
                if place == folder or not (place / "settings.json").exists():
                    write_json(place / "settings.json", asdict(work.settings))
        if work.sheets and work.progress and not todo:
            print(f"no sheets: all clips are in {folder}; another data.cache decodes them again", file=sys.stderr)
        check_kept([lines[clip.id] for clip in clips if clip.id in lines and clip.id not in failed], work, logs)
        failed |= do_share(distributed.scatter(deal(todo, runs + 1)), work, prepare)
        if todo or redo:
            logs = index.find_logs(work.folders)
            lines, *_ = read_shards(work, logs)
        if redo and writable:
            for number, name in index.shard_folders(work.folders):
                (work.folders[number] / name / "damaged.txt").unlink(missing_ok=True)
        records, same = unique(lines[clip.id] for clip in clips if clip.id in lines and clip.id not in failed)
        cache = select(records, lines, logs, work, writable)
        report = describe(records, same, failed, len(clips), work.settings.max_frames) | about
        if writable:
            write_json(folder / "report.json", report)
            tried = {clip.id: now for clip, now in todo}
            kept = {name: row for name, row in before.items() if name not in tried}
            new = {name: {"stamp": now, "reason": failed[name]} for name, now in tried.items() if name in failed}
            if kept | new != before:
                write_json(folder / UNREADABLE, kept | new)
    return cache, report


def read_shards(work: Work, logs: list[Log], damage: bool = False) -> tuple[dict[str, dict], int, bool]:
    """The latest line of every clip id in all shards, with its shard; the number of the last ingest; and whether any
    clip was found damaged. damage: leave those out."""
    shards, runs, found = [], 0, False
    for log in logs:
        shard = work.folders[log.folder] / log.name
        lines, _ = read_log(shard, work.settings.size, most=log.bytes)
        runs = max(runs, max((line.get("run", 0) for line in lines.values()), default=0))
        if names := read_damage(shard):
            found = True
            if damage:
                drop_damaged(lines, names)
        shards.append(lines)
    return join(shards), runs, found


def select(records: list[dict], lines: dict[str, dict], logs: list[Log], work: Work, writable: bool) -> FrameCache:
    """The cache of these records among all lines, whose columns are saved if those on the disk are not theirs."""
    table = index.saved(work.folders[0], logs)
    if table is None:
        table = index.columns(list(lines.values()))
        if writable:
            table = index.save(work.folders, logs, table)
    names = pa.array([record["id"] for record in records], table.schema.field("id").type)
    rows = pc.index_in(names, index.column(table, "id")).to_numpy()
    return FrameCache(work.folders, work.settings.size, table, logs, rows, work.settings.stride)


# ------------------------------------------------------------------------------------------- what is to be done


def without_results(clips: list[Clip], roots) -> tuple[list[Clip], int]:
    """The clips that are not figures or caches of ours below `roots`, and the number of those that are."""
    roots = [roots] if isinstance(roots, (str, Path)) else roots
    tops = {Path(root).parent.resolve() / Path(root).name for root in roots}  # as the clips' paths: a link by its name
    tops |= {path.resolve() for path in tops}
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
    """Number of files, bytes and latest change, of a series also a checksum of each one's name, bytes and change:
    enough to see that a clip need not be hashed again."""
    stats = [path.stat() for path in clip.files]
    found = [len(stats), sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)]
    if len(stats) > 1:
        each = [(path.name, s.st_size, s.st_mtime_ns) for path, s in zip(clip.files, stats)]
        found.append(zlib.crc32(repr(each).encode()))
    return found


def missing(clips: list[Clip], lines: dict[str, dict]) -> tuple[dict[str, str], list[tuple[Clip, list[int]]]]:
    """The reasons of clips that are gone, and the (clip, stamp) of those without a line or changed since."""
    failed, todo = {}, []
    for clip in clips:
        try:
            now = stamp(clip)
        except OSError as error:  # vanished since it was listed
            failed[clip.id] = f"{type(error).__name__}: {error.strerror}"
            continue
        if not unchanged(lines.get(clip.id), now):
            todo.append((clip, now))
    return failed, todo


def unchanged(line: dict | None, now: list[int]) -> bool:
    """Whether what is known of a clip is of its files as they are now."""
    return line is not None and line.get("stamp") == now


def read_unreadable(folder: Path) -> dict[str, dict]:
    """Stamp and reason, by id, of the clips that could not be read: those that can write here try them again, others
    take them as missing, not the cache as incomplete."""
    path = folder / UNREADABLE
    try:
        return {name: dict(row) for name, row in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError):
        raise CacheError(f"{path} is damaged: delete it and start again") from None


def check_kept(records: list[dict], work: Work, logs: list[Log]) -> None:
    """Compare kept clips with their checksums, the first CHECK_BYTES of them; others when they are first read."""
    size = work.settings.size
    records = sorted(records, key=lambda record: record["id"])
    used = np.cumsum([record["frames"] for record in records]) * size**2
    table = index.columns(records[: int((used <= CHECK_BYTES).sum())])
    FrameCache(work.folders, size, table, logs).check(np.arange(len(table)))


def deal(todo: list[tuple], run: int) -> list[tuple[int, list[tuple]]]:
    """The ingest's number and the share of `todo` for every rank, large and small clips in each alike."""
    ranks = distributed.world()
    if ranks > 1:
        todo = sorted(todo, key=lambda clip_and_stamp: -clip_and_stamp[1][1])
    return [(run, todo[rank::ranks]) for rank in range(ranks)]


# -------------------------------------------------------------------------------------------- how a clip is read


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
                tile = before_after(clip.id, read.before, read.region, read.after) if sheets else None
                return line, read.images, tile
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


# ---------------------------------------------------------------------------------------------- what was done


def describe(records, same, failed: dict[str, str], found: int, most: int | None) -> dict:
    """The report of an ingest that keeps at most so many frames of a clip."""
    return {
        "clips": len(records),
        "frames": sum(record["frames"] for record in records),
        "found": found,
        "unreadable": [{"id": name, "reason": failed[name]} for name in sorted(failed)],
        "duplicates": [{"id": a, "same_as": b} for a, b in same],
        "notes": [{"id": r["id"], "note": note} for r in records for note in r.get("notes", ())],
        "of_one_frame": [r["id"] for r in records if r["frames"] == 1],
        "of_max_frames": [r["id"] for r in records if most and r["frames"] >= max(2, most)],
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
        ("of_one_frame", "have one frame: only the augmentation tells a pair's views apart"),
        ("of_max_frames", "have as many frames as are kept (data.max_frames): what follows is left out"),
        ("burned_in_text_suspected", "may still show burned-in text: look at them before sharing"),
    ):
        if report[key]:
            print(f"  {len(report[key])} {text} (report.json)", file=sys.stderr)
    for line in passed.lines():
        print(f"  {line}", file=sys.stderr)
