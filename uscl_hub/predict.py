"""What a fine-tuned model says of files: `uscl-hub predict`. One row a clip, or one a frame, as CSV or Parquet.

Clips are found, cropped and read as in training and by `uscl-hub embed`. A clip's row is the mean of frames at the
rate of the training. Finished clips are kept in `<output>.partial` until the table is whole: an interrupted run goes
on.
"""

import contextlib
import csv
import hashlib
import itertools
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion
from scipy.special import entr

from uscl_hub import __version__
from uscl_hub.checkpoints import CONFIG_NAME
from uscl_hub.classifier import Meaning, load_classifier, read_meaning, run
from uscl_hub.clips import Clip, content_hash
from uscl_hub.clips.clip import path_of
from uscl_hub.clips.find import as_text
from uscl_hub.clips.pictures import YELLOW, contact_sheet
from uscl_hub.clips.read import Frames, read_clip
from uscl_hub.errors import UserError
from uscl_hub.features.network import placed, side_by_side
from uscl_hub.files import check_room, finished, locked, open_regular, sha256, write_json, write_whole
from uscl_hub.inputs import ahead, find_inputs, nothing_read, read_ahead, unknown_files, write_report
from uscl_hub.preprocess import normalise

BATCH = 64
ONNX_NAME = "model.onnx"
TOLERANCE = 1e-3  # of a probability, between ONNX and PyTorch: tested
ENDINGS = (".csv", ".parquet")
TILES, TILE = 36, 160  # frames of the contact sheet, and their pixels


# 8 arguments: those of the command
def predict(
    model,
    inputs,
    output,
    *,
    per: str = "clip",
    frames: str = "auto",
    onnx: bool = False,
    device: str = "cpu",
    progress: bool = True,
) -> dict:
    """Run a model of training/finetune.py on all clips below the inputs (files and folders), and write a table.

    Args:
        model: the folder `export` of training/finetune.py.
        output: a .csv or .parquet file. Columns: path, clip, frame (the first is 0; empty for a clip), frames; of
            classes p_LABEL for each (calibrated), label and entropy (in nats); of several labels p_LABEL for each; of a
            regression a column for each label. Of a segmentation mask (a PNG of 0 and 255 in the folder beside the
            output, of the frame's size) and area, its share of the picture; a contact sheet shows outlines.
        per: 'clip', the mean over a clip's frames at the rate of the training, or 'frame', a row for each of all
            frames, as a segmentation has.
        frames: what numbered images of one folder are, see `find_clips`.
        onnx: run model.onnx of the folder by onnxruntime; probabilities differ by less than 1e-3 from PyTorch's.

    Returns a report, which is written to `<output>.report.json`, too. Raises ValueError: nothing can be read, or an
    argument is impossible; CheckpointError: no such model; OSError: another process writes the same output.
    """
    output, meaning = Path(output), read_meaning(model)
    if output.suffix.lower() not in ENDINGS:
        raise ValueError(f"{output}: the table is written as one of {', '.join(ENDINGS)}: name it so")
    if per not in ("clip", "frame"):
        raise ValueError(f"per is {per!r}: choose 'clip' or 'frame'")
    clips, passed = find_inputs(inputs, frames)
    partial = output.with_name(output.name + ".partial")
    if meaning.task == "segmentation":
        clips = _not_written(clips, (partial, *_pictures(output)))
    if per == "frame" or meaning.task == "segmentation":
        meaning = replace(meaning, rate=0)  # all frames
    network = _network(model, onnx, device)
    about = {"version": __version__, "config": sha256(Path(model) / CONFIG_NAME), "weights": meaning.sha256}
    settings = {**about, "per": per, "onnx": onnx}
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        check_room(partial)
        table, failed = _run_all(clips, _kept(partial, settings), network, meaning, partial, (device, progress))
        failed = unknown_files(inputs, clips) + failed
        if not table:
            shutil.rmtree(partial)
            raise nothing_read(failed)
        rows = [row for clip in table for row in clip["frame" if per == "frame" else "clip"]]
        if meaning.task == "segmentation":
            _take_masks(partial, output)
        _write(rows, output)
        facts = {"rows": len(rows), "clips": len(table), "computed": sum(clip["new"] for clip in table)}
        notes = [{"path": clip["path"], "note": note} for clip in table for note in clip["notes"]]
        report = write_report(output, facts, failed, passed, {"notes": notes})
        shutil.rmtree(partial)
    return report


