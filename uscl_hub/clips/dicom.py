"""Frames of a DICOM file: pydicom, and PyAV for the video codecs.

Only pixels and times are used: no tag is copied, logged or quoted in an error. One frame is in memory at a time; limits
hold for what is in the file, not for what its tags say.
"""

import io
import math
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator

import numpy as np

from uscl_hub.clips import memory
from uscl_hub.clips.clip import MAX_BYTES, MAX_FRAMES, Clip, UnreadableClip, check_pixels, opened
from uscl_hub.clips.dicom_display import dicom_grey, shown_in_full, used_range, uses_window
from uscl_hub.clips.dicom_pixels import PixelData
from uscl_hub.clips.quiet import quiet
from uscl_hub.clips.video import stream_frames

_HEADER_BYTES = 256 * 2**20  # read of a file before its pixels
_HEADER_READS = 1_000_000  # for that: four an attribute or so
_VIDEO_CODECS = tuple(f"1.2.840.10008.1.2.4.{number}" for number in range(100, 109))  # MPEG-2, MPEG-4, HEVC


@dataclass(frozen=True)
class _Timing:
    """fps: frames per second, None if unknown. seconds: of each frame since the first, where a file lists them."""

    fps: float | None
    seconds: list[float] = field(default_factory=list)

    def at(self, index: int) -> float | None:
        """Seconds of frame `index` since the first; None if unknown."""
        if index < len(self.seconds):
            return self.seconds[index]
        return index / self.fps if self.fps else None


def dicom_frames(clip: Clip, stride: int, note) -> Iterator[tuple[np.ndarray, float | None, float | None]]:
    """Every `stride`-th frame as it would be displayed, frames per second, seconds since the first frame."""
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise ImportError("reading DICOM needs pydicom: pip install 'uscl-hub[media]'") from error
    path = clip.files[0]
    with opened(path) as file:
        with quiet():
            file, data = _header(file, path)
            try:
                if file.tell() >= _size(file):
                    raise UnreadableClip(path, "a DICOM file without pixel data")
                check_pixels(path, int(data.Columns), int(data.Rows))
                uid = data.file_meta.TransferSyntaxUID
                syntax = uid.name if uid.type else "unknown transfer syntax"  # not the value itself
                claimed = _claimed_frames(data, path)
                pixels = PixelData(file, _size(file), data, path, syntax)
                timing = _timing(data)
            except UnreadableClip:
                raise
            except Exception as error:
                kind = type(error).__name__
                raise UnreadableClip(path, f"DICOM pixel attributes missing or invalid ({kind})") from None
        if uid.startswith(_VIDEO_CODECS):
            stream = _stream(pixels, path)
            frames = ((grey, timing.fps or own, time) for grey, own, time in stream_frames(stream, path, stride, note))
        else:
            frames = _frames(pixels, data, claimed, stride, note, timing)
        yield from frames


def _frames(pixels: PixelData, data, claimed: int, stride: int, note, timing: _Timing):
    path, syntax = pixels.path, pixels.syntax
    with quiet():
        try:
            count, usable = pixels.count(claimed), uses_window(data)
        except UnreadableClip:
            raise
        except Exception as error:
            raise UnreadableClip(path, f"pixel data cannot be decoded ({syntax}, {type(error).__name__})") from None
    if count > MAX_FRAMES:
        raise UnreadableClip(path, f"holds {count} frames; the limit is {MAX_FRAMES}")
    if claimed and count > claimed:
        note(f"its header says {claimed} frames, {count} are in it")
    if not usable:
        note("its window or rescale values cannot be used: shown without them")
    used = _used(pixels, data, count, note)
    for index in range(0, count, stride):
        with quiet():
            try:
                grey = dicom_grey(pixels.frame(index), data, index, used)
            except UnreadableClip:
                raise
            except Exception as error:
                raise UnreadableClip(path, f"pixel data cannot be decoded ({syntax}, {type(error).__name__})") from None
        yield grey, timing.fps, timing.at(index)


def _used(pixels: PixelData, data, count: int, note) -> tuple[int, int] | None:
    """Black and white of all frames, or None: by the bits that are stored. They are decoded once more for it."""
    with quiet():
        try:
            if not shown_in_full(data):
                return None
            used = used_range(data, (pixels.frame(index) for index in range(count)))
        except Exception:  # noqa: BLE001 - decoding, which comes next, says what is wrong with the file
            return None
    if used is not None:
        bits = (used[1] - used[0]).bit_length()
        note(f"its {int(data.BitsStored)} bits hold values of {bits} bits: shown from {used[0]} to {used[1]}")
    return used


