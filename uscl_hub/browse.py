"""Feature tables and predictions as a map with pictures in the browser, shown by Renumics Spotlight.

It is served to this machine only, and its page loads nothing from elsewhere. Its usage statistics, which it would send
home, are switched off.
"""

import contextlib
import io
import os
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uscl_hub.clips import UnreadableClip, find_clips
from uscl_hub.clips.read import read_clip
from uscl_hub.errors import UserError
from uscl_hub.features.table import THUMBNAIL, import_pyarrow, read_clips
from uscl_hub.features.thumbnails import open_thumbnail, to_png
from uscl_hub.labels.rows import as_id, as_number, of_longest_end, read_rows
from uscl_hub.signals import signals_interrupt

HOST = "127.0.0.1"
NEIGHBOURS = 5  # beside each clip
OF_PREDICT = ("path", "clip", "frame", "frames")  # columns of `uscl-hub predict` that are no prediction


def browse(table, *, add=None, colour: str | None = None, port: int = 0, open_browser: bool = True) -> None:
    """Show a table in the browser, until Ctrl-C: a 2-D map (UMAP) of its features, coloured by a column, with pictures
    and the nearest clips of what is clicked on.

    Args:
        table: a .parquet of `uscl-hub embed`; or a .csv or .parquet of `uscl-hub predict`, whose map is that of the
            predicted numbers, and whose files are read again for the pictures.
        add: a .csv, .tsv or .parquet with the column `clip` or `path`, such as labels or predictions: its other
            columns are shown, too.
        colour: the column that colours the map; None: 'label' if there is one, else 'folder'.
        port: 0 takes a free one.
        open_browser: False only prints the address.

    Raises ImportError without the extra [browse]; UserError, naming the table, column or port, for what cannot be used.
    """
    os.environ["SPOTLIGHT_OPT_OUT"] = "true"  # before the import
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")  # it warns of analyses that are not used here
    try:
        import pandas as pd
        from renumics import spotlight
    except ImportError as error:
        raise ImportError("browse needs Renumics Spotlight: pip install 'uscl-hub[browse]'") from error
    columns, vectors = read(table)
    if add is not None:
        for name, values in joined(columns["clip"], add).items():
            columns[f"{name} of {Path(add).name}" if name in columns else name] = values
    colour = colour or ("label" if "label" in columns else "folder")
    if colour not in columns or colour == "picture":
        raise UserError(f"--colour {colour}: there is no such column; there are {', '.join(columns)}")
    columns["nearest"], columns["nearest pictures"] = nearest(columns["clip"], vectors, columns["picture"])
    frame = pd.DataFrame({**columns, "features": list(vectors)})
    kinds = {"picture": spotlight.Image, "nearest pictures": spotlight.Image, "features": spotlight.Embedding}
    port = free_port(port)
    print(f"http://{HOST}:{port}: {len(frame)} clips; Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt), signals_interrupt():  # or the viewer's server would stay
        spotlight.show(
            frame,
            host=HOST,
            port=port,
            dtype={**kinds, **{name: spotlight.Category for name in ("folder", colour) if few(columns[name])}},
            layout=_layout(colour),
            no_browser=not open_browser,
            allow_filebrowsing=False,
            analyze=False,
            wait="forever",
        )


def read(table) -> tuple[dict[str, list], np.ndarray]:
    """Columns by name, with 'clip', 'folder' and 'picture' (PNG), and the vectors float32 (N, d) of the map."""
    path = Path(table)
    if path.suffix.lower() == ".parquet" and not _of_predict(path):
        rows = read_clips(path)
        names, vectors = rows["clip"].to_pylist(), np.array(rows["feature"].to_pylist(), np.float32)
        pictures = [to_png(open_thumbnail(thumbnail)) for thumbnail in rows["thumbnail"].to_pylist()]
        columns: dict[str, list] = {"frames": rows["frames"].to_pylist()}
    else:
        names, columns, vectors = _predictions(path)
        pictures = _pictures(columns.pop("path"), columns["frame"])
    if not np.isfinite(vectors).all():
        raise UserError(f"{path}: holds numbers that are not finite")
    folders = [name.rpartition("/")[0] for name in names]
    return {"clip": names, "folder": folders, "picture": pictures, **columns}, vectors


def _of_predict(path: Path) -> bool:
    _, pq = import_pyarrow()
    try:
        return {"path", "clip", "frame"} <= set(pq.read_schema(path).names)
    except Exception:  # whatever pyarrow raises of a damaged file: read_clips says what it is
        return False


def _predictions(path: Path) -> tuple[list[str], dict[str, list], np.ndarray]:
    rows = read_rows(path)
    if missing := [name for name in OF_PREDICT if name not in rows[0]]:
        raise UserError(f"{path}: has no column {missing[0]}; expected a table of `uscl-hub embed` or predict")
    columns: dict[str, list] = {name: typed([row[name] for row in rows]) for name in rows[0]}
    names = [str(name) for name in columns.pop("clip")]
    numbers = [name for name in columns if name not in OF_PREDICT and all(type(v) is float for v in columns[name])]
    said = [name for name in numbers if name.startswith("p_")] or numbers
    if not said:
        raise UserError(f"{path}: has no column of predicted numbers to make a map of")
    return names, columns, np.array([columns[name] for name in said], np.float32).T


def typed(texts: list[str]) -> list:
    """Numbers where all texts are, else the texts: those with a 0 in front, as 007, too."""
    numbers = [as_number(text) if text else np.nan for text in texts]
    if any(number is None for number in numbers) or any(re.match(r"[+-]?0\d", text) for text in texts):
        return texts
    return numbers


def _pictures(paths: list, frames: list) -> list[bytes]:
    """A thumbnail of each row's frame, or of the middle of its clip; grey where the file cannot be read any more."""
    known: dict[str, np.ndarray] = {}
    pictures = []
    for path, frame in zip(map(str, paths), frames, strict=True):
        if path not in known:
            try:
                known = {path: read_clip(find_clips([path])[0], THUMBNAIL, crop="none").images}
            except (UnreadableClip, OSError, ValueError, IndexError):  # seen in the picture
                known = {path: np.full((1, THUMBNAIL, THUMBNAIL), 128, np.uint8)}
        images = known[path]
        number = len(images) // 2 if frame != frame else min(int(frame), len(images) - 1)
        pictures.append(to_png(Image.fromarray(images[number])))
    return pictures


def joined(clips: list[str], path) -> dict[str, list]:
    """The other columns of a table with a column clip or path, in the order of the clips; NaN or "" where it has no
    row.

    A path is matched with the clip's id by its end, whole names only, with or without the extension.
    """
    rows = read_rows(path)
    key = next((name for name in ("clip", "path") if name in rows[0]), None)
    if key is None:
        raise UserError(f"{path}: has neither a column clip nor path; its header is {', '.join(rows[0])}")
    found: dict[str, dict] = {}
    for row in rows:
        found.setdefault(as_id(row[key]), row)
    ends: dict[str, dict] = {}
    for name, row in found.items():
        parts = name.split("/")
        ends |= {"/".join(parts[i:]): row for i in range(len(parts))}
    by_id = [of_longest_end(clip, found) or ends.get(clip) for clip in clips]
    if not any(by_id):
        raise UserError(f"{path}: names none of the {len(clips)} clips, such as {clips[0]}")
    names = [name for name in rows[0] if name not in (*OF_PREDICT, key)]
    return {name: typed([row[name] if row else "" for row in by_id]) for name in names}


def nearest(clips: list[str], vectors: np.ndarray, pictures: list[bytes]) -> tuple[list[str], list[bytes]]:
    """Of each clip those most similar to it (cosine), as a text and as a strip of pictures."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    tiles = [Image.open(io.BytesIO(picture)).convert("L").resize((THUMBNAIL, THUMBNAIL)) for picture in pictures]
    texts, strips = [], []
    for i in range(len(clips)):
        similarity = unit @ unit[i]
        similarity[i] = -np.inf
        best = np.argsort(-similarity, kind="stable")[: min(NEIGHBOURS, len(clips) - 1)]
        texts.append(", ".join(f"{clips[j]} ({similarity[j]:.2f})" for j in best))
        strip = Image.new("L", (THUMBNAIL * NEIGHBOURS, THUMBNAIL), 255)
        for place, j in enumerate(best):
            strip.paste(tiles[j], (THUMBNAIL * place, 0))
        strips.append(to_png(strip))
    return texts, strips


def few(values: list[Any]) -> bool:
    """Whether a column is of classes: texts, and not one a clip."""
    return all(isinstance(value, str) for value in values) and len(set(values)) <= 50


def free_port(port: int) -> int:
    """The port, or a free one for 0. Raises UserError if it cannot be used."""
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: cannot be used ({error}); leave it out for a free one") from None
        return probe.getsockname()[1]


def _layout(colour: str):
    from renumics.spotlight import layout
    from renumics.spotlight.layout import lenses

    shown = [lenses.image("picture"), lenses.image("nearest pictures"), lenses.text("nearest"), lenses.scalar(colour)]
    return layout.layout(
        layout.tab(layout.similaritymap(columns=["features"], color_by_column=colour), weight=60),
        layout.split(
            [layout.tab(layout.inspector(lenses=shown, num_columns=1)), layout.tab(layout.table())],
            weight=40,
            orientation="vertical",
        ),
        orientation="horizontal",
    )
