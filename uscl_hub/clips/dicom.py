"""Frames of a DICOM file, by pydicom. Only pixels and the frame rate are used: no tag is copied, logged or quoted in an
error."""

import logging
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import numpy as np

from uscl_hub.clips.clip import MAX_BYTES, MAX_FRAMES, Clip, UnreadableClip, check_pixels
from uscl_hub.preprocess import to_grey


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


def dicom_frames(clip: Clip, stride: int, note) -> Iterator[tuple[np.ndarray, float | None]]:
    try:
        import pydicom
        from pydicom.pixels import iter_pixels
    except ImportError as error:
        raise ImportError("reading DICOM needs pydicom: pip install 'uscl-hub[train]'") from error
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
            check_pixels(path, int(data.Columns), int(data.Rows))
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
