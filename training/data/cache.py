"""Frame cache: every clip decoded once, cropped, resized, kept as grey uint8 in memory-mapped files.

folder/
  settings.json   what the frames were made with; another setting is another folder
  frames.u8       (total frames, size, size), clips back to back
  index.jsonl     the log: one line a clip, written only after its frames: id, content hash, offset, frames, crc32, ...
  index.arrow     its columns, with index.json, see `index`
  report.json     the last ingest: files that could not be read and why, duplicates, notes
  unreadable.json the clips that could not be read, as their files were then, and why
  damaged.txt     ids of clips whose frames were found damaged; the next ingest decodes them again
  shard_001/ ...  frames.u8, index.jsonl and damaged.txt of what other processes decoded
A cache may lie in several such folders, on several disks. `ingest.py` writes it; this module reads it.
"""

import json
import mmap
import zlib
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
import pyarrow as pa

from training.data import index
from training.data.index import CacheError, Log, in_shard


class FrameCache:
    """Random access to cached frames, a clip a row. Pickles as folders and row numbers: every process maps the files.

    folders: of the cache; size: pixels of the frames' sides. table: `index.SCHEMA`, sorted by id. lengths, offsets:
    int64 (clips,), where `at` finds a clip's frames; fps: float32 (clips,), of the kept frames, NaN where unknown;
    stride: every so many frames of a file are kept; crc32: int64 (clips,), of a clip's frames, -1 where an old cache
    has none. `take`, `clip` and `check` compare a clip's frames with it when they are first read.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        size: int,
        table: pa.Table,
        logs: Sequence[Log] | None = None,
        rows: np.ndarray | None = None,
        stride: int = 1,
    ):
        """The clips in `rows` of the table (None: all), which is that of `logs` (None: it pickles with the cache)."""
        self.folders, self.size, self.logs, self.rows = tuple(map(Path, folders)), size, logs, rows
        self.stride = stride
        self._set_table(table)

    def _set_table(self, table: pa.Table):
        self.table = table
        numbers = ("frames", "offset", "fps", "crc32")
        self.lengths, self.offsets, fps, self.crc32 = (self._numpy(name) for name in numbers)
        self.fps = fps / np.float32(self.stride)  # the index has the file's

    def _numpy(self, name: str) -> np.ndarray:
        values = index.column(self.table, name).to_numpy()
        return values if self.rows is None else values[self.rows]

    @classmethod
    def open(cls, path: Path | str | Sequence[Path | str]) -> "FrameCache":
        """The cache in `path`, or in several paths: settings folders, or the folders around exactly one each.

        Identical contents count once. Raises CacheError.
        """
        folders = [settings_folder(Path(one)) for one in ([path] if isinstance(path, (str, Path)) else path)]
        if len(names := {folder.name for folder in folders}) > 1:
            raise CacheError(f"{', '.join(map(str, folders))}: their frames were made with different settings: {names}")
        about = folders[0] / "settings.json"
        try:
            settings = json.loads(about.read_text(encoding="utf-8"))
            size, stride = int(settings["size"]), int(settings.get("stride", 1))
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{about} is damaged: delete {folders[0]} and ingest again") from error
        logs = index.find_logs(folders)
        table = index.load(folders, size, logs)
        return cls(folders, size, table, logs, first_of_each(table), stride)

    # --------------------------------------------------------------------------------------------- about the clips

    def _list(self, name: str) -> list:
        column = self.table[name]
        return (column if self.rows is None else column.take(pa.array(self.rows))).to_pylist()

    @property
    def ids(self) -> list[str]:
        """Of all clips; the list is made at each use, as are the others'."""
        return self._list("id")

    def each_id(self) -> Iterator[str]:
        """The ids, without a list of them all."""
        column, part = self.table["id"], 1 << 16
        for first in range(0, len(self), part):
            rows = None if self.rows is None else pa.array(self.rows[first : first + part])
            yield from (column.slice(first, part) if rows is None else column.take(rows)).to_pylist()

    @property
    def sources(self) -> list[str]:
        names = self.source_names
        return [names[number] for number in self.source_numbers]

    @property
    def sha256(self) -> list[str]:
        return [digest.hex() for digest in self._list("sha256")]

    @property
    def files(self) -> list[tuple[str, ...]]:
        """Of every clip, the SHA-256 of each file of a numbered series; () for one file and in old caches."""
        return [tuple(digest.hex() for digest in digests) for digests in self._list("files")]

    def id_of(self, clip: int) -> str:
        return self.table["id"][int(clip if self.rows is None else self.rows[clip])].as_py()

    @cached_property
    def _sources(self) -> tuple[list[str], np.ndarray]:
        coded = index.column(self.table, "source")
        codes = coded.indices.to_numpy()
        present, numbers = np.unique(codes if self.rows is None else codes[self.rows], return_inverse=True)
        names, places = np.unique(coded.dictionary.take(pa.array(present)).to_numpy(False), return_inverse=True)
        return names.tolist(), places.astype(np.int32)[numbers]

    @property
    def source_names(self) -> list[str]:
        """Sorted, each once."""
        return self._sources[0]

    @property
    def source_numbers(self) -> np.ndarray:
        """int32 (clips,): each clip's source as its place in `source_names`."""
        return self._sources[1]

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self):
        return f"FrameCache({self.path}, {len(self)} clips, {int(self.lengths.sum())} frames of {self.size} px)"

    # ------------------------------------------------------------------------------------------------- their frames

    @property
    def path(self) -> Path:
        """The first folder."""
        return self.folders[0]

    @cached_property
    def shards(self) -> list[Path]:
        """Their folders, by number."""
        return [self.folders[log.folder] / log.name for log in self.logs or ()] or [self.path]

    @cached_property
    def maps(self) -> list[np.ndarray]:
        """A uint8 memory map (frames, size, size) of each shard; it may hold clips that are not listed here."""
        return [_map(shard / "frames.u8", self.size) for shard in self.shards]

    @property
    def frames(self) -> np.ndarray:
        """The first shard's map."""
        return self.maps[0]

    def at(self, numbers: np.ndarray) -> np.ndarray:
        """The frames with these numbers, unchecked: uint8 (..., size, size), a copy.

        Args:
            numbers: int64 (...), a clip's `offsets` + the frame's number within it.
        """
        if len(self.shards) == 1:
            return self.frames[numbers]
        found = np.empty((*numbers.shape, self.size, self.size), np.uint8)
        shards, within = in_shard(numbers)
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self.maps[shard][within[here]]
        return found

    def take(self, clips: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Frames of n clips, uint8 (n, ..., size, size), a copy.

        Args:
            clips: int (n,), indices of clips.
            numbers: int (n, ...), frame numbers within each clip.

        Raises:
            CacheError: a clip's frames, on their first use, do not match their checksum.
        """
        self.check(clips)
        return self.at(self.offsets[clips].reshape(-1, *[1] * (np.ndim(numbers) - 1)) + numbers)

    def clip(self, i: int) -> np.ndarray:
        """uint8 (T, size, size), a view of the memory map. Raises CacheError as `take`."""
        self.check([i])
        shard, first = in_shard(int(self.offsets[i]))
        return self.maps[shard][first : first + self.lengths[i]]

    @cached_property
    def _checked(self) -> np.ndarray:
        return self.crc32 < 0

    def check(self, clips) -> None:
        """Compare clips with their checksums, each once. Raises CacheError and notes it for the next ingest."""
        clips = np.asarray(clips)
        for i in np.unique(clips[~self._checked[clips]]) if not self._checked[clips].all() else ():
            number, first = in_shard(int(self.offsets[i]))
            shard = self.shards[number]
            if self._crc32_of_file(shard / "frames.u8", first, self.lengths[i]) != self.crc32[i]:
                note_damage(shard, self.id_of(i))
                raise CacheError(
                    f"{shard / 'frames.u8'}: the frames of {self.id_of(i)} do not match their checksum: the disk "
                    "or a copy has changed them. Start again, and that clip is decoded again"
                )
            self._checked[i] = True

    def _crc32_of_file(self, path: Path, first: int, frames: int) -> int:
        """Reads the file and not the map, whose pages come one by one."""
        crc, left = 0, int(frames) * self.size**2
        with open(path, "rb", buffering=0) as file:
            file.seek(first * self.size**2)
            while left and (block := file.read(min(left, 1 << 24))):
                crc, left = zlib.crc32(block, crc), left - len(block)
        return crc

    # --------------------------------------------------------------------------------------------------- processes

    def __getstate__(self):
        kept = {name: getattr(self, name) for name in ("folders", "size", "logs", "rows", "stride")}
        return kept if self.logs is not None else kept | {"table": self.table}

    def __setstate__(self, state):
        table = state.pop("table", None)
        self.__dict__.update(state)
        self._set_table(index.load(self.folders, self.size, self.logs) if table is None else table)


def settings_folder(path: Path) -> Path:
    """`path`, or the one folder in it, that holds a cache's settings.json. Raises CacheError."""
    if (path / "settings.json").is_file():
        return path
    inside = sorted(path.glob("*/settings.json"))
    if not inside:
        raise CacheError(f"{path}: holds no frame cache; run the ingest first")
    if len(inside) > 1:
        names = ", ".join(p.parent.name for p in inside)
        raise CacheError(f"{path}: holds {len(inside)} caches with different settings; name one: {names}")
    return inside[0].parent


def first_of_each(table: pa.Table) -> np.ndarray | None:
    """The rows of a table without those whose content is that of an earlier row; None: all differ."""
    if not len(table):
        return None
    digests = index.column(table, "sha256")
    words = np.frombuffer(digests.buffers()[1], ">u8")[4 * digests.offset :][: 4 * len(table)].reshape(-1, 4)
    some = np.sort(words[:, -1])
    if (some[1:] != some[:-1]).all():
        return None
    order = np.lexsort(words.T)  # stable: equal ones stay in the table's order
    new = np.append(True, (words[order[1:]] != words[order[:-1]]).any(1))
    return None if new.all() else np.sort(order[new])


def _map(file: Path, size: int) -> np.ndarray:
    total = file.stat().st_size // size**2 if file.exists() else 0
    if total == 0:
        return np.empty((0, size, size), np.uint8)
    with open(file, "rb") as f:
        pages = mmap.mmap(f.fileno(), total * size**2, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # training wants single frames: the usual read-ahead would be 20 times as much
        pages.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(pages, np.uint8).reshape(total, size, size)


def note_damage(shard: Path, clip_id: str) -> None:
    try:
        with open(shard / "damaged.txt", "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(clip_id) + "\n")  # on a line of its own, also after one that was cut off
    except OSError:
        pass  # a read-only cache: the message is all that can be done


def read_damage(shard: Path) -> set[str]:
    """Ids of the clips to decode again. A line that a crash has cut off costs that line."""
    found = set()
    try:
        lines = (shard / "damaged.txt").read_bytes().splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        with suppress(ValueError):
            found.add(str(json.loads(line)))
    return found
