"""From a DICOM frame's stored values to the grey levels that a viewer shows."""

import math
from typing import Iterable

import numpy as np

from uscl_hub.clips.clip import DEPTHS
from uscl_hub.preprocess import to_grey

SPARE = 4  # bits that must be left empty, or a dim picture would be taken for one of fewer bits
_SHOWN_BY = ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence")
_RESCALED_BY = ("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence")


def dicom_grey(frame: np.ndarray, data, index: int = 0, used: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 (H, W) of one decoded frame, the file's `index`-th. used: black and white, as of `used_range`."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    if data.PhotometricInterpretation == "PALETTE COLOR":
        frame = apply_color_lut(frame, data)
        # a 16 bit palette fills 16 bits, or 8 bits written into 16
        return to_grey(frame if frame.dtype == np.uint8 or frame.max() > 255 else frame.astype(np.uint8))
    if frame.ndim == 3:  # pydicom has made RGB of YBR
        return to_grey(frame if frame.dtype == np.uint8 else (frame >> (data.BitsStored - 8)).astype(np.uint8))
    if int(data.SamplesPerPixel) == 3:  # brightness already
        return np.ascontiguousarray(frame)
    low: float
    high: float
    low, high = used or _range(int(data.BitsStored), bool(data.PixelRepresentation))
    values, shown = frame, _display(data, index)
    if "WindowWidth" in shown or "VOILUTSequence" in shown:
        values = apply_voi_lut(apply_modality_lut(frame, shown), shown, index=0)
        if "VOILUTSequence" in shown:
            low, high = 0, 2 ** int(shown.VOILUTSequence[0].LUTDescriptor[2]) - 1
        elif "ModalityLUTSequence" in shown:
            low, high = 0, 2 ** int(shown.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
        elif "RescaleSlope" in shown:  # pydicom's output range follows the rescaled one, backwards if the slope is < 0
            low, high = (float(shown.RescaleSlope) * x + float(shown.RescaleIntercept) for x in (low, high))
    grey = np.rint((values.astype(np.float64) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    return 255 - grey if data.PhotometricInterpretation == "MONOCHROME1" else grey


def _range(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def shown_in_full(data) -> bool:
    """Whether grey values are shown by the range that their bits could have: no window or table says which is meant."""
    if data.PhotometricInterpretation == "PALETTE COLOR" or int(data.SamplesPerPixel) != 1:
        return False
    shown = _display(data, 0)
    spare = int(data.BitsStored) - SPARE >= DEPTHS[0]
    return spare and "WindowWidth" not in shown and "VOILUTSequence" not in shown


def used_range(data, frames: Iterable[np.ndarray]) -> tuple[int, int] | None:
    """Black and white where all frames' values need at least SPARE bits less than are stored; else None."""
    lowest, highest = 0, 0
    for frame in frames:
        lowest, highest = min(lowest, int(frame.min())), max(highest, int(frame.max()))
    for bits in DEPTHS:
        low, high = _range(bits, lowest < 0)
        if bits <= int(data.BitsStored) - SPARE and low <= lowest and highest <= high:
            return low, high
    return None


def uses_window(data) -> bool:
    """False if the file has window or rescale values that make no sense."""
    first = _sources(data, 0)
    wanted = any("WindowWidth" in source for source in first)
    rescaled = any("RescaleSlope" in source for source in first)
    shown = _display(data, 0)
    return not (wanted and "WindowWidth" not in shown) and not (rescaled and "RescaleSlope" not in shown)


def _sources(data, index: int):
    """The attributes of the file, then those of its functional groups, of all frames and of this one."""
    sources = [data]
    shared = data.get("SharedFunctionalGroupsSequence") or []
    own = data.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*shared[:1], *own[index : index + 1]):
        for name in ("FrameVOILUTSequence", "PixelValueTransformationSequence"):
            sources += list(group.get(name) or [])[:1]
    return sources


def _display(data, index: int):
    """A data set of what pydicom's functions need for one frame, without what makes no sense."""
    from pydicom.dataset import Dataset

    shown = Dataset()
    shown.file_meta = data.file_meta  # tables may be bytes, whose order it tells
    for name in ("BitsStored", "PixelRepresentation", "PhotometricInterpretation", "SamplesPerPixel"):
        if name in data:
            setattr(shown, name, data[name].value)
    for source in _sources(data, index):
        for name in (*_SHOWN_BY, *_RESCALED_BY):
            if name in source and source[name].value not in (None, ""):
                setattr(shown, name, source[name].value)
    if not shown.get("ModalityLUTSequence"):
        shown.pop("ModalityLUTSequence", None)
    if "ModalityLUTSequence" in shown or not _rescales(shown):  # a file has a table or a line, not both
        for name in ("RescaleSlope", "RescaleIntercept"):
            shown.pop(name, None)
    least = 1 if shown.get("VOILUTFunction", "LINEAR") == "LINEAR" else 1e-6
    pairs = zip(_numbers(shown, "WindowCenter"), _numbers(shown, "WindowWidth"))
    windows = [(center, width) for center, width in pairs if math.isfinite(center) and least <= width < math.inf]
    for name in ("WindowCenter", "WindowWidth"):
        shown.pop(name, None)
    if windows:
        shown.WindowCenter, shown.WindowWidth = windows[0]
    if not shown.get("VOILUTSequence"):
        shown.pop("VOILUTSequence", None)
    return shown


def _rescales(shown) -> bool:
    slopes, offsets = _numbers(shown, "RescaleSlope"), _numbers(shown, "RescaleIntercept")
    return len(slopes) == len(offsets) == 1 and slopes[0] != 0 and math.isfinite(slopes[0] * 65536 + offsets[0])


def _numbers(shown, name: str) -> list[float]:
    value = shown.get(name)
    try:
        return [float(x) for x in (value if hasattr(value, "__iter__") and not isinstance(value, str) else [value])]
    except (TypeError, ValueError):
        return []
