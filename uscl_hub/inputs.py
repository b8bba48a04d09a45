"""The inputs of a command: their clips are found, read ahead of a network, and reported on."""

import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Generator, Iterable, Iterator

from uscl_hub.clips import Clip, Report, UnreadableClip, find_clips
from uscl_hub.clips.find import UNKNOWN
from uscl_hub.clips.read import read_in_time
from uscl_hub.files import write_json


def find_inputs(inputs, frames: str) -> tuple[list[Clip], Report]:
    """All clips below the inputs (files and folders), and what was passed over. frames: see `find_clips`.

    Raises ValueError if there are none, FileNotFoundError for a missing input.
    """
    passed = Report()
    if clips := find_clips(inputs, frames, passed):
        return clips, passed
    raise ValueError(f"no image, video or DICOM file in {', '.join(map(str, inputs))}")


def unknown_files(inputs, clips: list[Clip]) -> list[dict]:
    """{'path', 'reason'} of the files among the inputs that are no clip's."""
    files = [path for path in inputs if Path(path).is_file()]
    known = {os.path.realpath(file) for clip in clips for file in clip.files} if files else set()
    return [{"path": str(path), "reason": UNKNOWN} for path in files if os.path.realpath(path) not in known]


def nothing_read(failed: list[dict]) -> ValueError:
    return ValueError("nothing could be read: " + "; ".join(f"{f['path']}: {f['reason']}" for f in failed[:5]))


def write_report(output: Path, facts: dict, failed: list[dict], passed: Report, more: dict) -> dict:
    """Write `<output>.report.json`, and return what it holds."""
    report = {"output": str(output), **facts, "failed": failed, **passed.as_dict(), "found": passed.lines(), **more}
    write_json(output.with_name(output.name + ".report.json"), report, indent=2)
    return report


def read_ahead(look: Callable, clips: list[Clip], stopped: threading.Event, progress: bool) -> Iterator:
    """look(clip) of all clips in their order, by a thread that is at most two clips ahead; for a clip that cannot be
    read, or takes too long, {'path', 'reason'}. stopped: when it is set, no clip is waited for any longer."""

    def read(clip: Clip):
        try:
            return read_in_time(look, clip, stopped=stopped)
        except UnreadableClip as error:
            return {"path": str(error.path), "reason": error.reason}
        except OSError as error:
            return {"path": str(clip.files[0]), "reason": error.strerror or str(error)}

    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install 'uscl-hub[embed]'") from error
    return tqdm(ahead(read, clips, threads=1), total=len(clips), unit="clip", disable=not progress)


def batches(found: Iterable[tuple], size: int, pending: list[tuple]) -> Iterator[list[tuple]]:
    """(clip, content hash, Frames) triples in lists of `size` frames at least, but for the last.

    pending: is filled with what has been read and is in no list yet.
    """
    waiting = 0
    for one in found:
        pending.append(one)
        waiting += len(one[2].images)
        if waiting >= size:
            yield _taken(pending)
            waiting = 0
    if pending:
        yield _taken(pending)


def _taken(pending: list[tuple]) -> list[tuple]:
    taken = pending.copy()
    pending.clear()
    return taken


def ahead(
    function: Callable, items: Iterable, threads: int, start: Callable | None = None, *args
) -> Generator[Any, None, None]:
    """map(function, items) by threads, up to two items a thread ahead of the caller; start(*args) first in each."""
    pool: ThreadPoolExecutor = ThreadPoolExecutor(threads, initializer=start, initargs=args)
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # nothing is left to wait for, or the caller does not want it
