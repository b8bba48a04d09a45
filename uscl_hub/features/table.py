"""The table of `uscl-hub embed`: a Parquet file whose metadata holds the settings. It is made of parts."""

import json
import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uscl_hub import ranks
from uscl_hub.errors import UserError, printable
from uscl_hub.files import check_regular, write_whole
from uscl_hub.tensors import shorten

CROPS = ("crop", "blank", "none")
THUMBNAIL = 96  # pixels
MAX_PX = 4096


class TableError(UserError, ValueError):
    """A feature table that is missing, damaged, somebody else's, or of other settings."""


def import_pyarrow():
    """(pyarrow, pyarrow.parquet). Raises ImportError."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("feature tables need pyarrow: pip install 'uscl-hub[embed]'") from error
    return pyarrow, pyarrow.parquet


def columns(features: int) -> dict[str, Any]:
    """Name -> pyarrow type, of a table whose feature vectors have so many numbers."""
    pa, _ = import_pyarrow()
    return {
        "level": pa.string(),
        "clip": pa.string(),
        "source": pa.string(),
        "sha256": pa.string(),
        "frame": pa.int32(),
        "time": pa.float64(),
        "frames": pa.int32(),
        "text": pa.bool_(),
        "note": pa.string(),
        "thumbnail": pa.binary(),
        "feature": pa.list_(pa.float32(), features),
    }


def make_schema(features: int, settings: dict):
    """pyarrow.Schema of a table; its metadata holds the settings."""
    pa, _ = import_pyarrow()
    return pa.schema(list(columns(features).items()), metadata={"uscl_hub": json.dumps(settings)})


# ------------------------------------------------------------------------------------------------------- reading


@contextmanager
def _read(path):
    """What pyarrow raises of a damaged file (nearly anything) becomes a TableError; a pipe is not waited for."""
    try:
        check_regular(path)
        yield
    except FileNotFoundError:
        raise TableError(f"{path}: no such file. Make it with `uscl-hub embed`") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise TableError(f"{path}: is not a feature table of `uscl-hub embed`, or is damaged") from error


def _whole(value, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


# what each setting must be: (test, in words)
SETTINGS = {
    "name": (lambda v: isinstance(v, str) and re.fullmatch(r"\w[\w.]{0,200}", v), "a model's name"),
    "weights": (lambda v: isinstance(v, str) and re.fullmatch(r"[0-9a-f]{64}", v), "a SHA-256"),
    "px": (lambda v: _whole(v, 1, MAX_PX), f"a whole number from 1 to {MAX_PX}"),
    "stride": (lambda v: _whole(v, 1, 10**9), "a whole number from 1"),
    "crop": (lambda v: v in CROPS, f"one of {', '.join(CROPS)}"),
    "checkpoint": (lambda v: v is None or isinstance(v, str) and 0 < len(v) < 4096, "a text"),
    "revision": (lambda v: v is None or isinstance(v, str) and 0 < len(v) < 4096, "a text"),
    "places": (lambda v: isinstance(v, dict) and all(isinstance(p, str) for p in v.values()), "a table of texts"),
}
OPTIONAL: dict[str, Any] = {
    "checkpoint": None,
    "revision": None,
    "places": {},
}  # tables of earlier versions may lack them


def read_settings(path) -> dict:
    """The settings in a table's metadata, each of the right type and within its range. Raises TableError."""
    _, pq = import_pyarrow()
    with _read(path):
        found = json.loads(pq.read_schema(path).metadata[b"uscl_hub"])
        found = {**OPTIONAL, **found}
    for key, (right, wanted) in SETTINGS.items():
        if key not in found or not right(found[key]):
            has = f"has {key} {shorten(json.dumps(found[key]))}" if key in found else f"has no {key}"
            raise TableError(f"{path}: {printable(has)}, expected {wanted}. Make it again with `uscl-hub embed`")
    return found


