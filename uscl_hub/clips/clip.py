"""What a clip is, why one cannot be read, and the limits that hold for all of them."""

from dataclasses import dataclass
from pathlib import Path

MAX_PIXELS = 4096 * 4096  # a frame; larger ones are mosaics, slides or decompression bombs
MAX_FRAMES = 100_000  # a clip
MAX_BYTES = 4 * 2**30  # of one clip decoded as a whole by `decode`


class UnreadableClip(Exception):
    """A clip that cannot be decoded. path: the file (or folder of frames); reason: one line without its content."""

    def __init__(self, path, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = Path(path), reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Clip:
    """id: posix path relative to its root, the root's folder name first. kind: video, dicom, frames or image."""

    id: str
    source: str
    kind: str
    files: tuple[Path, ...]


def path_of(clip: Clip) -> Path:
    return clip.files[0].parent if clip.kind == "frames" else clip.files[0]


def reason_of(error: BaseException) -> str:
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def check_pixels(path: Path, width: int, height: int):
    if width < 2 or height < 2:
        raise UnreadableClip(path, f"{width} x {height} pixels: too small to be an image")
    if width * height > MAX_PIXELS:
        raise UnreadableClip(path, f"{width} x {height} pixels: the limit is {MAX_PIXELS / 1e6:.1f} million a frame")
