"""The index of a frame cache: logs that only grow, and columns made of them that all processes map.

Every shard has a log, index.jsonl: one line a clip, appended once its frames are on the disk. The log is what counts.
index.arrow has its columns, sorted by id, ready at once for a million clips; index.json says which logs they are of.
Where those do not fit together, the columns are made again.
"""

import json
import os
import re
import zlib
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import pyarrow as pa

from uscl_hub.errors import UserError
from uscl_hub.files import write_json, write_whole

SHARD = 40  # bits of a frame's number in its shard; the shard's number is above them
SHARDS = "shard_*"  # folders of the further shards of a cache folder, itself the first one
SCHEMA = pa.schema(
    {
        "id": pa.large_string(),
        "source": pa.dictionary(pa.int32(), pa.string()),
        "sha256": pa.binary(32),
        "frames": pa.int64(),
        "offset": pa.int64(),  # the first frame's number, with the shard's
        "fps": pa.float32(),  # NaN where unknown
        "crc32": pa.int64(),  # of the frames; -1 in an old log
        "files": pa.list_(pa.binary(32)),  # SHA-256 of each file of a numbered series
    }
)


def in_shard(numbers):
    """A frame's number, or an array of them, as its shard's number and its number there."""
    return numbers >> SHARD, numbers & (1 << SHARD) - 1


class CacheError(UserError):
    """The cache folder cannot be used: in use, damaged, or too few clips; the message says which and what to do."""


class Log(NamedTuple):
    """A shard's index.jsonl up to its last whole line: folder (number in the list of cache folders), name of the shard
    in it ('' for the folder itself), bytes, and their crc32."""

    folder: int
    name: str
    bytes: int
    crc32: int


def shard_folders(folders: Sequence[Path]) -> list[tuple[int, str]]:
    """All shards of cache folders, as in `Log`."""
    return [
        (number, name)
        for number, folder in enumerate(folders)
        for name in ["", *sorted(path.name for path in folder.glob(SHARDS) if path.is_dir())]
    ]


def find_logs(folders: Sequence[Path]) -> list[Log]:
    """What the shards' logs hold now."""
    found = []
    for number, name in shard_folders(folders):
        file = folders[number] / name / "index.jsonl"
        if file.exists():
            size = _whole(file)
            found.append(Log(number, name, size, _crc32(file, size)))
    return found


def _whole(file: Path) -> int:
    """Bytes up to the last line break: a writer may be at the line behind it, or have been killed there."""
    with open(file, "rb") as log:
        end = log.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - (1 << 16))
            log.seek(start)
            if (at := log.read(end - start).rfind(b"\n")) >= 0:
                return start + at + 1
            end = start
    return 0


def _crc32(file: Path, size: int | None = None) -> int:
    crc, left = 0, file.stat().st_size if size is None else size
    with open(file, "rb", buffering=0) as content:
        while left and (block := content.read(min(left, 1 << 20))):
            crc, left = zlib.crc32(block, crc), left - len(block)
    return crc


# ------------------------------------------------------------------------------------------------------ the log


def read_log(shard: Path, size: int, repair: bool = False, most: int | None = None) -> tuple[dict[str, dict], int]:
    """The latest line of every clip id in a shard's log, and the end (in frames) of what they use.

    Args:
        shard: its folder.
        size: pixels of its frames.
        repair: cut off an unfinished last line and frames without a line: for the shard's one writer. A reader just
            leaves them aside.
        most: read so many bytes only.

    Raises:
        CacheError: a line is damaged, or needs more frames than there are.
    """
    index, data = shard / "index.jsonl", shard / "frames.u8"
    text = index.read_bytes()[:most] if index.exists() else b""
    complete = text[: text.rfind(b"\n") + 1]
    lines, end = {}, 0
    for number, row in enumerate(complete.splitlines(), start=1):
        try:
            line = json.loads(row)
            if not _is_line(line):
                raise ValueError("a value is missing or of the wrong type")
        except ValueError as error:
            raise CacheError(f"{index}, line {number} is damaged: delete {shard} and ingest again") from error
        lines[line["id"]] = line
        end = max(end, line["offset"] + line["frames"])
    _check_end(data, size, end)
    if repair:
        if len(complete) < len(text):
            os.truncate(index, len(complete))
        if data.exists() and data.stat().st_size > end * size**2:
            os.truncate(data, end * size**2)
    return lines, end


def _is_line(line) -> bool:
    if not isinstance(line, dict):
        return False
    texts, counts = [line.get("id"), line.get("source")], [line.get("frames"), line.get("offset")]
    hashes, rate = [line.get("sha256"), *(line.get("files") or ())], line.get("fps")
    return (
        all(type(text) is str and not re.search("[\ud800-\udfff]", text) for text in texts)
        and all(type(text) is str and re.fullmatch("[0-9a-f]{64}", text) for text in hashes)
        and all(type(count) is int for count in (*counts, line.get("crc32", 0), line.get("run", 0)))
        and 1 <= counts[0] < 1 << SHARD
        and 0 <= counts[1] < 1 << SHARD
        and (rate is None or type(rate) in (int, float))
    )