def read_clips(path):
    """The rows of level 'clip' as a pyarrow.Table of the columns clip, frames, thumbnail and feature; there is at least
    one, none of their values is missing, and all features have the same length. Raises TableError."""
    pa, pq = import_pyarrow()
    with _read(path):
        schema = pq.read_schema(path)
        types = {field.name: field.type for field in schema}
        for name, wanted in (("level", "string"), ("clip", "string"), ("frames", "int32"), ("thumbnail", "binary")):
            if str(types.get(name)) != wanted:
                raise TableError(f"{path}: has no column {name} of type {wanted}; expected a table of `uscl-hub embed`")
        vectors = types.get("feature", pa.null())
        if not (pa.types.is_fixed_size_list(vectors) and pa.types.is_float32(vectors.value_type)):
            raise TableError(f"{path}: has no column feature of float32 vectors of one length")
        names = ["clip", "frames", "thumbnail", "feature"]
        table = pq.read_table(path, columns=names, filters=[("level", "=", "clip")])
        table.validate(full=True)  # texts that are not UTF-8, for one
    if not len(table):
        raise TableError(f"{path}: holds no clips. Make it again with `uscl-hub embed`")
    if empty := [name for name in names if table[name].null_count]:
        raise TableError(f"{path}: values of {', '.join(empty)} are missing. Make it again with `uscl-hub embed`")
    return table


def read_finished(paths: list[Path], settings: dict) -> tuple[dict[str, str], dict[str, str]]:
    """Clip id -> content hash of all clips in the tables, and the places of their sources.

    Raises TableError if one was made with other settings.
    """
    _, pq = import_pyarrow()
    done: dict[str, str] = {}
    places: dict[str, str] = {}
    for path in paths:
        found = read_settings(path)
        if differing := [f"{k} {found.get(k)!r} is now {v!r}" for k, v in settings.items() if found.get(k) != v]:
            raise TableError(
                f"{path}: was made with other settings ({'; '.join(differing)}). Choose another output, or remove it"
            )
        places.update(found["places"])
        with _read(path):
            table = pq.read_table(path, columns=["clip", "sha256", "level"], filters=[("level", "=", "clip")])
            done.update(zip(table["clip"].to_pylist(), table["sha256"].to_pylist(), strict=True))
    return done, places


# ------------------------------------------------------------------------------------------------------- writing


def save_part(rows: list[dict], folder: Path, schema) -> None:
    """Write rows as a part, a table of its own; names sort by time, and no two processes have the same one."""
    pa, pq = import_pyarrow()
    table = pa.Table.from_pylist(rows, schema)
    write_whole(folder / f"{time.time_ns():020d}_{ranks.rank():03d}.parquet", lambda file: pq.write_table(table, file))


def merge(parts: list[Path], output: Path, schema, current: dict[str, str]) -> dict:
    """One file of all parts' rows (the newest part is the last), each clip once, the newest content of it. Reads a part
    at a time. current: clip id -> content hash of those that this run has seen. Returns what the report says of them.
    """
    pa, pq = import_pyarrow()
    seen: set[str] = set()
    facts: dict[str, Any] = {"clips": 0, "frames": 0, "burned_in_text_suspected": [], "notes": []}

    def write(temporary):
        with pq.ParquetWriter(temporary, schema) as writer:
            for part in reversed(parts):
                table = pq.read_table(part)
                ids, hashes = table["clip"].to_pylist(), table["sha256"].to_pylist()
                keep = [c not in seen and current.get(c, h) == h for c, h in zip(ids, hashes, strict=True)]
                table = table.filter(pa.array(keep, pa.bool_()))
                seen.update(table["clip"].to_pylist())
                clips = table.filter(pa.compute.equal(table["level"], "clip")).select(["clip", "text", "note"])
                for row in clips.to_pylist():
                    facts["burned_in_text_suspected"] += [row["clip"]] * row["text"]
                    facts["notes"] += [{"clip": row["clip"], "note": row["note"]}] * bool(row["note"])
                facts["clips"] += len(clips)
                facts["frames"] += len(table) - len(clips)
                if len(table):
                    writer.write_table(table.cast(schema))

    write_whole(output, write)
    return facts