def _network(folder, onnx: bool, device: str):
    """(function of a batch of uint8 frames (N, px, px) -> logits float32 (N, outputs, ...), their pixels)."""
    model, transform, _ = load_classifier(folder)
    keywords, model = transform.keywords, placed(model, device)
    apply = _onnx(Path(folder) / ONNX_NAME) if onnx else lambda x: run(model, x)

    def logits(images: np.ndarray) -> np.ndarray:
        return apply(normalise(images, keywords["in_chans"], keywords["mean"], keywords["std"]).float())

    return logits, keywords["size"]


def _onnx(path: Path):
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("--onnx needs onnxruntime: pip install 'uscl-hub[export]'") from error
    if not path.is_file():
        raise UserError(f"{path}: is missing. Export it with training/finetune.py --onnx, or leave out --onnx")
    with open_regular(path) as file:
        content = file.read()
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own exceptions, not all of them public
        raise UserError(f"{path}: onnxruntime cannot load it ({str(error).splitlines()[0]})") from error
    return lambda x: session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def _run_all(clips, kept: dict, network, meaning: Meaning, partial: Path, shown: tuple) -> tuple[list, list]:
    """The results of all clips that can be read, in their order, and what cannot; new ones go to the partial folder.

    network: as of `_network`; shown: (device, whether there is a progress bar).
    """
    logits, size = network
    device, progress = shown
    stopped = threading.Event()

    def look(clip):
        digest = content_hash(clip)
        if kept.get(clip.id, {}).get("sha256") == digest:
            return clip, digest, None
        return clip, digest, read_clip(clip, size, crop=meaning.crop)

    def say(batch: list[tuple]) -> list[tuple]:
        """A batch of `_batches`, with what the model says of each frame."""
        images = [frames.images[n.start : n.stop : n.step] for *_, frames, n in batch]
        ends = np.cumsum([len(part) for part in images])
        said = np.split(meaning.say(logits(np.concatenate(images))), ends[:-1])
        return [(*part, one) for part, one in zip(batch, said)]

    results: dict[str, dict] = {}
    failed: list[dict] = []
    waiting = _batches(_new(read_ahead(look, clips, stopped, progress), failed, results, kept), meaning)
    parts: list = []  # of a clip that is in several batches
    try:
        with open(partial / "clips.jsonl", "a", encoding="utf-8") as log, side_by_side(device) as workers:
            with contextlib.closing(ahead(say, waiting, *workers)) as computed:
                for clip, digest, frames, numbers, said in itertools.chain.from_iterable(computed):
                    if not np.isfinite(said).all():
                        raise UserError(f"{path_of(clip)}: the model gives numbers that are not finite")
                    if meaning.task == "segmentation":  # the masks are written now: in memory they are large
                        said = [_masked(clip, n, p[0], frames, partial) for n, p in zip(numbers, said)]
                    parts.extend(said)
                    if numbers[-1] + numbers.step < len(frames.images):
                        continue
                    result = _result(clip, range(0, len(frames.images), numbers.step), parts, meaning)
                    parts = []
                    result |= {"id": clip.id, "sha256": digest, "notes": list(frames.notes)}
                    log.write(json.dumps(result) + "\n")
                    log.flush()
                    results[clip.id] = {**result, "new": True}
    finally:
        stopped.set()  # a clip that is being decoded is not waited for
    return [results[clip.id] for clip in clips if clip.id in results], failed


def _new(found: Iterable, failed: list, results: dict, kept: dict) -> Iterator[tuple]:
    """What has been read; what cannot be read goes to `failed`, what an earlier run has finished to `results`."""
    for one in found:
        if isinstance(one, dict):
            failed.append(one)
        elif one[2] is None:
            results[one[0].id] = {**kept[one[0].id], "new": False}
        else:
            yield one


def _batches(found: Iterable[tuple], meaning: Meaning) -> Iterator[list[tuple]]:
    """(clip, content hash, Frames) triples, with the numbers of the frames that count, in lists of BATCH frames
    together, but for the last. A long clip is in several lists."""
    batch, room = [], BATCH
    for one in found:
        frames = one[2]
        numbers = range(0, len(frames.images), _step(frames, meaning))
        while numbers:
            taken, numbers = numbers[:room], numbers[room:]
            batch.append((*one, taken))
            room -= len(taken)
            if not room:
                yield batch
                batch, room = [], BATCH
    if batch:
        yield batch


def _step(frames: Frames, meaning: Meaning) -> int:
    """Every how many frames of a clip count."""
    fps = frames.fps if frames.fps and len(frames.images) > 1 else 0.0
    return max(1, round(fps / meaning.rate)) if meaning.rate else 1


