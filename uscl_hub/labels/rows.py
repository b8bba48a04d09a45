"""Rows of a table that a person made: CSV of a spreadsheet, or Parquet. Every fault is one line that names the file."""

import csv
import io
import unicodedata
from pathlib import Path
from typing import Mapping, TypeVar

from uscl_hub.errors import UserError
from uscl_hub.files import open_regular

MAX_BYTES = 512 * 2**20  # of a CSV

T = TypeVar("T")


def read_rows(path: Path | str) -> list[dict[str, str]]:
    """The rows of a .csv, .tsv or .parquet file, as text; an empty cell, and Parquet's null, is ''.

    The delimiter is the one of comma, semicolon and tab that the header has most of. Raises UserError.
    """
    path = Path(path)
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    lines = _text(path)
    header = lines.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(lines, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    rows: list[dict[str, str]] = []
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            if any("\n" in cell or "\r" in cell for cell in cells):
                raise UserError(f"{path}: line {line}: a quotation mark is opened and not closed in this line")
            cells = [cell.strip() for cell in cells]
            if not names:
                names = cells
                if repeated := sorted({name for name in names if names.count(name) > 1}):
                    raise UserError(f"{path}: the header has {repeated[0]!r} twice; rename one of the columns")
            elif any(cells):
                if len(cells) > len(names) and any(cells[len(names) :]):
                    raise UserError(f"{path}: line {line}: {len(cells)} cells, but the header has {len(names)} columns")
                rows.append(dict(zip(names, cells + [""] * len(names))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: line {line}: {error}. Is there a quotation mark that is not closed?") from None
    return _not_empty(path, rows)


def _text(path: Path) -> str:
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(str(error) if isinstance(error, UserError) else f"{path}: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES >> 20} MiB: not a table of labels")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16 text. Save it as 'CSV UTF-8'")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}: line {line}: byte 0x{data[error.start]:02x} is not UTF-8. Save it as 'CSV UTF-8'"
        ) from None
    if "\0" in text:
        raise UserError(f"{path}: holds zero bytes: it is not a CSV file")
    return text


def _parquet(path: Path) -> list[dict[str, str]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'uscl-hub[embed]'") from error
    try:
        with open_regular(path) as file:
            rows = pq.read_table(file).to_pylist()
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"{path}: is not a Parquet file that can be read ({str(error).splitlines()[0]})") from None
    return _not_empty(path, [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows])


def _not_empty(path: Path, rows: list) -> list:
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows


def as_number(text: str) -> float | None:
    """The number that a text is, or None. Python's own digits with _ between them are a text.

    >>> as_number("1e3"), as_number("1_2"), as_number("")
    (1000.0, None, None)
    """
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def as_id(path: str) -> str:
    """A path in a table as clip ids are spelled."""
    return unicodedata.normalize("NFC", path.replace("\\", "/").strip("/"))


def of_longest_end(clip: str, table: Mapping[str, T]) -> T | None:
    """What the table has for a clip's id or for its longest end, whole names only, each with the extension and without.

    >>> of_longest_end("clinic/p1/a.mp4", {"a.mp4": 1, "p1/a": 2})
    2
    """
    suffix = Path(clip).suffix
    stem = clip[: -len(suffix)] if suffix else clip
    ends = (text.split("/", i)[-1] for i in range(clip.count("/") + 1) for text in (clip, stem))
    return next((table[end] for end in ends if end in table), None)
