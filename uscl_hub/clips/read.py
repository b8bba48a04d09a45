"""A clip as a model is shown it: decoded, cropped to the moving image, resized. Training's cache, `uscl-hub embed` and
`search` all read their clips here, so that their frames are the same bytes."""

from dataclasses import dataclass
from itertools import islice

import numpy as np

from uscl_hub.clips.clip import MAX_BYTES, Clip, UnreadableClip
from uscl_hub.clips.crop import SAMPLES, Region, apply_region, detect_region, sample
from uscl_hub.clips.decode import iter_frames
from uscl_hub.clips.text import burned_in_text_suspected
from uscl_hub.preprocess import resize

KEEP_BYTES = 512 * 2**20  # decoded frames held at once; longer clips are decoded twice


@dataclass(frozen=True)
class Frames:
    """images: uint8 (T, size, size). fps: of the file, None if unknown. region: the image area, in pixels of the file.
    text: whether burned-in text is suspected in what is left of the picture. notes: what the reader should know.
    before, after: uint8 (H, W) and (h, w), the middle one of the frames looked at, without and with the crop."""

    images: np.ndarray
    fps: float | None
    region: Region
    text: bool
    notes: tuple[str, ...]
    before: np.ndarray
    after: np.ndarray


def read_clip(clip: Clip, size: int, *, crop: str = "crop", stride: int = 1, max_frames: int | None = None) -> Frames:
    """Every `stride`-th frame of a clip, at most `max_frames` of them, as `size` x `size` grey images.

    crop: 'crop', 'blank' or 'none', see `crop.apply_region`. Raises UnreadableClip.
    """
    held, few, total, notes = [], [], 0, []
    for frame, fps in iter_frames(clip, max_frames, stride, notes):
        total += 1
        if held is not None:
            held.append(frame)
            if len(held) * frame.nbytes > KEEP_BYTES and len(held) > SAMPLES:
                held, few = None, held
        else:
            few.append(frame)
        if held is None and len(few) * frame.nbytes > KEEP_BYTES:
            few = few[::2]
    if total * size**2 > MAX_BYTES:
        raise UnreadableClip(clip.files[0], f"{total} frames of {size} px are more than {MAX_BYTES >> 30} GiB")
    looked_at = sample(held if held is not None else few)
    whole = Region(0, looked_at.shape[1], 0, looked_at.shape[2])
    region = whole if crop == "none" else detect_region(looked_at)
    source = held if held is not None else (frame for frame, _ in iter_frames(clip, max_frames, stride, notes))
    images, count = np.empty((total, size, size), np.uint8), 0
    for count, frame in enumerate(islice(source, total), start=1):
        images[count - 1] = resize(np.ascontiguousarray(apply_region(frame, region, crop)), size)
    if count != total:
        raise UnreadableClip(clip.files[0], "changed while it was read")
    after = apply_region(looked_at, region, crop)
    middle = len(looked_at) // 2
    text = burned_in_text_suspected(after)
    return Frames(images, fps, region, text, tuple(notes), looked_at[middle].copy(), after[middle].copy())