def _result(clip: Clip, numbers: range, said: list, meaning: Meaning) -> dict:
    """A clip's rows, 'clip' and 'frame'. said: of each frame that counts, what the model says; of a segmentation what
    `_masked` returns."""
    common = {"path": as_text(path_of(clip)), "clip": clip.id}
    if meaning.task == "segmentation":
        rows = [{**common, "frame": n, "frames": 1, **mask} for n, mask in zip(numbers, said)]
        return {"path": common["path"], "clip": rows, "frame": rows}
    whole = {**common, "frame": None, "frames": len(said), **_columns(np.mean(said, axis=0), meaning)}
    each = [{**common, "frame": n, "frames": 1, **_columns(p, meaning)} for n, p in zip(numbers, said)]
    return {"path": common["path"], "clip": [whole], "frame": each}


def _columns(said: np.ndarray, meaning: Meaning) -> dict:
    if meaning.task == "regression":
        return dict(zip(meaning.labels, said.tolist()))
    columns = {f"p_{name}": p for name, p in zip(meaning.labels, said.tolist())}
    if meaning.task == "classification":
        columns |= {"label": meaning.labels[said.argmax()], "entropy": float(entr(said).sum())}
    return columns


def _masked(clip, number: int, p: np.ndarray, shown: Frames, partial: Path) -> dict:
    """Write a frame's mask at the size of the file's frames, and a tile of the contact sheet.

    p: probabilities (px, px).
    """
    large = Image.fromarray(p.astype(np.float32)).resize(shown.before.shape[::-1], Image.Resampling.BILINEAR)
    mask = np.asarray(large) > 0.5
    digest = hashlib.sha256(clip.id.encode("utf-8", "surrogateescape")).hexdigest()[:8]  # ids may differ by a / alone
    name = f"{clip.id.replace('/', '__')[-150:]}_{number}_{digest}.png"
    masks, tiles = partial / "masks", partial / "tiles"
    masks.mkdir(exist_ok=True)
    tiles.mkdir(exist_ok=True)
    write_whole(masks / name, lambda file: Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG"))
    if sum(1 for _ in tiles.iterdir()) < TILES:
        write_whole(tiles / name, lambda file: _tile(shown.images[number], p > 0.5).save(file, "PNG"))
    return {"mask": name, "area": float(mask.mean())}


def _tile(image: np.ndarray, mask: np.ndarray) -> Image.Image:
    """A frame with its mask's outline."""
    colours = np.repeat(image[..., None], 3, axis=2)
    colours[mask & ~binary_erosion(mask)] = YELLOW
    return Image.fromarray(colours).resize((TILE, TILE))


def _pictures(output: Path) -> tuple[Path, Path]:
    """The folder of a segmentation's masks, and their contact sheet."""
    return output.with_name(output.stem + "_masks"), output.with_name(output.stem + "_masks.png")


def _not_written(clips: list[Clip], places: Iterable[Path]) -> list[Clip]:
    """The clips but those that the same command has written, where its output lies below its inputs."""
    own = {place.resolve() for place in places}
    return [clip for clip in clips if own.isdisjoint((file := clip.files[0].resolve(), *file.parents))]


def _take_masks(partial: Path, output: Path) -> None:
    """Move the masks beside the output, with a contact sheet of the first ones."""
    folder, sheet_file = _pictures(output)
    folder.mkdir(exist_ok=True)
    for file in finished(partial / "masks", ".png"):
        os.replace(file, folder / file.name)
    tiles = finished(partial / "tiles", ".png")
    pictures = []
    for file in tiles:
        with Image.open(file, formats=("PNG",)) as picture:
            pictures.append(picture.convert("RGB"))
    sheet = contact_sheet(pictures, 6)
    write_whole(sheet_file, lambda file: sheet.save(file, "PNG"))


def _kept(partial: Path, settings: dict) -> dict[str, dict]:
    """Results of an interrupted run, by clip. Raises ValueError if it was another model's or had other settings."""
    about = partial / "settings.json"
    if about.exists() and json.loads(about.read_text(encoding="utf-8")) != settings:
        raise ValueError(
            f"{partial}: is of an interrupted run of another model, --per or --onnx, or of another version of "
            "uscl-hub. Choose another output, or remove it"
        )
    write_json(about, settings)
    kept = {}
    log = partial / "clips.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # the last one may be cut off
    for line in whole:
        row = json.loads(line)
        kept[row["id"]] = row
    write_whole(log, lambda file: file.write_text("".join(whole), encoding="utf-8"))
    return kept


def _write(rows: list[dict], output: Path) -> None:
    if output.suffix.lower() == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError("Parquet needs pyarrow: pip install 'uscl-hub[embed]', or name a .csv") from error
        write_whole(output, lambda file: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file))
        return

    def save(file):
        with open(file, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_whole(output, save)
