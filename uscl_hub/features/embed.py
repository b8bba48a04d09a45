"""Features of any mix of images, videos and DICOM files as one Parquet table.

One row a frame (level 'frame') and one a clip (level 'clip', the mean of its frames' features). Clips go
through the crop and the preprocessing of training. The table's metadata holds the settings; nothing of a
DICOM header but the frame rate is ever read into it.
"""

import contextlib
import shutil
import threading
import time
from functools import partial as partial_of
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np

from uscl_hub import __version__, ranks, sources
from uscl_hub.checkpoints import CheckpointError
from uscl_hub.clips import content_hash
from uscl_hub.clips.read import read_clip
from uscl_hub.features.network import features_of, fingerprint, placed, side_by_side
from uscl_hub.features.places import tell_apart
from uscl_hub.features.table import import_pyarrow, make_schema, merge, read_finished, save_part
from uscl_hub.features.thumbnails import make_thumbnail
from uscl_hub.files import check_room, finished, locked
from uscl_hub.inputs import ahead, batches, find_inputs, nothing_read, read_ahead, unknown_files, write_report
from uscl_hub.load import load_meta_uscl_backbone
from uscl_hub.models import width
from uscl_hub.preprocess import create_transform

PART_SECONDS = 20  # at most so much work is lost when a run is killed


# 11 arguments: those of the command
def embed(
    inputs,
    output,
    *,
    name: str = "meta_uscl_resnet18",
    checkpoint=None,
    revision: str | None = None,
    stride: int = 1,
    crop: str = "crop",
    frames: str = "auto",
    batch_size: int = 64,
    device: str = "cpu",
    progress: bool = True,
) -> dict:
    """Write the features of all clips below the inputs (files and folders) to a Parquet file.

    Clips that the file, or an interrupted run's `<output>.partial` folder, already holds are not computed
    again; that needs the same model and settings. Rows of clips that are not among the inputs stay. The file appears,
    whole, at the end. Under torchrun each process takes its share of the clips, and all return the report.

    Args:
        name, checkpoint, revision: the backbone, see `load_meta_uscl_backbone`.
        stride: take every n-th frame.
        crop: 'crop', 'blank' or 'none', of the scanner's user interface.
        frames: what numbered images of one folder are, see `find_clips`.
        batch_size: frames a forward pass. A clip may take as long as in training's ingest.

    Returns a report, which is written to `<output>.report.json`, too: it lists what could not be read or was passed
    over, and where burned-in text is suspected. Raises ValueError if nothing can be read or the settings differ from
    the file's, OSError if another process writes the same output.
    """
    import_pyarrow()
    output, device = Path(output), ranks.device(device)
    partial, earlier = output.with_name(output.name + ".partial"), [output] * output.exists()
    with ranks.joined():
        clips, passed = ranks.from_first(lambda: find_inputs(inputs, frames))
        failed = [] if ranks.rank() else unknown_files(inputs, clips)
        model = placed(load_meta_uscl_backbone(name, checkpoint=checkpoint, revision=revision), device)
        px = create_transform(model).keywords["size"]
        settings = {"name": name, "weights": fingerprint(model), "px": px, "stride": stride, "crop": crop}
        settings["version"] = __version__
        with _held(partial):
            clips, done, places = ranks.from_first(lambda: _start(clips, earlier, partial, settings))
            where = {"checkpoint": sources.settle(checkpoint, name), "revision": revision, "places": places}
            schema = make_schema(width(model), {**settings, **where})
            run = _Run(clips[ranks.rank() :: ranks.world()], done, settings, failed)
            rows_of = partial_of(_rows, model=model, batch_size=batch_size, stride=stride, what=checkpoint or name)
            shown = progress and ranks.rank() == 0
            run.compute(rows_of, lambda rows: save_part(rows, partial, schema), batch_size, device, shown)
            shares = ranks.from_all((run.current, run.failed))

            def end() -> dict:
                current = {clip: digest for part, _ in shares for clip, digest in part.items()}
                failed = [reason for _, part in shares for reason in part]
                facts = _merged(current, done, failed, (earlier, partial, output), schema)
                report = write_report(output, facts, failed, passed, {"settings": settings})
                shutil.rmtree(partial)
                return report

            return ranks.from_first(end)


