"""Frame cache: every clip decoded once, cropped, resized, kept as grey uint8 in one memory-mapped file.

folder/
  settings.json   what the frames were made with; another setting is another folder
  frames.u8       (total frames, size, size), clips back to back
  index.jsonl     one line a clip, written only after its frames: id, content hash, offset, frames, crc32, region, ...
  report.json     the last ingest: files that could not be read and why, duplicates, notes
  damaged.txt     ids of clips whose frames were found damaged; the next ingest decodes them again
`ingest.py` writes it; this module reads it.
"""

import json
import mmap
import os
import sys
import zlib
from functools import cached_property
from pathlib import Path
from typing import Sequence

import numpy as np

from uscl_hub.errors import UserError


class CacheError(UserError):
    """The cache folder cannot be used: in use, damaged, or too few clips; the message says which and what to do."""


class FrameCache:
    """Random access to cached frames. Pickles as a path and columns, so that worker processes share the mapping.

    ids, sources, sha256: lists of str; files: of every clip, the SHA-256 of each file of a numbered series, () for one
    file and in old caches; lengths, offsets: int64 (clips,); fps: float32 (clips,), NaN where unknown; crc32: int64
    (clips,), of a clip's frames, -1 where an old cache has none. All sorted by id. frames: uint8 memory map (total
    frames, size, size), which may hold clips not listed here; `take` and `clip` check a clip's frames when they are
    first read.
    """

    def __init__(self, path: Path, size: int, records: Sequence[dict]):
        records = sorted(records, key=lambda record: record["id"])
        self.path, self.size = Path(path), size
        self.ids = [record["id"] for record in records]
        self.sources = [sys.intern(record["source"]) for record in records]
        self.sha256 = [record["sha256"] for record in records]
        self.lengths = np.array([record["frames"] for record in records], np.int64)
        self.offsets = np.array([record["offset"] for record in records], np.int64)
        self.files = [tuple(record.get("files", ())) for record in records]
        self.fps = np.array([record.get("fps") or np.nan for record in records], np.float32)
        self.crc32 = np.array([record.get("crc32", -1) for record in records], np.int64)

    @classmethod
    def open(cls, path: Path | str) -> "FrameCache":
        """The cache in `path`: a settings folder, or the folder around exactly one. Identical contents count once."""
        path = Path(path)
        if not (path / "settings.json").is_file():
            inside = sorted(path.glob("*/settings.json"))
            if not inside:
                raise CacheError(f"{path}: holds no frame cache; run the ingest first")
            if len(inside) > 1:
                names = ", ".join(p.parent.name for p in inside)
                raise CacheError(f"{path}: holds {len(inside)} caches with different settings; name one: {names}")
            path = inside[0].parent
        try:
            size = int(json.loads((path / "settings.json").read_text(encoding="utf-8"))["size"])
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{path / 'settings.json'} is damaged: delete {path} and ingest again") from error
        lines, _ = read_index(path, size)
        return cls(path, size, unique(lines.values())[0])

    @cached_property
    def source_numbers(self) -> np.ndarray:
        """int64 (clips,): each clip's source as a number, by the order of the sources' names."""
        return np.unique(self.sources, return_inverse=True)[1].astype(np.int64)

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
    def _checked(self) -> np.ndarray:
        return self.crc32 < 0

    def take(self, clips: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Frames of n clips, uint8 (n, ..., size, size), a copy.

        Args:
            clips: int (n,), indices of clips.
            numbers: int (n, ...), frame numbers within each clip.

        Raises:
            CacheError: a clip's frames, on their first use, do not match their checksum.
        """
        self.check(clips)
        offsets = self.offsets[clips].reshape(-1, *[1] * (np.ndim(numbers) - 1))
        return self.frames[offsets + numbers]

    def clip(self, i: int) -> np.ndarray:
        """uint8 (T, size, size), a view of the memory map. Raises CacheError as `take`."""
        self.check([i])
        return self.frames[self.offsets[i] : self.offsets[i] + self.lengths[i]]

    def check(self, clips) -> None:
        """Compare clips with their checksums, each once. Raises CacheError and notes it for the next ingest."""
        clips = np.asarray(clips)
        for i in np.unique(clips[~self._checked[clips]]) if not self._checked[clips].all() else ():
            if self._crc32_of_file(i) != self.crc32[i]:
                note_damage(self.path, self.ids[i])
                raise CacheError(
                    f"{self.path / 'frames.u8'}: the frames of {self.ids[i]} do not match their checksum: the disk "
                    "or a copy has changed them. Start again, and that clip is decoded again"
                )
            self._checked[i] = True

    def _crc32_of_file(self, i: int) -> int:
        """Reads the file and not the map, whose pages come one by one."""
        crc, left = 0, int(self.lengths[i]) * self.size**2
        with open(self.path / "frames.u8", "rb", buffering=0) as file:
            file.seek(int(self.offsets[i]) * self.size**2)
            while left and (block := file.read(min(left, 1 << 24))):
                crc, left = zlib.crc32(block, crc), left - len(block)
        return crc

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self):
        return f"FrameCache({self.path}, {len(self)} clips, {int(self.lengths.sum())} frames of {self.size} px)"

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key not in ("frames", "_checked")}


def note_damage(folder: Path, clip_id: str) -> None:
    try:
        with open(folder / "damaged.txt", "a", encoding="utf-8") as file:
            file.write(json.dumps(clip_id) + "\n")
    except OSError:
        pass  # a read-only cache: the message is all that can be done


def read_damage(folder: Path) -> set[str]:
    """Ids of the clips to decode again."""
    try:
        return {json.loads(line) for line in (folder / "damaged.txt").read_text(encoding="utf-8").splitlines()}
    except (FileNotFoundError, ValueError):
        return set()


def read_index(folder: Path, size: int, repair: bool = False) -> tuple[dict[str, dict], int]:
    """The latest line of every clip id, and the end (in frames) of what they use.

    With `repair` (the one writer), an unfinished last line and frames without a line are cut off; a reader just
    leaves them aside. Raises CacheError where a line is damaged or needs more frames than there are.
    """
    index, data = folder / "index.jsonl", folder / "frames.u8"
    text = index.read_bytes() if index.exists() else b""
    complete = text[: text.rfind(b"\n") + 1]
    have = data.stat().st_size // size**2 if data.exists() else 0
    lines, end = {}, 0
    for number, row in enumerate(complete.splitlines(), start=1):
        try:
            line = json.loads(row)
            if not _is_line(line):
                raise ValueError("a value is missing or of the wrong type")
        except ValueError as error:
            raise CacheError(f"{index}, line {number} is damaged: delete {folder} and ingest again") from error
        lines[line["id"]] = line
        end = max(end, line["offset"] + line["frames"])
    if end > have:
        raise CacheError(f"{data} ends at frame {have} but its index needs {end}: delete {folder} and ingest again")
    if repair:
        if len(complete) < len(text):
            os.truncate(index, len(complete))
        if data.exists() and data.stat().st_size > end * size**2:
            os.truncate(data, end * size**2)
    return lines, end


def _is_line(line) -> bool:
    if not isinstance(line, dict):
        return False
    texts, counts = (line.get("id"), line.get("source"), line.get("sha256")), (line.get("frames"), line.get("offset"))
    return (
        all(type(text) is str for text in texts)
        and all(type(count) is int for count in (*counts, line.get("crc32", 0)))
        and counts[0] >= 1
        and counts[1] >= 0
    )


def unique(lines) -> tuple[list[dict], list[tuple[str, str]]]:
    """One line for each content, the first by id; and the (id, id it equals) of the others."""
    first, same = {}, []
    for line in sorted(lines, key=lambda line: line["id"]):
        kept = first.setdefault(line["sha256"], line)
        if kept is not line:
            same.append((line["id"], kept["id"]))
    return list(first.values()), same
