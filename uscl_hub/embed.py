"""Features of any mix of images, videos and DICOM files as one Parquet table, and search in it.

One row a frame (level 'frame') and one a clip (level 'clip', the mean of its frames' features). Clips go
through the crop and the preprocessing of training. The table's metadata holds the settings; nothing of a
DICOM header but the frame rate is ever read into it.
"""

import hashlib
import io
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from . import __version__
from .checkpoints import CheckpointError
from .crop import apply_region, detect_region, sample
from .load import load_meta_uscl_backbone
from .media import Clip, UnreadableClip, decode, find_clips
from .preprocess import create_transform, normalise, resize

SHARD_SECONDS = 20  # at most so much work is lost when a run is killed
THUMBNAIL = 96  # pixels


def read_clip(clip: Clip, size: int, stride: int = 1, crop: str = "crop") -> tuple[np.ndarray, float | None]:
    """uint8 (T, size, size) frames as training sees them, and the file's frames per second. Raises
    UnreadableClip."""
    frames, fps = decode(clip, stride=stride)
    if crop != "none":
        frames = apply_region(frames, detect_region(sample(frames)), crop)
    return np.stack([resize(np.ascontiguousarray(frame), size) for frame in frames]), fps


def embed(
    inputs,
    output,
    *,
    name: str = "meta_uscl_resnet18",
    checkpoint=None,
    revision=None,
    stride: int = 1,
    crop: str = "crop",
    batch_size: int = 64,
    device: str = "cpu",
    progress: bool = True,
) -> dict:
    """Write the features of all clips below the inputs (files and folders) to a Parquet file and return a
    report.

    Clips that the file, or an interrupted run's `<output>.partial` folder, already holds are not computed
    again; that needs the same model and settings. The file appears, whole, at the end; `<output>.report.json`
    lists what could not be read. Raises ValueError if nothing can be, or if the settings differ from the
    file's.
    """
    pa, pq = _pyarrow()
    output = Path(output)
    clips, failed = find_clips(inputs), []
    for path in map(Path, inputs):
        if path.is_file() and not any(path.resolve() in clip.files for clip in clips):
            failed.append({"path": str(path), "reason": "not a known image, video or DICOM file"})
    if not clips:
        raise ValueError(f"no image, video or DICOM file in {', '.join(map(str, inputs))}")
    model = _placed(load_meta_uscl_backbone(name, checkpoint=checkpoint, revision=revision), device)
    keywords = create_transform(model).keywords
    settings = {
        "name": name,
        "weights": _fingerprint(model),
        "px": keywords["size"],
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
            ("thumbnail", pa.binary()),
            ("feature", pa.list_(pa.float32(), model.num_features)),
        ],
        metadata={"uscl_hub": json.dumps({**settings, **where})},
    )

    partial = output.with_name(output.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    shards = [output] * output.exists() + sorted(partial.glob("*.parquet"))
    done = {}
    for shard in shards:
        _check_settings(shard, pq, settings)
        table = pq.read_table(shard, columns=["clip", "sha256", "level"], filters=[("level", "=", "clip")])
        done.update(zip(table["clip"].to_pylist(), table["sha256"].to_pylist(), strict=True))

    def read(clip):
        try:
            digest = _hash(clip)
            if done.get(clip.id) == digest:
                return clip, digest, None, None
            return clip, digest, *read_clip(clip, settings["px"], stride, crop)
        except UnreadableClip as error:
            return clip, None, {"path": str(error.path), "reason": error.reason}, None
        except OSError as error:
            return clip, None, {"path": str(clip.files[0]), "reason": error.strerror or str(error)}, None

    rows, pending, buffered, kept, last = [], [], 0, set(), time.monotonic()

    def flush():
        """Forward all pending frames, batched across clips, and turn them into rows."""
        nonlocal pending, buffered
        frames = np.concatenate([p[2] for p in pending]) if pending else ()
        parts = [
            model(
                normalise(frames[i : i + batch_size], keywords["in_chans"], keywords["mean"], keywords["std"]).to(
                    device
                )
            )
            .float()
            .cpu()
            .numpy()
            for i in range(0, len(frames), batch_size)
        ]
        features, start = np.concatenate(parts) if parts else (), 0
        for clip, digest, clip_frames, fps in pending:
            part = features[start : start + len(clip_frames)]
            start += len(clip_frames)
            if not np.isfinite(part).all():
                raise CheckpointError(f"{checkpoint or name}: gives features that are not finite for {clip.id}")
            common = {"clip": clip.id, "source": clip.source, "sha256": digest}
            rows.append(
                {
                    **common,
                    "level": "clip",
                    "frames": len(part),
                    "feature": part.mean(0),
                    "thumbnail": _png(clip_frames[len(part) // 2]),
                }
            )
            rows.extend(
                {
                    **common,
                    "level": "frame",
                    "frame": i * stride,
                    "feature": vector,
                    "time": i * stride / fps if fps else None,
                }
                for i, vector in enumerate(part)
            )
        pending, buffered = [], 0

    def save():
        nonlocal rows
        flush()
        if rows:
            path = partial / f"{time.time_ns():020d}.parquet"
            _write(path, lambda temporary: pq.write_table(pa.Table.from_pylist(rows, schema), temporary))
            shards.append(path)
        rows = []

    with torch.inference_mode():
        for clip, digest, frames, fps in _progress(_ahead(read, clips), len(clips), progress):
            if digest is None:
                failed.append(frames)
            else:
                kept.add((clip.id, digest))
                if frames is not None:
                    pending.append((clip, digest, frames, fps))
                    buffered += len(frames)
                    if buffered >= 4 * batch_size:  # several batches at once: fewer of them are cut short
                        flush()
            if time.monotonic() - last > SHARD_SECONDS:
                save()
                last = time.monotonic()
        save()
    if not kept and not done:
        _discard(partial)
        raise ValueError("nothing could be read: " + "; ".join(f"{f['path']}: {f['reason']}" for f in failed[:5]))
    counts = _merge(shards, output, schema, kept, pa, pq)
    report = {
        "output": str(output),
        **counts,
        "computed": len(kept - set(done.items())),
        "failed": failed,
        "settings": settings,
    }
    _write(
        output.with_name(output.name + ".report.json"),
        lambda p: Path(p).write_text(json.dumps(report, indent=2)),
    )
    _discard(partial)
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
    if str(query) in ids:
        chosen = ids.index(str(query))
        vector, picture, others = (
            vectors[chosen],
            thumbnails[chosen],
            [i for i in range(len(ids)) if i != chosen],
        )
    else:
        clips = find_clips([query])
        if len(clips) != 1:
            raise ValueError(
                f"{query}: holds {len(clips)} clips; a query is one image, video, DICOM file or folder of "
                "numbered frames, or the id of a clip in the table"
            )
        model = load_meta_uscl_backbone(
            settings["name"], checkpoint=settings["checkpoint"], revision=settings["revision"]
        )
        model = _placed(model, device)
        if _fingerprint(model) != settings["weights"]:
            raise CheckpointError(
                f"{settings['checkpoint']}: is not what {features} was made with any more: embed again"
            )
        keywords = create_transform(model).keywords
        try:
            frames, _ = read_clip(clips[0], settings["px"], settings["stride"], settings["crop"])
        except UnreadableClip as error:
            raise ValueError(str(error)) from error
        with torch.inference_mode():
            vector = np.concatenate(
                [
                    model(
                        normalise(frames[i : i + 64], keywords["in_chans"], keywords["mean"], keywords["std"]).to(
                            device
                        )
                    )
                    .float()
                    .cpu()
                    .numpy()
                    for i in range(0, len(frames), 64)
                ]
            ).mean(0)
        picture, others = _png(frames[len(frames) // 2]), range(len(ids))
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    similarity = unit @ (vector / max(np.linalg.norm(vector), 1e-12))
    best = sorted(others, key=lambda i: -similarity[i])[:k]
    if sheet:
        tiles = [("query", picture)] + [(f"{similarity[i]:.3f} {ids[i]}", thumbnails[i]) for i in best]
        _write(Path(sheet), lambda temporary: _contact_sheet(tiles).save(temporary, "PNG"))
    counts = table["frames"].to_pylist()
    return [{"clip": ids[i], "similarity": float(similarity[i]), "frames": counts[i]} for i in best]


def _pyarrow():
    try:
        import pyarrow
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


def _check_settings(path: Path, pq, settings: dict):
    found = _settings(path, pq)
    if differing := [f"{k} {found.get(k)!r} is now {v!r}" for k, v in settings.items() if found.get(k) != v]:
        raise ValueError(
            f"{path}: was made with other settings ({'; '.join(differing)}). Choose another output, or remove it"
        )


def _placed(model, device: str):
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by device and build
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _fingerprint(model) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _hash(clip: Clip) -> str:
    digest = hashlib.sha256()
    for path in clip.files:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _ahead(function, items, depth: int = 2):
    """map(function, items), computed by a thread that stays at most `depth` items ahead."""
    with ThreadPoolExecutor(1) as pool:
        waiting = []
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()


def _progress(iterator, total: int, show: bool):
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install 'uscl-hub[embed]'") from error
    return tqdm(iterator, total=total, unit="clip", disable=not show)


def _png(grey: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(resize(grey, THUMBNAIL)).save(buffer, "PNG")
    return buffer.getvalue()


def _contact_sheet(tiles, columns: int = 4, margin: int = 6, caption: int = 16) -> Image.Image:
    cell = 2 * THUMBNAIL
    lines = -(-len(tiles) // columns)
    sheet = Image.new("L", (columns * (cell + margin) + margin, lines * (cell + caption + margin) + margin), 255)
    draw = ImageDraw.Draw(sheet)
    for i, (text, png) in enumerate(tiles):
        x, y = margin + i % columns * (cell + margin), margin + i // columns * (cell + caption + margin)
        sheet.paste(Image.open(io.BytesIO(png)).resize((cell, cell)), (x, y))
        short = text if len(text) <= 30 else text[:8] + "..." + text[-19:]
        draw.text((x, y + cell + 2), short.encode("latin-1", "replace").decode("latin-1"), fill=0)
    return sheet


def _merge(shards, output: Path, schema, kept: set, pa, pq) -> dict:
    """One file of all shards' rows, each clip once, the newest content of it. Streams, a shard at a time."""
    current, counts, seen = dict(kept), {"clips": 0, "frames": 0}, set()

    def write(temporary):
        with pq.ParquetWriter(temporary, schema) as writer:
            for shard in reversed(shards):  # newest first
                table = pq.read_table(shard)
                ids, hashes = table["clip"].to_pylist(), table["sha256"].to_pylist()
                keep = [c not in seen and current.get(c, h) == h for c, h in zip(ids, hashes, strict=True)]
                table = table.filter(pa.array(keep, pa.bool_()))
                seen.update(table["clip"].to_pylist())
                clips = sum(level == "clip" for level in table["level"].to_pylist())
                counts["clips"] += clips
                counts["frames"] += len(table) - clips
                if len(table):
                    writer.write_table(table.cast(schema))

    _write(output, write)
    return counts


def _write(path: Path, write):
    """Call write(temporary path) and rename: the file is never seen half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _discard(folder: Path):
    shutil.rmtree(folder, ignore_errors=True)