@contextlib.contextmanager
def _held(partial: Path) -> Iterator[None]:
    """The first process makes and holds the folder of the parts, for all."""
    if ranks.rank():
        yield
        return
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        check_room(partial)
        yield


def _start(clips: list, earlier: list[Path], partial: Path, settings: dict) -> tuple[list, dict, dict]:
    """The clips by the names that the table has for them; clip id -> content hash of those that are finished; and the
    places of the sources."""
    done, places = read_finished(earlier + finished(partial, ".parquet"), settings)
    clips, places = tell_apart(clips, places, done, content_hash)
    return clips, done, places


def _merged(current: dict, done: dict, failed: list, paths: tuple, schema) -> dict:
    """Make the table of all parts; what the report says of it. paths: the earlier tables, the parts' folder, the table.

    Raises ValueError if nothing could be read.
    """
    earlier, partial, output = paths
    if not current and not done:
        shutil.rmtree(partial)
        raise nothing_read(failed)
    facts = merge(earlier + finished(partial, ".parquet"), output, schema, current)
    facts["computed"] = len(current.items() - done.items())
    return facts


class _Run:
    """Clips on their way from their files into parts of the table.

    current: clip id -> content hash of what has been read. failed: what could not be. pending: (clip, content hash,
    Frames) that were read and are in no batch yet.
    """

    def __init__(self, clips: list, done: dict[str, str], settings: dict, failed: list[dict]):
        self.clips, self.done, self.settings, self.failed = clips, done, settings, failed
        self.current: dict[str, str] = {}
        self.pending: list[tuple] = []
        self.stopped = threading.Event()

    def compute(self, rows_of: Callable, save: Callable, batch_size: int, device: str, progress: bool) -> None:
        """Save the rows of all new clips, every PART_SECONDS. An interrupt keeps what is finished, or as good as."""
        rows: list[dict] = []
        last = time.monotonic()
        shown = read_ahead(self._look, self.clips, self.stopped, progress)
        waiting = batches(self._new(shown), batch_size, self.pending)
        with side_by_side(device) as workers:
            with contextlib.closing(ahead(rows_of, waiting, *workers)) as computed:
                try:
                    for new in computed:
                        rows += new
                        if time.monotonic() - last > PART_SECONDS:
                            save(rows)
                            rows, last = [], time.monotonic()
                except BaseException as error:
                    self.stopped.set()  # a clip that is being decoded is not waited for
                    if isinstance(error, KeyboardInterrupt):
                        rows += rows_of(self.pending) if self.pending else []
                        if rows:
                            save(rows)
                    raise
        if rows:
            save(rows)

    def _look(self, clip):
        """(clip, content hash, its Frames or None if the table has them)."""
        digest, wanted = content_hash(clip), self.settings
        if self.done.get(clip.id) == digest:
            return clip, digest, None
        return clip, digest, read_clip(clip, wanted["px"], crop=wanted["crop"], stride=wanted["stride"])

    def _new(self, shown: Iterable) -> Iterator[tuple]:
        """What has been read and is not in the table yet."""
        for found in shown:
            if isinstance(found, dict):
                self.failed.append(found)
                continue
            clip, digest, frames = found
            self.current[clip.id] = digest
            if frames is not None:
                yield found


def _rows(batch: list[tuple], model, batch_size: int, stride: int, what) -> list[dict]:
    """Table rows of (clip, content hash, Frames) triples; forward passes span clips."""
    features = features_of(model, np.concatenate([frames.images for _, _, frames in batch]), batch_size)
    rows, start = [], 0
    for clip, digest, frames in batch:
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
                "thumbnail": make_thumbnail(frames),
                "feature": part.mean(0),
            }
        )
        for i, vector in enumerate(part):
            seconds = frames.times[i]  # true ones, where the file has them
            if seconds is None and frames.fps:
                seconds = i * stride / frames.fps
            rows.append({**common, "level": "frame", "frame": i * stride, "time": seconds, "feature": vector})
    return rows
