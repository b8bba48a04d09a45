"""Old home of what is in `uscl_hub.clips` now, kept for code that imports it."""

from uscl_hub.clips.clip import MAX_BYTES, MAX_FRAMES, MAX_PIXELS, Clip, UnreadableClip
from uscl_hub.clips.decode import content_hash, decode, iter_frames
from uscl_hub.clips.find import DICOM, IMAGE, VIDEO, find_clips

__all__ = (
    ["MAX_BYTES", "MAX_FRAMES", "MAX_PIXELS", "DICOM", "IMAGE", "VIDEO", "Clip", "UnreadableClip"]
    + ["content_hash", "decode", "find_clips", "iter_frames"]  # fmt: skip
)
