"""A clip as a model is shown it: decoded, cropped to the moving image, resized. Training's cache, `uscl-hub embed` and
`search` all read their clips here, so that their frames are the same bytes."""

import threading
import time
from dataclasses import dataclass
from itertools import islice

import numpy as np

from uscl_hub.clips import memory
from uscl_hub.clips.clip import MAX_BYTES, MAX_SECONDS, Clip, UnreadableClip, path_of
from uscl_hub.clips.crop import SAMPLES, Region, apply_region, detect_region, sample
from uscl_hub.clips.decode import iter_frames
from uscl_hub.clips.text import burned_in_text_suspected
from uscl_hub.preprocess import resize

KEEP_BYTES = 512 * 2**20  # decoded frames held at once; longer clips are decoded twice
SAMPLE_BYTES = 128 * 2**20  # of the frames on which the crop is found: fewer than SAMPLES where they are huge


@dataclass(frozen=True)
class Frames:
    """images: uint8 (T, size, size). fps: of the file, None if unknown. region: the image area, in pixels of the file.
    text: whether burned-in text is suspected in what is left of the picture. notes: what the reader should know.
    before, after: uint8 (H, W) and (h, w), the middle one of the frames looked at, without and with the crop.
    times: seconds of each image since the file's first frame, None where the file does not say."""

    images: np.ndarray
    fps: float | None
    region: Region
    text: bool
    notes: tuple[str, ...]
    before: np.ndarray
    after: np.ndarray
    times: tuple[float | None, ...] = ()


def read_clip(clip: Clip, size: int, *, crop: str = "crop", stride: int = 1, max_frames: int | None = None) -> Frames:
    """Every `stride`-th frame of a clip, at most `max_frames` of them, as `size` x `size` grey images.

    crop: 'crop', 'blank' or 'none', see `crop.apply_region`. Raises UnreadableClip. The result does not depend on the
    memory budget; a clip that is not held whole is decoded again.
    """
    notes: list[str] = []
    look = _first_look(clip, stride, max_frames, notes)
    total = look.total
    if total * size**2 > min(MAX_BYTES, memory.budget() // 2):
        raise UnreadableClip(path_of(clip), f"{total} frames of {size} px take more memory than there is")
    if look.held is None and total * look.nbytes <= KEEP_BYTES:  # little memory: what others would have picked
        wanted = set(_picks(total, look.nbytes).tolist())
        again = iter_frames(clip, max_frames, stride, notes)
        look.few = [frame for i, (frame, _) in enumerate(again) if i in wanted]
    looked_at = sample(look.few if look.held is None else look.held, _count(look.nbytes))
    look.few = []  # frees them
    whole = Region(0, looked_at.shape[1], 0, looked_at.shape[2])
    region = whole if crop == "none" else detect_region(looked_at)
    again = ((frame, None) for frame in look.held) if look.held else iter_frames(clip, max_frames, stride, notes)
    images, count = np.empty((total, size, size), np.uint8), 0
    for count, (frame, _) in enumerate(islice(again, total), start=1):
        images[count - 1] = resize(np.ascontiguousarray(apply_region(frame, region, crop)), size)
    if count != total:
        raise UnreadableClip(path_of(clip), "changed while it was read")
    after = apply_region(looked_at, region, crop)
    middle = len(looked_at) // 2
    text = burned_in_text_suspected(after)
    before, after = looked_at[middle].copy(), after[middle].copy()
    return Frames(images, look.fps, region, text, tuple(notes), before, after, tuple(look.times))


@dataclass
class _Look:
    """held: all frames if they may be held. few: some, evenly spread. total: how many there are, of nbytes each.
    fps, times: as in `Frames`."""

    held: list[np.ndarray] | None
    few: list[np.ndarray]
    times: list[float | None]
    fps: float | None = None
    total: int = 0
    nbytes: int = 0


def _first_look(clip: Clip, stride: int, max_frames: int | None, notes: list[str]) -> _Look:
    keep, step = min(KEEP_BYTES, memory.budget() // 4), 1
    look = _Look([], [], [])
    for frame, look.fps in iter_frames(clip, max_frames, stride, notes, look.times):
        look.nbytes = frame.nbytes
        if look.held is not None:
            look.held.append(frame)
            if len(look.held) * frame.nbytes > keep and len(look.held) > 1:
                look.held = None
        if look.total % step == 0:
            look.few.append(frame)
            if len(look.few) >= 2 * _count(frame.nbytes):
                look.few, step = look.few[::2], 2 * step
        look.total += 1
    return look


def _count(nbytes: int) -> int:
    return int(min(SAMPLES, max(2, SAMPLE_BYTES // nbytes)))


def _picks(total: int, nbytes: int) -> np.ndarray:
    """The numbers of the frames that `sample` takes of so many."""
    return sample(np.arange(total), _count(nbytes))


def read_in_time(function, clip: Clip, seconds: float = MAX_SECONDS, stopped: threading.Event | None = None):
    """function(clip), or UnreadableClip after so many seconds or once `stopped` is set. For callers that do not read in
    processes of their own: the thread of a decoder that hangs is left behind, and ends with the program."""
    result: list = []
    errors: list[BaseException] = []

    def target():
        try:
            result.append(function(clip))
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    end = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < end and not (stopped and stopped.is_set()):
        thread.join(min(0.2, max(0.0, end - time.monotonic())))
    if errors:
        raise errors[0]
    if not result:
        raise UnreadableClip(path_of(clip), f"took more than {seconds:g} s")
    return result[0]
