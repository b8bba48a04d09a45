"""Find ultrasound clips in folders and decode them to grey frames.

Videos (mp4, avi, mov, mpeg, webm, ...) by PyAV, gif and other images by Pillow, DICOM (multi-frame, compressed
transfer syntaxes too) by pydicom, numbered frames in a folder as one clip, any other image as a one-frame clip.
Headers are never believed: every limit is checked on what is about to be, or has been, decoded. Of a DICOM file
only pixels and the frame rate are used; no tag is copied, logged or quoted in an error.
"""

import hashlib
import logging
import os
import re
import warnings
import zlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
from PIL import Image

from uscl_hub.preprocess import to_grey

MAX_PIXELS = 4096 * 4096  # a frame; larger ones are mosaics, slides or decompression bombs
MAX_FRAMES = 100_000  # a clip
MAX_BYTES = 4 * 2**30  # of one clip decoded as a whole by `decode`

VIDEO = {".mp4", ".m4v", ".mov", ".avi", ".mpeg", ".mpg", ".webm", ".mkv", ".wmv", ".gif"}
IMAGE = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".pgm", ".ppm"}
DICOM = {".dcm", ".dicom", ".ima"}

# A renamed playlist must not make the decoder open other files or the network.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,mpeg,mpegvideo,mpegts,matroska,webm,asf,gif,h264,hevc,m4v"
# 8-bit formats of FFmpeg whose first plane is luma at full resolution
_LUMA_FIRST = {f"yuv{full}{cut}p" for full in ("", "j") for cut in (420, 422, 444)} | {"nv12", "gray"}


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


# ---------------------------------------------------------------------------------------------- finding clips


def find_clips(roots: Sequence[Path | str]) -> list[Clip]:
    """All clips below `roots` (folders, any nesting, or single files), sorted by id.

    At least two images of one folder whose names differ only in their last number are one 'frames' clip, in the
    numbers' order, unless they differ in size: then they are separate images (a few headers are looked at).
    Hidden files are left out; linked folders are followed, once. Raises FileNotFoundError for a missing root.
    """
    if isinstance(roots, (str, Path)):
        roots = [roots]
    resolved = list(dict.fromkeys(Path(root).resolve() for root in roots))
    for root in resolved:
        if not root.exists():
            raise FileNotFoundError(f"{root}: no such file or folder")
    folders = {root: root if root.is_dir() else root.parent for root in resolved}
    names = _source_names(set(folders.values()))
    clips = {}
    for root, folder in folders.items():
        source = names[folder]
        listing = _walk(root) if root.is_dir() else [(folder, [root.name])]
        for parent, files in listing:
            for clip in _clips_of_folder(parent, files, folder, source):
                clips[clip.id] = clip
    return sorted(clips.values(), key=lambda clip: clip.id)


def _source_names(folders: set[Path]) -> dict[Path, str]:
    """The folder's own name, with as many parents as are needed to tell two of the same name apart."""
    names = {}
    for folder in folders:
        for depth in range(1, len(folder.parts) + 1):
            tail = folder.parts[-depth:]
            if not any(other != folder and other.parts[-depth:] == tail for other in folders):
                break
        names[folder] = "/".join(part.strip("/\\:") or "root" for part in tail)
    return names


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    seen = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder already listed, or a loop
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(parent), files


def _clips_of_folder(parent: Path, names: list[str], root: Path, source: str) -> Iterator[Clip]:
    prefix = "/".join((source, *parent.relative_to(root).parts))

    def clip(name, kind, files):
        return Clip(_printable(f"{prefix}/{name}"), _printable(source), kind, files)

    numbered = defaultdict(list)
    for name in sorted(names):
        path = parent / name
        extension = path.suffix.lower()
        if name.startswith(".") or not path.is_file():
            continue
        if extension in IMAGE:
            match = re.fullmatch(r"(.*?)(\d+)(\D*)", path.stem, re.DOTALL)
            if match:
                numbered[match[1], match[3], extension].append((int(match[2]), name))
            else:
                yield clip(name, "image", (path,))
        elif extension in VIDEO:
            yield clip(name, "video", (path,))
        elif extension in DICOM or (not extension[1:].isalpha() and _has_dicom_magic(path)):
            yield clip(name, "dicom", (path,))
    for (before, after, extension), frames in numbered.items():
        files = tuple(parent / name for _, name in sorted(frames))
        if len(files) == 1 or _sizes_differ(files):
            for path in files:
                yield clip(path.name, "image", (path,))
        else:
            yield clip(f"{before}#{after}{extension}", "frames", files)


