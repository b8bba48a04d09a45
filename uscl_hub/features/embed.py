"""Features of any mix of images, videos and DICOM files as one Parquet table, and search in it.

One row a frame (level 'frame') and one a clip (level 'clip', the mean of its frames' features). Clips go
through the crop and the preprocessing of training. The table's metadata holds the settings; nothing of a
DICOM header but the frame rate is ever read into it.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from uscl_hub import __version__
from uscl_hub.checkpoints import CheckpointError
from uscl_hub.clips import Report, UnreadableClip, content_hash, find_clips
from uscl_hub.clips.find import UNKNOWN
from uscl_hub.clips.read import Frames, read_clip, read_in_time
from uscl_hub.features.places import tell_apart
from uscl_hub.files import locked, write_whole
from uscl_hub.load import load_meta_uscl_backbone
from uscl_hub.preprocess import create_transform, normalise, resize

SHARD_SECONDS = 20  # at most so much work is lost when a run is killed
THUMBNAIL = 96  # pixels


def embed(
    inputs,
    output,
    *,
    name: str = "meta_uscl_resnet18",
    checkpoint=None,
    revision=None,
    stride: int = 1,
    crop: str = "crop",
    frames: str = "auto",
    batch_size: int = 64,
    device: str = "cpu",
    progress: bool = True,
) -> dict:
    """Write the features of all clips below the inputs (files and folders) to a Parquet file and return a
    report.

    Clips that the file, or an interrupted run's `<output>.partial` folder, already holds are not computed
    again; that needs the same model and settings. The file appears, whole, at the end; `<output>.report.json`
    lists what could not be read or was passed over, and where burned-in text is suspected. frames: what numbered
    images of one folder are, see `find_clips`. A clip may take as long as in training's ingest. Raises ValueError if
    nothing can be read or the settings differ from the file's, OSError if another process writes the same output.
    """
    pa, pq = _pyarrow()
    output = Path(output)
    passed = Report()
    clips = find_clips(inputs, frames, passed)
    if not clips:
        raise ValueError(f"no image, video or DICOM file in {', '.join(map(str, inputs))}")
    failed = unknown_files(inputs, clips)
    model = placed(load_meta_uscl_backbone(name, checkpoint=checkpoint, revision=revision), device)
    settings = {
        "name": name,
        "weights": _fingerprint(model),
        "px": create_transform(model).keywords["size"],
        "stride": stride,
        "crop": crop,
        "version": __version__,
    }
    where = {"checkpoint": None if checkpoint is None else str(checkpoint), "revision": revision}
    schema = pa.schema(
        [
            ("level", pa.string()),
            ("clip", pa.string()),
            ("source", pa.string()),
            ("sha256", pa.string()),
            ("frame", pa.int32()),
            ("time", pa.float64()),
            ("frames", pa.int32()),
            ("text", pa.bool_()),
            ("note", pa.string()),
            ("thumbnail", pa.binary()),
            ("feature", pa.list_(pa.float32(), model.num_features)),
        ],
    )
    partial = output.with_name(output.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        shards = [output] * output.exists() + sorted(partial.glob("*.parquet"))
        done, places = {}, {}
        for shard in shards:
            places.update(_check_settings(shard, pq, settings))
            table = pq.read_table(shard, columns=["clip", "sha256", "level"], filters=[("level", "=", "clip")])
            done.update(zip(table["clip"].to_pylist(), table["sha256"].to_pylist(), strict=True))
        clips, places = tell_apart(clips, places, done, content_hash)
        schema = schema.with_metadata({"uscl_hub": json.dumps({**settings, **where, "places": places})})

        stopped = threading.Event()

        def look(clip):
            digest = content_hash(clip)
            new = done.get(clip.id) != digest
            return clip, digest, read_clip(clip, settings["px"], crop=crop, stride=stride) if new else None

        current, pending = {}, []

        def take_pending():
            taken = pending[:]
            pending.clear()
            return taken

        def groups():
            """Lists of (clip, content hash, Frames) with a batch of frames at least, but for the last."""
            waiting = 0
            for result in progress_bar(ahead(reader(look, stopped), clips, threads=1), len(clips), progress):
                if isinstance(result, dict):
                    failed.append(result)
                    continue
                clip, digest, frames = result
                current[clip.id] = digest
                if frames is not None:
                    pending.append(result)
                    waiting += len(frames.images)
                if waiting >= batch_size:
                    yield take_pending()
                    waiting = 0
            if pending:
                yield take_pending()

        def compute(group):
            return _rows(group, model, batch_size, stride, where["checkpoint"] or name)

        rows, last = [], time.monotonic()
        with _side_by_side(device) as workers, contextlib.closing(ahead(compute, groups(), *workers)) as computed:
            try:
                for new in computed:
                    rows += new
                    if time.monotonic() - last > SHARD_SECONDS:
                        shards.append(_save(rows, partial, schema, pa, pq))
                        rows, last = [], time.monotonic()
            except BaseException as error:
                stopped.set()  # a clip that is being decoded is not waited for
                if isinstance(error, KeyboardInterrupt):  # what is finished, or as good as, is kept
                    rows += compute(pending) if pending else []
                    if rows:
                        _save(rows, partial, schema, pa, pq)
                raise
        if rows:
            shards.append(_save(rows, partial, schema, pa, pq))
        if not current and not done:
            shutil.rmtree(partial)
            raise ValueError("nothing could be read: " + "; ".join(f"{f['path']}: {f['reason']}" for f in failed[:5]))
        report = {
            "output": str(output),
            **_merge(shards, output, schema, current, pa, pq),
            "computed": len(current.items() - done.items()),
            "failed": failed,
            **passed.as_dict(),
            "found": passed.lines(),
            "settings": settings,
        }
        text = json.dumps(report, indent=2)
        write_whole(output.with_name(output.name + ".report.json"), lambda file: file.write_text(text))
        shutil.rmtree(partial)
    return report


def search(query, features, *, k: int = 5, sheet=None, device: str = "cpu") -> list[dict]:
    """The k clips of a feature table most similar (cosine of the pooled vectors) to a file, or to one of its
    clip ids.

    sheet: write a PNG with the query and what was found. Returns [{'clip', 'similarity', 'frames'}], best
    first.
    """
    pa, pq = _pyarrow()
    settings = _settings(features, pq)
    table = pq.read_table(features, filters=[("level", "=", "clip")])
    ids, thumbnails = table["clip"].to_pylist(), table["thumbnail"].to_pylist()
    vectors = np.array(table["feature"].to_pylist(), np.float32)
    others = range(len(ids))
    if str(query) in ids:
        chosen = ids.index(str(query))
        vector, picture = vectors[chosen], thumbnails[chosen]
        others = [i for i in others if i != chosen]
    else:
        vector, picture = _query(query, features, settings, device)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    similarity = unit @ (vector / max(np.linalg.norm(vector), 1e-12))
    best = sorted(others, key=lambda i: -similarity[i])[:k]
    if sheet:
        tiles = [(f"query {Path(query).name}", picture)] + [
            (f"{similarity[i]:.3f} {ids[i]}", thumbnails[i]) for i in best
        ]
        write_whole(sheet, lambda file: _contact_sheet(tiles).save(file, "PNG"))
    counts = table["frames"].to_pylist()
    return [{"clip": ids[i], "similarity": float(similarity[i]), "frames": counts[i]} for i in best]


def _query(query, features, settings: dict, device: str) -> tuple[np.ndarray, bytes]:
    """Pooled vector and thumbnail of a file that is not in the table."""
    clips = find_clips([query])
    if len(clips) != 1:
        raise ValueError(
            f"{query}: holds {len(clips)} clips; a query is one image, video, DICOM file or folder of "
            "numbered frames, or the id of a clip in the table"
        )
    model = placed(
        load_meta_uscl_backbone(settings["name"], checkpoint=settings["checkpoint"], revision=settings["revision"]),
        device,
    )
    if _fingerprint(model) != settings["weights"]:
        raise CheckpointError(f"{settings['checkpoint']}: is not what {features} was made with any more: embed again")
    try:
        frames = read_clip(clips[0], settings["px"], crop=settings["crop"], stride=settings["stride"])
    except UnreadableClip as error:
        raise ValueError(str(error)) from error
    return _features(model, frames.images).mean(0), _thumbnail(frames)


@torch.inference_mode()
def _features(model, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """uint8 (N, px, px) -> float32 (N, d), preprocessed as the model expects, on the model's device."""
    keywords, device = create_transform(model).keywords, next(model.parameters()).device
    parts = []
    for batch in np.array_split(images, -(-len(images) // batch_size)):
        x = normalise(batch, keywords["in_chans"], keywords["mean"], keywords["std"])
        parts.append(model(x.to(device)).float().cpu().numpy())
    return np.concatenate(parts)


def _rows(pending, model, batch_size: int, stride: int, what) -> list[dict]:
    """Table rows of (clip, content hash, Frames) triples; batches span clips."""
    features = _features(model, np.concatenate([frames.images for _, _, frames in pending]), batch_size)
    rows, start = [], 0
    for clip, digest, frames in pending:
        part = features[start : start + len(frames.images)]
        start += len(part)
        if not np.isfinite(part).all():
            raise CheckpointError(f"{what}: gives features that are not finite for {clip.id}")
        common = {"clip": clip.id, "source": clip.source, "sha256": digest}
        rows.append(
            {
                **common,
                "level": "clip",
                "frames": len(part),
                "text": frames.text,
                "note": "; ".join(frames.notes) or None,
                "thumbnail": _thumbnail(frames),
                "feature": part.mean(0),
            }
        )
        for i, vector in enumerate(part):
            seconds = frames.times[i]  # true ones, where the file has them
            if seconds is None and frames.fps:
                seconds = i * stride / frames.fps
            rows.append({**common, "level": "frame", "frame": i * stride, "time": seconds, "feature": vector})
    return rows


def _save(rows: list[dict], folder: Path, schema, pa, pq) -> Path:
    path = folder / f"{time.time_ns():020d}.parquet"
    write_whole(path, lambda file: pq.write_table(pa.Table.from_pylist(rows, schema), file))
    return path


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("feature tables need pyarrow: pip install 'uscl-hub[embed]'") from error
    return pyarrow, pyarrow.parquet


def _settings(path, pq) -> dict:
    try:
        return json.loads(pq.read_schema(path).metadata[b"uscl_hub"])
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file. Make it with `uscl-hub embed`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not a feature table of `uscl-hub embed`, or is damaged") from error


def reader(look, stopped: threading.Event):
    """A function of a clip: look(clip), or {'path', 'reason'} where it cannot be read or takes too long."""

    def read(clip):
        try:
            return read_in_time(look, clip, stopped=stopped)
        except UnreadableClip as error:
            return {"path": str(error.path), "reason": error.reason}
        except OSError as error:
            return {"path": str(clip.files[0]), "reason": error.strerror or str(error)}

    return read


def unknown_files(inputs, clips) -> list[dict]:
    """The files among the inputs that are no clip's."""
    files = [path for path in inputs if Path(path).is_file()]
    known = {os.path.realpath(file) for clip in clips for file in clip.files} if files else ()
    return [{"path": str(path), "reason": UNKNOWN} for path in files if os.path.realpath(path) not in known]


def _check_settings(path: Path, pq, settings: dict) -> dict[str, str]:
    """Raises ValueError if the table was made with other settings. Returns the places of its sources."""
    found = _settings(path, pq)
    if differing := [f"{k} {found.get(k)!r} is now {v!r}" for k, v in settings.items() if found.get(k) != v]:
        raise ValueError(
            f"{path}: was made with other settings ({'; '.join(differing)}). Choose another output, or remove it"
        )
    places = found.get("places")
    return places if isinstance(places, dict) else {}


def placed(model, device: str):
    try:
        return model.to(device, memory_format=torch.channels_last)  # 1.4 times as fast on a CPU
    except (RuntimeError, AssertionError) as error:  # torch raises either, by device and build
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _fingerprint(model) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def ahead(function, items, threads: int, start=None, *args):
    """map(function, items) by threads, up to two items a thread ahead of the caller; start(*args) first in each."""
    pool, waiting = ThreadPoolExecutor(threads, initializer=start, initargs=args), deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # nothing is left to wait for, or the caller does not want it


@contextlib.contextmanager
def _side_by_side(device: str):
    """Yields the threads for a network, as `ahead` takes them. On a CPU a few batches go side by side, each on its
    share of the cores: the thread that reads clips then slows one of them, not every layer of a shared one."""
    total = torch.get_num_threads()
    threads = min(total, 4) if torch.device(device).type == "cpu" else 1
    try:
        yield threads, torch.set_num_threads, round(total / threads)
    finally:
        torch.set_num_threads(total)  # what was set last would go for new threads


def progress_bar(iterator, total: int, show: bool):
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install 'uscl-hub[embed]'") from error
    return tqdm(iterator, total=total, unit="clip", disable=not show)


def _thumbnail(frames: Frames) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(resize(np.ascontiguousarray(frames.after), THUMBNAIL)).save(buffer, "PNG")
    return buffer.getvalue()


def _opened_thumbnail(png) -> Image.Image:
    """A table may come from elsewhere: nothing but a small png is opened."""
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            if max(image.size) > 4 * THUMBNAIL:
                raise ValueError(f"{image.width} x {image.height} pixels")
            return image.convert("L")
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile bytes
        raise ValueError(f"the feature table's thumbnails are not those of `uscl-hub embed` ({error})") from error


def _contact_sheet(tiles, columns: int = 4, margin: int = 6, caption: int = 16) -> Image.Image:
    cell = 2 * THUMBNAIL
    lines = -(-len(tiles) // columns)
    sheet = Image.new("L", (columns * (cell + margin) + margin, lines * (cell + caption + margin) + margin), 255)
    draw = ImageDraw.Draw(sheet)
    for i, (text, png) in enumerate(tiles):
        x, y = margin + i % columns * (cell + margin), margin + i // columns * (cell + caption + margin)
        sheet.paste(_opened_thumbnail(png).resize((cell, cell)), (x, y))
        short = text if len(text) <= 30 else text[:8] + "..." + text[-19:]
        draw.text((x, y + cell + 2), short.encode("latin-1", "replace").decode("latin-1"), fill=0)
    return sheet


def _merge(shards, output: Path, schema, current: dict, pa, pq) -> dict:
    """One file of all shards' rows, each clip once, the newest content of it. Streams, a shard at a time."""
    seen, facts = set(), {"clips": 0, "frames": 0, "burned_in_text_suspected": [], "notes": []}

    def write(temporary):
        with pq.ParquetWriter(temporary, schema) as writer:
            for shard in reversed(shards):  # newest first
                table = pq.read_table(shard)
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
