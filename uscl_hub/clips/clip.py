"""What a clip is, why one cannot be read, and the limits that hold for all of them."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from uscl_hub.files import NotAFile, check_regular, open_regular

MAX_PIXELS = 4096 * 4096  # a frame; larger ones are mosaics, slides or decompression bombs
MAX_FRAMES = 100_000  # a clip
MAX_BYTES = 4 * 2**30  # of one clip decoded as a whole by `decode`; less where `memory.budget` is less
MAX_SECONDS = 600  # of one clip's decoding
DEPTHS = (8, 10, 12)  # bits that scanners fill of the 16 that a picture or DICOM file has

VIDEO = {
    *(".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".avi", ".mpeg", ".mpg", ".m2v", ".vob", ".mts", ".m2ts", ".webm"),
    *(".mkv", ".wmv", ".asf", ".flv", ".ogv", ".gif"),
}
# what a picture's extension may mean, in Pillow's words: no other decoder sees the file
PICTURE_FORMATS = {
    ".gif": ("GIF",),
    **dict.fromkeys((".jpg", ".jpeg", ".jfif"), ("JPEG",)),
    **dict.fromkeys((".png", ".apng"), ("PNG",)),
    ".bmp": ("BMP", "DIB"),
    **dict.fromkeys((".tif", ".tiff"), ("TIFF",)),
    ".webp": ("WEBP",),
    ".jp2": ("JPEG2000",),
    **dict.fromkeys((".pgm", ".ppm", ".pnm"), ("PPM",)),
}
IMAGE = set(PICTURE_FORMATS) - {".gif"}
DICOM = {".dcm", ".dicom", ".ima"}
# kind of clip: extensions. To add a kind: its row here, a module with its reader, and the reader's row in decode.py.
KINDS = {"image": IMAGE, "video": VIDEO, "dicom": DICOM}


class UnreadableClip(Exception):
    """A clip that cannot be decoded. path: the file (or folder of frames); reason: one line without its content."""

    def __init__(self, path, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = Path(path), reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Clip:
    """id: posix path relative to its root, the root's folder name first. kind: video, dicom, frames, image, or closed:
    a folder that could not be listed, which stands for the clips that may be in it. root: the folder searched."""

    id: str
    source: str
    kind: str
    files: tuple[Path, ...]
    root: Path | None = None


def kind_of(extension: str) -> str | None:
    """The kind of clip of files with this extension.

    >>> kind_of(".png"), kind_of(".dcm"), kind_of(".doc")
    ('image', 'dicom', None)
    """
    return next((kind for kind, extensions in KINDS.items() if extension in extensions), None)


def extension_of(path: Path) -> str:
    """The extension that says what a file is, in lower case; of a link with an unknown one, that of its target."""
    own = path.suffix.lower()
    if kind_of(own) or not path.is_symlink():
        return own
    try:
        return os.path.splitext(os.path.realpath(path))[1].lower()
    except OSError:  # a link that may not be followed, as in /proc
        return own


def path_of(clip: Clip) -> Path:
    return clip.files[0].parent if clip.kind == "frames" else clip.files[0]


def opened(path: Path):
    """A regular file, opened to be read. Raises UnreadableClip where it is something else, OSError."""
    try:
        return open_regular(path)
    except NotAFile as error:
        raise UnreadableClip(path, not_a_file(error)) from None


def must_be_a_file(path: Path):
    """Raises UnreadableClip unless `path` is a regular file, OSError if it cannot be looked at."""
    try:
        check_regular(path)
    except NotAFile as error:
        raise UnreadableClip(path, not_a_file(error)) from None


def not_a_file(error: NotAFile) -> str:
    found = re.search(r"is (a|an|something) [\w ]+, not a regular file", str(error))
    return found[0] if found else "not a regular file"


def reason_of(error: BaseException) -> str:
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def check_pixels(path: Path, width: int, height: int):
    if width < 2 or height < 2:
        raise UnreadableClip(path, f"{width} x {height} pixels: too small to be an image")
    if width * height > MAX_PIXELS:
        raise UnreadableClip(path, f"{width} x {height} pixels: the limit is {MAX_PIXELS / 1e6:.1f} million a frame")