def _printable(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 are written out, as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _has_dicom_magic(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _sizes_differ(files: tuple[Path, ...]) -> bool:
    sizes = set()
    for i in sorted({round(x) for x in np.linspace(0, len(files) - 1, 8)}):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(files[i]) as image:
                    sizes.add(image.size)
        except Exception:  # noqa: BLE001 - an unreadable frame says nothing here; decoding reports it
            continue
    return len(sizes) > 1


# ------------------------------------------------------------------------------------------------- decoding


def content_hash(clip: Clip) -> str:
    """Hex SHA-256 of a clip's file; of a folder of frames, of the files' digests in order. Raises OSError."""
    digests = []
    for path in clip.files:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digests.append(digest)
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def decode(clip: Clip, max_frames: int | None = None, stride: int = 1) -> tuple[np.ndarray, float | None]:
    """uint8 (T, H, W) grey frames and the frames per second of the file, None if unknown.

    Every `stride`-th frame, at most `max_frames` of them. Raises UnreadableClip(path, reason).
    """
    frames, fps, total = [], None, 0
    for frame, fps in iter_frames(clip, max_frames, stride):
        total += frame.nbytes
        if total > MAX_BYTES:
            raise UnreadableClip(
                _path(clip),
                f"more than {MAX_BYTES >> 30} GiB of decoded frames; give a stride or a largest number of frames",
            )
        frames.append(frame)
    return np.stack(frames), fps


def iter_frames(
    clip: Clip, max_frames: int | None = None, stride: int = 1, notes: list[str] | None = None
) -> Iterator[tuple[np.ndarray, float | None]]:
    """Yields (uint8 (H, W), frames per second) one frame at a time, all of the first frame's size.

    A frame of another size is resized to the first one's. That, and a video that ends before its header says, is
    appended to `notes`, or without them a warning. Raises UnreadableClip, also if there is no frame at all or there
    are more than MAX_FRAMES; ImportError if the decoder's library is not installed.
    """
    if stride < 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(f"stride and max_frames must be at least 1, got {stride} and {max_frames}")
    reader = {"video": _video, "dicom": _dicom, "frames": _frames, "image": _image}[clip.kind]
    if clip.kind == "video" and clip.files[0].suffix.lower() == ".gif":
        reader = _image  # Pillow composes partial frames; FFmpeg gives the same with more ado

    def note(text):
        if notes is None:
            warnings.warn(text, stacklevel=3)
        elif text not in notes:
            notes.append(text)

    shape, taken = None, 0
    try:
        for grey, fps in reader(clip, stride, note):
            if shape is None:
                shape = grey.shape
            elif grey.shape != shape:
                note(f"frames differ in size: resized to the first, {shape[1]} x {shape[0]}")
                grey = np.array(Image.fromarray(grey).resize(shape[::-1], Image.Resampling.BILINEAR))
            yield grey, fps
            taken += 1
            if taken == max_frames:
                return
            if taken >= MAX_FRAMES:
                raise UnreadableClip(_path(clip), f"more than {MAX_FRAMES} frames; give a largest number of frames")
    except (OSError, MemoryError) as error:
        raise UnreadableClip(_path(clip), _reason(error)) from error
    if taken == 0:
        raise UnreadableClip(_path(clip), "holds no frame")


def _path(clip: Clip) -> Path:
    return clip.files[0].parent if clip.kind == "frames" else clip.files[0]


def _reason(error: BaseException) -> str:
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check_pixels(path: Path, width: int, height: int):
    if width < 2 or height < 2:
        raise UnreadableClip(path, f"{width} x {height} pixels: too small to be an image")
    if width * height > MAX_PIXELS:
        raise UnreadableClip(path, f"{width} x {height} pixels: the limit is {MAX_PIXELS / 1e6:.1f} million a frame")


def _video(clip: Clip, stride: int, note) -> Iterator[tuple[np.ndarray, float | None]]:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV: pip install 'uscl-hub[media]'") from error
    path = clip.files[0]
    count = 0
    try:
        # absolute, so that a name like 'http:x.mp4' is a file; tags in any encoding
        with av.open(
            os.path.abspath(path),
            metadata_errors="ignore",
            options={"protocol_whitelist": "file", "format_whitelist": _DEMUXERS},
        ) as container:
            if not container.streams.video:
                raise UnreadableClip(path, "no video stream")
            stream = container.streams.video[0]
            stream.thread_type, stream.thread_count = "NONE", 1  # processes, not threads, share the cores
            context = stream.codec_context
            if context is None:
                raise UnreadableClip(path, "no decoder for its video codec")
            # frames that grow on the way: ours is the better message, FFmpeg's limit comes before the memory is taken
            context.options = {"max_pixels": str(4 * MAX_PIXELS)}
            if context.width and context.height:
                _check_pixels(path, context.width, context.height)
            rate = stream.average_rate or stream.guessed_rate
            fps = float(rate) if rate and 0 < rate < 10_000 else None
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise UnreadableClip(path, f"damaged at frame {count}")
                if count % stride == 0:
                    _check_pixels(path, frame.width, frame.height)
                    grey = _grey(frame)
                    if frame.rotation % 360:
                        grey = np.rot90(grey, round(frame.rotation / 90))
                    yield np.ascontiguousarray(grey), fps
                count += 1
            if count < 0.9 * stream.frames:
                note(f"its header says {stream.frames} frames, {count} could be decoded")
    except (av.error.FFmpegError, ValueError) as error:
        where = f"damaged after frame {count}: " if count else ""
        raise UnreadableClip(path, where + _reason(error)) from error


def _grey(frame) -> np.ndarray:
    """uint8 (H, W): what frame.to_ndarray(format="gray") gives, which takes longer than to decode the frame."""
    y, levels = frame.planes[0], None
    if frame.format.name in _LUMA_FIRST and y.line_size >= frame.width:
        levels = _grey_levels(frame.format.name, frame.color_range, frame.colorspace)
    if levels is None:
        return frame.to_ndarray(format="gray")
    luma = np.frombuffer(y, np.uint8).reshape(-1, y.line_size)[: frame.height, : frame.width]
    return np.take(levels, luma, mode="clip")


@lru_cache
def _grey_levels(name, color_range, colorspace) -> np.ndarray | None:
    """uint8 (256,): the grey level of each value of luma, asked of FFmpeg with a frame that holds them all; None if
    it depends on the colour, too (of BT.709, for one)."""
    import av

    levels = []
    for colour in (64, 192):
        ramp = av.VideoFrame(256, 2, name)
        ramp.color_range, ramp.colorspace = color_range, colorspace
        for i, plane in enumerate(ramp.planes):
            row = np.full(plane.line_size, colour) if i else np.arange(plane.line_size)
            plane.update(np.tile(row.astype(np.uint8), plane.buffer_size // plane.line_size).tobytes())
        levels.append(ramp.to_ndarray(format="gray")[0])
    return levels[0] if np.array_equal(*levels) else None


def _open_image(path: Path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning: our limit is lower
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise UnreadableClip(path, f"more pixels than the limit of {MAX_PIXELS / 1e6:.1f} million a frame") from error
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile bytes
        raise UnreadableClip(
            path,
            "not an image that Pillow can read" if isinstance(error, Image.UnidentifiedImageError) else _reason(error),
        ) from error
    return image


def _image(clip: Clip, stride: int, note) -> Iterator[tuple[np.ndarray, float | None]]:
    """Every frame of a gif (an animated webp or multi-page tiff too); the one of any other image."""
    path = clip.files[0]
    with _open_image(path) as image:
        try:
            image.verify()  # a png's checksums, which decoding does not look at
        except Exception as error:
            raise UnreadableClip(path, _reason(error)) from error
    with _open_image(path) as image:
        _check_pixels(path, *image.size)
        index = 0
        while True:
            try:
                if index == 0:
                    animated = getattr(image, "is_animated", False)  # reads the file
                    duration = image.info.get("duration") if animated else None
                    fps = 1000 / duration if isinstance(duration, (int, float)) and duration > 0 else None
                image.seek(index)
                _check_pixels(path, *image.size)
                grey = to_grey(image)
            except EOFError:
                return
            except UnreadableClip:
                raise
            except Exception as error:  # as in _open_image
                raise UnreadableClip(path, (f"damaged at frame {index}: " if index else "") + _reason(error)) from error
            if index % stride == 0:
                yield grey, fps
            index += 1
            if not animated:
                return


def _frames(clip: Clip, stride: int, note) -> Iterator[tuple[np.ndarray, float | None]]:
    for path in clip.files[::stride]:
        for frame in _image(Clip(clip.id, clip.source, "image", (path,)), 1, note):
            yield frame[0], None
            break  # one frame a file


@contextmanager
def _quiet_pydicom():
    """Its warnings and log lines quote tag values."""
    logger = logging.getLogger("pydicom")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled


def _dicom(clip: Clip, stride: int, note) -> Iterator[tuple[np.ndarray, float | None]]:
    try:
        import pydicom
        from pydicom.pixels import iter_pixels
    except ImportError as error:
        raise ImportError("reading DICOM needs pydicom: pip install 'uscl-hub[media]'") from error
    path = clip.files[0]
    with _quiet_pydicom():
        try:
            _check_inflated(path)
            data = pydicom.dcmread(path)
        except UnreadableClip:
            raise
        except Exception as error:  # its message may quote a tag: only the kind of error is passed on
            raise UnreadableClip(path, f"not a readable DICOM file ({type(error).__name__})") from None
        try:
            if "PixelData" not in data:
                raise UnreadableClip(path, "a DICOM file without pixel data")
            _check_pixels(path, int(data.Columns), int(data.Rows))
            frames, fps = _number_of_frames(data), _dicom_fps(data)
            uid = data.file_meta.TransferSyntaxUID
            syntax = uid.name if uid.type else "unknown transfer syntax"  # not the value itself
        except UnreadableClip:
            raise
        except Exception as error:
            raise UnreadableClip(path, f"DICOM pixel attributes missing or invalid ({type(error).__name__})") from None
        if frames > MAX_FRAMES:
            raise UnreadableClip(path, f"claims {frames} frames; the limit is {MAX_FRAMES}")
        pixels = iter_pixels(data, indices=range(0, frames, stride))
    while True:
        with _quiet_pydicom():
            try:
                frame = next(pixels, None)
                if frame is None:
                    return
                grey = _dicom_grey(frame, data)
            except Exception as error:
                raise UnreadableClip(path, f"pixel data cannot be decoded ({syntax}, {type(error).__name__})") from None
        yield grey, fps


def _check_inflated(path: Path):
    """pydicom inflates a deflated file as a whole: see first how much that gives."""
    from pydicom.filereader import read_dataset, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    with open(path, "rb") as file:
        read_preamble(file, force=False)
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        inflate, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while not inflate.eof and (block := inflate.unconsumed_tail or file.read(1 << 16)):
            total += len(inflate.decompress(block, 1 << 20))
            if total > MAX_BYTES:
                raise UnreadableClip(path, f"inflates to more than {MAX_BYTES >> 30} GiB")


def _number_of_frames(data) -> int:
    return max(1, int(data.get("NumberOfFrames") or 1))


def _dicom_fps(data) -> float | None:
    for name, fps in (("FrameTime", lambda ms: 1000 / ms), ("CineRate", float), ("RecommendedDisplayFrameRate", float)):
        try:
            value = fps(float(data.get(name)))
        except (TypeError, ValueError, ZeroDivisionError):
            continue
        if 0 < value < 10_000:
            return value
    return None


def _dicom_grey(frame: np.ndarray, data) -> np.ndarray:
    """One decoded frame -> uint8 (H, W) as it would be displayed."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    if data.PhotometricInterpretation == "PALETTE COLOR":
        frame = apply_color_lut(frame, data)
        # a 16 bit palette fills 16 bits, or 8 bits written into 16
        return to_grey(frame if frame.dtype == np.uint8 or frame.max() > 255 else frame.astype(np.uint8))
    if frame.ndim == 3:  # pydicom has made RGB of YBR
        return to_grey(frame if frame.dtype == np.uint8 else (frame >> (data.BitsStored - 8)).astype(np.uint8))
    bits, signed = int(data.BitsStored), bool(data.PixelRepresentation)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values = frame
    if "WindowWidth" in data or "VOILUTSequence" in data:
        values = apply_voi_lut(apply_modality_lut(frame, data), data, index=0)
        if "VOILUTSequence" in data:
            low, high = 0, 2 ** int(data.VOILUTSequence[0].LUTDescriptor[2]) - 1
        elif "RescaleSlope" in data:  # pydicom's output range follows the rescaled one
            low, high = sorted(float(data.RescaleSlope) * x + float(data.RescaleIntercept) for x in (low, high))
    grey = np.rint((values.astype(np.float64) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    return 255 - grey if data.PhotometricInterpretation == "MONOCHROME1" else grey