def _stream(pixels: PixelData, path: Path) -> io.BytesIO:
    """The one video that all fragments are parts of."""
    limit = min(MAX_BYTES, memory.budget() // 4)
    if pixels.total > limit:
        size = pixels.total >> 20
        raise UnreadableClip(path, f"a video of {size} MiB in a DICOM file; the limit is {limit >> 20} MiB")
    try:
        return io.BytesIO(b"".join(pixels.fragments()))
    except UnreadableClip:
        raise
    except Exception as error:
        raise UnreadableClip(path, f"pixel data cannot be decoded ({pixels.syntax}, {type(error).__name__})") from None


class _Metered:
    """A file of which only so much is read until `metered` is set to False."""

    def __init__(self, file, path: Path):
        self.file, self.path, self.left, self.metered = file, path, _HEADER_BYTES, True
        self.reads = _HEADER_READS
        self.seek, self.tell, self.name = file.seek, file.tell, ""
        self.size = os.fstat(file.fileno()).st_size

    def read(self, size=-1):
        if self.metered:
            self.left -= min(size, self.size) if size >= 0 else self.size
            self.reads -= 1
            if self.left < 0 or self.reads < 0:
                raise UnreadableClip(self.path, "more in it before its pixels than a DICOM file has")
        return self.file.read(size)


def _size(file) -> int:
    return file.size if isinstance(file, _Metered) else file.getbuffer().nbytes


def _header(file, path: Path):
    """The file and its attributes without the pixel data, at which the file stands then.

    Files without a preamble, and without meta information too, are read where their encoding is plain.
    """
    from pydicom import dcmread

    file = _Metered(file, path)
    try:
        deflated = _inflated(file, path)
        if deflated is not None:
            return deflated
        file.seek(0)
        data = dcmread(file, stop_before_pixels=True, force=True, defer_size=2**20)
        if not data:
            raise ValueError("no attributes")
        file.metered = False
        _complete_meta(data)
        return file, data
    except UnreadableClip:
        raise
    except Exception as error:  # its message may quote a tag: only the kind of error is passed on
        raise UnreadableClip(path, f"not a readable DICOM file ({type(error).__name__})") from None


def _complete_meta(data):
    """The transfer syntax that the bytes of a file without meta information are in."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if not getattr(data, "file_meta", None):
        data.file_meta = FileMetaDataset()
    if "TransferSyntaxUID" not in data.file_meta:
        implicit, little = data.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _inflated(file, path: Path):
    """As `_header`, of a deflated file, with a limit on what that takes; None if it is not deflated."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.filereader import read_dataset, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    if read_preamble(file, force=True) is None:
        file.seek(0)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return None
    file.metered = False
    limit = min(MAX_BYTES, memory.budget() // 4)
    inflate, content = zlib.decompressobj(-zlib.MAX_WBITS), io.BytesIO()
    while not inflate.eof and (block := inflate.unconsumed_tail or file.read(1 << 16)):
        content.write(inflate.decompress(block, 1 << 20))
        if content.tell() > limit:
            raise UnreadableClip(path, f"inflates to more than {limit >> 20} MiB")
    content.seek(0)
    attributes = read_dataset(content, False, True, stop_when=lambda tag, vr, length: tag == 0x7FE00010)
    return content, FileDataset("", attributes, file_meta=FileMetaDataset(meta))


def _claimed_frames(data, path: Path) -> int:
    """NumberOfFrames, 0 where it is absent or makes no sense."""
    try:
        claimed = max(0, int(data.get("NumberOfFrames") or 0))
    except (TypeError, ValueError, OverflowError):
        return 0
    if claimed > MAX_FRAMES:
        raise UnreadableClip(path, f"claims {claimed} frames; the limit is {MAX_FRAMES}")
    return claimed


def _timing(data) -> _Timing:
    try:
        steps = [float(ms) / 1000 for ms in data.FrameTimeVector]
    except (AttributeError, TypeError, ValueError):
        steps = []
    if len(steps) > 1 and all(math.isfinite(step) and step >= 0 for step in steps) and sum(steps[1:]) > 0:
        seconds = np.cumsum([0.0, *steps[1:]])
        return _Timing(float((len(steps) - 1) / seconds[-1]), seconds.tolist())
    for name, fps in (("FrameTime", lambda ms: 1000 / ms), ("CineRate", float), ("RecommendedDisplayFrameRate", float)):
        try:
            value = fps(float(data.get(name)))
        except (TypeError, ValueError, ZeroDivisionError):
            continue
        if 0 < value < 10_000:
            return _Timing(value)
    return _Timing(None)
