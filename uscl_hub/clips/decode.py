"""Decode a clip of any kind to grey frames.

Headers are never believed: every limit is checked on what is about to be, or has been, decoded.
"""

import hashlib
import os
import time
import warnings
from typing import Iterator

import numpy as np
from PIL import Image

from uscl_hub.clips import memory
from uscl_hub.clips.clip import MAX_BYTES, MAX_FRAMES, MAX_SECONDS, Clip, UnreadableClip, opened, path_of, reason_of
from uscl_hub.clips.dicom import dicom_frames
from uscl_hub.clips.image import image_frames, numbered_frames
from uscl_hub.clips.video import video_frames

# kind of clip: a function of (clip, stride, note) that yields (uint8 (H, W), frames per second, seconds) a frame
READERS = {"video": video_frames, "dicom": dicom_frames, "frames": numbered_frames, "image": image_frames}


def content_hash(clip: Clip) -> str:
    """Hex SHA-256 of a clip's file; of a folder of frames, of the files' digests in order.

    Raises OSError, and UnreadableClip for what is no regular file or is a folder that cannot be listed.
    """
    if clip.kind == "closed":
        raise _closed(clip)
    digests = []
    for path in clip.files:
        digest = hashlib.sha256()
        with opened(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digests.append(digest)
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def decode(clip: Clip, max_frames: int | None = None, stride: int = 1) -> tuple[np.ndarray, float | None]:
    """uint8 (T, H, W) grey frames and the frames per second of the file, None if unknown.

    Every `stride`-th frame, at most `max_frames` of them. Raises UnreadableClip(path, reason), also for a clip of more
    than MAX_BYTES or the process's memory budget (see `memory`).
    """
    frames, fps, total, limit = [], None, 0, min(MAX_BYTES, memory.budget() // 2)  # the stack is a second copy
    for frame, fps in iter_frames(clip, max_frames, stride):
        total += frame.nbytes
        if total > limit:
            raise UnreadableClip(
                path_of(clip),
                f"more than {limit / 2**30:.3g} GiB of decoded frames; give a stride or a largest number of frames",
            )
        frames.append(frame)
    return np.stack(frames), fps


def iter_frames(
    clip: Clip,
    max_frames: int | None = None,
    stride: int = 1,
    notes: list[str] | None = None,
    times: list[float | None] | None = None,
) -> Iterator[tuple[np.ndarray, float | None]]:
    """Yields (uint8 (H, W), frames per second) one frame at a time, all of the first frame's size.

    A frame of another size is resized to the first one's. That, a video that ends before its header says, and whatever
    else a reader should know is appended to `notes`, or without them a warning. The seconds of each frame since the
    file's first one, where the file says them, are appended to `times`. Raises UnreadableClip, also if there is no
    frame at all, there are more than MAX_FRAMES, or it takes more than MAX_SECONDS; ImportError if the decoder's
    library is not installed.
    """
    if stride < 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(f"stride and max_frames must be at least 1, got {stride} and {max_frames}")
    if clip.kind == "closed":
        raise _closed(clip)
    reader = READERS[clip.kind]
    if clip.kind == "video" and clip.files[0].suffix.lower() == ".gif":
        reader = image_frames  # Pillow composes partial frames; FFmpeg gives the same with more ado

    def note(text):
        if notes is None:
            warnings.warn(text, stacklevel=3)
        elif text not in notes:
            notes.append(text)

    shape, taken, started = None, 0, time.monotonic()
    try:
        for grey, fps, seconds in reader(clip, stride, note):
            if shape is None:
                shape = grey.shape
            elif grey.shape != shape:
                note(f"frames differ in size: resized to the first, {shape[1]} x {shape[0]}")
                grey = np.array(Image.fromarray(grey).resize(shape[::-1], Image.Resampling.BILINEAR))
            if times is not None:
                times.append(seconds)
            yield grey, fps
            taken += 1
            if taken == max_frames:
                return
            if taken >= MAX_FRAMES:
                raise UnreadableClip(path_of(clip), f"more than {MAX_FRAMES} frames; give a largest number of frames")
            if time.monotonic() - started > MAX_SECONDS:
                raise UnreadableClip(path_of(clip), f"took more than {MAX_SECONDS} s")
    except (OSError, MemoryError) as error:
        raise UnreadableClip(path_of(clip), reason_of(error)) from error
    if taken == 0:
        raise UnreadableClip(path_of(clip), "holds no frame")


def _closed(clip: Clip) -> UnreadableClip:
    """Why a folder could not be listed."""
    try:
        os.listdir(clip.files[0])
    except OSError as error:
        return UnreadableClip(clip.files[0], f"a folder that cannot be listed ({reason_of(error)})")
    return UnreadableClip(clip.files[0], "a folder that could not be listed when clips were searched: try again")
