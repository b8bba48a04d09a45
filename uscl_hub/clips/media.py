"""Old home of what is in this package's other modules now, kept for code that imports it."""

from uscl_hub.clips.clip import DICOM, IMAGE, MAX_BYTES, MAX_FRAMES, MAX_PIXELS, VIDEO, Clip, UnreadableClip
from uscl_hub.clips.decode import content_hash, decode, iter_frames
from uscl_hub.clips.find import find_clips

__all__ = (
    ["MAX_BYTES", "MAX_FRAMES", "MAX_PIXELS", "DICOM", "IMAGE", "VIDEO", "Clip", "UnreadableClip"]
    + ["content_hash", "decode", "find_clips", "iter_frames"]  # fmt: skip
)