def join(logs: Sequence[dict[str, dict]]) -> dict[str, dict]:
    """The latest line of every clip id in several shards, each with its 'shard' (its place in `logs`): that of the last
    ingest ('run') that decoded the clip."""
    joined: dict[str, dict] = {}
    for shard, lines in enumerate(logs):
        for name, line in lines.items():
            kept = joined.get(name)
            if kept is None or line.get("run", 0) > kept.get("run", 0):
                joined[name] = {**line, "shard": shard}
    return joined


def unique(lines) -> tuple[list[dict], list[tuple[str, str]]]:
    """One line for each content, the first by id; and the (id, id it equals) of the others."""
    first, same = {}, []
    for line in sorted(lines, key=lambda line: line["id"]):
        kept = first.setdefault(line["sha256"], line)
        if kept is not line:
            same.append((line["id"], kept["id"]))
    return list(first.values()), same


def drop_damaged(lines: dict[str, dict], ids: set[str]) -> None:
    """Forget the lines of damaged clips, and those of copies, which share the frames."""
    contents = {lines[name]["sha256"] for name in ids if name in lines}
    for name in [name for name, line in lines.items() if line["sha256"] in contents]:
        del lines[name]


# -------------------------------------------------------------------------------------------------- the columns


def columns(lines: Sequence[dict]) -> pa.Table:
    """The lines as a table with SCHEMA, sorted by id."""
    lines = sorted(lines, key=lambda line: line["id"])
    values = {
        "id": [line["id"] for line in lines],
        "sha256": [bytes.fromhex(line["sha256"]) for line in lines],
        "frames": [line["frames"] for line in lines],
        "offset": [line.get("shard", 0) << SHARD | line["offset"] for line in lines],
        "fps": np.array([line.get("fps") or np.nan for line in lines], np.float32),
        "crc32": [line.get("crc32", -1) for line in lines],
        "files": [[bytes.fromhex(file) for file in line.get("files") or ()] for line in lines],
        "source": pa.array([line["source"] for line in lines], pa.string()).dictionary_encode(),
    }
    return pa.table([pa.array(values[field.name], field.type) for field in SCHEMA], SCHEMA)


def column(table: pa.Table, name: str) -> pa.Array:
    """A column as one array; that of a mapped table is not copied."""
    chunks = table[name]
    return chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()


def save(folders: Sequence[Path], logs: Sequence[Log], table: pa.Table) -> pa.Table:
    """Write index.arrow and index.json into the first of the cache folders. Returns the table, mapped."""

    def write(part):
        with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            writer.write_table(table)

    path = folders[0] / "index.arrow"
    write_whole(path, write)
    write_json(folders[0] / "index.json", {"logs": list(logs), "crc32": _crc32(path)})
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def load(folders: Sequence[Path], size: int, logs: Sequence[Log]) -> pa.Table:
    """The table of these logs: that of index.arrow, or else made again from the logs, which only grow.

    Raises CacheError where a log is damaged, is not what it was, or needs more frames than there are.
    """
    table = saved(folders[0], logs)
    if table is None:
        for log in logs:
            file = folders[log.folder] / log.name / "index.jsonl"
            if not file.exists() or _crc32(file, log.bytes) != log.crc32:
                raise CacheError(f"{file}: has changed since the training began: start it again")
        read = (read_log(folders[log.folder] / log.name, size, most=log.bytes)[0] for log in logs)
        return columns(list(join(list(read)).values()))
    ends = column(table, "offset").to_numpy() + column(table, "frames").to_numpy()
    for shard, log in enumerate(logs):
        _, need = in_shard(int(ends[ends >> SHARD == shard].max(initial=shard << SHARD)))
        _check_end(folders[log.folder] / log.name / "frames.u8", size, need)
    return table


def _check_end(data: Path, size: int, need: int) -> None:
    have = data.stat().st_size // size**2 if data.exists() else 0
    if need > have:
        raise CacheError(
            f"{data} ends at frame {have} but its index needs {need}: delete {data.parent} and ingest again"
        )


def saved(folder: Path, logs: Sequence[Log]) -> pa.Table | None:
    """index.arrow, memory-mapped, if it is whole and of these logs."""
    path = folder / "index.arrow"
    try:
        about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if about != {"logs": [list(log) for log in logs], "crc32": _crc32(path)}:
            return None
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, ValueError):  # none yet, or not ours: pyarrow's errors are ValueErrors
        return None
    return table if table.schema.equals(SCHEMA) else None
