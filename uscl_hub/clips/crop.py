"""Find the moving ultrasound image in a clip; crop or blank the scanner's static screen around it.

Tissue under a hand-held probe and electronic noise change from frame to frame; a scanner's user interface, burned-in
text, calipers and borders do not. The temporal variation therefore separates them. Where it does not (a still image,
a nearly still clip, a filmed screen) the region falls back to what is not black, or to the whole frame: tissue is
never given up to be rid of text.
"""

import math
from dataclasses import dataclass
from typing import Sequence

import numpy as np
from scipy import ndimage

SAMPLES = 32  # frames looked at, evenly spread over the clip
_WORKING = 320  # pixels of the longer side of the map on which the region is found
_BRIGHT = 24  # grey levels from which something static is worth removing


@dataclass(frozen=True)
class Region:
    """Pixels of rows top:bottom and columns left:right. mask: bool (H, W) of the whole frame, True inside the image
    area; None if everything in the box belongs to it."""

    top: int
    bottom: int
    left: int
    right: int
    mask: np.ndarray | None = None

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.top, self.bottom, self.left, self.right


def sample(frames: Sequence[np.ndarray] | np.ndarray, count: int = SAMPLES) -> np.ndarray:
    """uint8 (min(T, count), H, W): evenly spread frames, first and last among them."""
    picks = np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int))
    return np.stack([frames[i] for i in picks])


def detect_region(frames: np.ndarray) -> Region:
    """The image area of a clip, uint8 (T, H, W). Deterministic; the whole frame where it is not sure.

    From the temporal variation for two frames or more, else (or if hardly anything moves) from what is not black.
    """
    if frames.dtype != np.uint8 or frames.ndim != 3 or not frames.size:
        raise ValueError(f"detect_region expects uint8 (T, H, W) frames, got {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:]
    whole = Region(0, height, 0, width)
    if min(height, width) < 16:
        return whole
    frames = sample(frames)
    step = -(-max(height, width) // _WORKING)
    content, level = _shrink(frames, step)
    area, margin = (_moving_area(content, level) if len(frames) > 1 else None), 0
    if area is None:
        area, margin = _lit_area(content), 1
    else:
        area |= _still_tissue(area, content)
    if area is None:
        return whole
    rows, columns = np.flatnonzero(area.any(1)), np.flatnonzero(area.any(0))
    top, bottom = max(0, rows[0] - margin) * step, min(height, (rows[-1] + 1 + margin) * step)
    left, right = max(0, columns[0] - margin) * step, min(width, (columns[-1] + 1 + margin) * step)
    outside = content.copy()
    outside[top // step : -(-bottom // step), left // step : -(-right // step)] = 0
    mask = _mask(area, content, step, (height, width), (top, bottom, left, right))
    if mask is None and outside.max() <= _BRIGHT and (bottom - top) * (right - left) > 0.7 * height * width:
        return whole  # nothing to be rid of: a shadow at the edge of an image cropped before is not a border
    return Region(int(top), int(bottom), int(left), int(right), mask)


def apply_region(frames: np.ndarray, region: Region, mode: str = "crop") -> np.ndarray:
    """frames: uint8 (..., H, W). 'crop': the box alone, black where the box holds static parts of the screen
    beside the image area; 'blank': the whole frame, black outside the image area; 'none': unchanged."""
    if mode == "none":
        return frames
    if mode not in ("crop", "blank"):
        raise ValueError(f"crop mode {mode!r} is not 'crop', 'blank' or 'none'")
    box = (..., slice(region.top, region.bottom), slice(region.left, region.right))
    inside = frames[box] if region.mask is None else frames[box] * region.mask[box[1:]]
    if mode == "crop":
        return inside
    out = np.zeros_like(frames)
    out[box] = inside
    return out


def _shrink(frames: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean brightness (h, w) and frames (T, h, w), float32, by blocks of step x step (the last ones may be cut)."""
    t, height, width = frames.shape
    h, w = -(-height // step), -(-width // step)
    if (h * step, w * step) != (height, width):
        frames = np.pad(frames, ((0, 0), (0, h * step - height), (0, w * step - width)), mode="edge")
    small, mean = np.zeros((t, h, w), np.float32), np.zeros((h, w), np.float32)
    for frame, out in zip(frames, small):  # frame by frame all stays in the processor's cache
        blocks = frame.reshape(h, step, w, step)
        for i in range(step):  # slice by slice, 10 times as fast as blocks.mean((1, 3))
            for j in range(step):
                out += blocks[:, i, :, j]
        out /= np.float32(step**2)
        mean += out
    return mean / np.float32(t), small


def _variation(mean: np.ndarray, level: np.ndarray) -> np.ndarray:
    """float32 (h, w): mean absolute change from frame to frame, plus standard deviation. mean, level: of `_shrink`."""
    change, square, rest = np.zeros_like(mean), np.zeros_like(mean), np.empty_like(mean)
    for before, after in zip([level[0], *level], level):
        change += np.abs(np.subtract(after, before, out=rest), out=rest)
        np.subtract(after, mean, out=rest)
        square += np.multiply(rest, rest, out=rest)
    return change / np.float32(len(level) - 1) + np.sqrt(square / np.float32(len(level)))


def _moving_area(content: np.ndarray, level: np.ndarray) -> np.ndarray | None:
    """bool (h, w), or None if too little moves. content, level: as `_shrink` returns them."""
    h, w = content.shape
    variation = _variation(content, level)
    # echoes vary by several grey levels over a patch, a static screen (98 % of its pixels, in compressed videos of
    # five makers) by less than 0.6
    patch = max(3, round(max(h, w) / 64) | 1)
    smooth = ndimage.uniform_filter(variation, patch)
    strong = np.percentile(smooth, 98)
    if strong < 2.0:
        return None
    moving = smooth > max(0.8, 0.03 * strong)  # the more that moves, the more a compressed video ripples
    reach = max(2, round(max(h, w) / 40))
    moving = ndimage.binary_opening(moving, iterations=1)
    moving = _closing(moving, reach)
    labels, count = ndimage.label(moving)
    if count == 0:
        return None
    sizes = np.bincount(labels.ravel())[1:]
    if sizes.max() < 0.03 * h * w:
        return None
    # a clock, a heart-rate trace or a film's progress bar also moves, but is small
    keep = np.flatnonzero(sizes >= 0.10 * sizes.max()) + 1
    area = np.isin(labels, keep)
    return ndimage.binary_fill_holes(area)


def _still_tissue(area: np.ndarray, content: np.ndarray) -> np.ndarray:
    """bool (h, w): lit pieces that touch the convex hull of the moving area and are small beside it, such as the
    corner of a sector where nothing happens. A panel of the user interface is large, a line or a word thin."""
    hull = _hull(area)
    beside = ndimage.binary_opening(content > 12, iterations=2) & ~hull
    labels, count = ndimage.label(beside)
    if count == 0:
        return beside
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    touching = np.unique(labels[ndimage.binary_dilation(hull, iterations=2)])
    small = [piece for piece in touching if piece and sizes[piece] <= 0.06 * hull.sum()]
    return np.isin(labels, small)


def _lit_area(content: np.ndarray) -> np.ndarray | None:
    """bool (h, w) of the largest area that is not black, or None if it is unclear. content: mean brightness (h, w)."""
    h, w = content.shape
    lit = content > 8
    lit = ndimage.binary_opening(lit, iterations=2)  # letters and lines are thin
    lit = _closing(lit, max(2, round(max(h, w) / 40)))
    labels, count = ndimage.label(lit)
    if count == 0:
        return None
    sizes = np.bincount(labels.ravel())[1:]
    if sizes.max() < 0.10 * h * w:
        return None
    keep = np.flatnonzero(sizes >= 0.10 * sizes.max()) + 1
    return ndimage.binary_fill_holes(np.isin(labels, keep))


def _closing(mask: np.ndarray, reach: int) -> np.ndarray:
    """Binary closing with a disc, by distances; the frame's border counts as outside only after the fact."""
    padded = np.pad(mask, reach + 1)
    return ~_grown(~_grown(padded, reach), reach)[reach + 1 : -reach - 1, reach + 1 : -reach - 1] | mask


def _grown(mask: np.ndarray, reach: int) -> np.ndarray:
    """Binary dilation with a disc: what lies at most `reach` pixels from the mask. Row by row of the disc, several
    times as fast as a distance transform."""
    height, width = mask.shape
    before = np.zeros((height, width + 1), np.int32)  # how many are set to the left of each column
    np.cumsum(mask, axis=1, out=before[:, 1:])
    columns, grown = np.arange(width), np.zeros_like(mask)
    for dy in range(min(reach, height - 1) + 1):
        half = math.isqrt(reach**2 - dy**2)
        wide = before[:, np.minimum(columns + half + 1, width)] > before[:, np.maximum(columns - half, 0)]
        grown[dy:] |= wide[: height - dy]
        grown[: height - dy] |= wide[dy:]
    return grown


def _mask(area, content, step, shape, box) -> np.ndarray | None:
    """The convex hull of the area, if something bright lies in the box but outside of it."""
    hull = _hull(ndimage.binary_dilation(area, iterations=2))
    top, bottom, left, right = (x // step for x in (box[0], box[1] + step - 1, box[2], box[3] + step - 1))
    outside = ~hull[top:bottom, left:right]
    if not (content[top:bottom, left:right][outside] > _BRIGHT).any():
        return None
    return np.repeat(np.repeat(hull, step, 0), step, 1)[: shape[0], : shape[1]]


def _hull(area: np.ndarray) -> np.ndarray:
    """Filled convex hull of a bool (h, w) map."""
    from scipy.spatial import ConvexHull, QhullError

    rows = np.flatnonzero(area.any(1))
    first = area[rows].argmax(1)
    last = area.shape[1] - 1 - area[rows, ::-1].argmax(1)
    points = np.concatenate([np.stack([rows, first], 1), np.stack([rows, last], 1)])
    try:
        a, b, c = ConvexHull(points).equations.T  # inside, and up to half a pixel outside: a y + b x + c <= 0.5
    except QhullError:  # a line or a point
        return area
    with np.errstate(divide="ignore"):  # an edge along a row bounds no column: infinity
        bounds = (0.5 - c - a * np.arange(len(area))[:, None]) / b
    from_left, x = np.signbit(b), np.arange(area.shape[1])
    first = np.where(from_left, bounds, -np.inf).max(1, keepdims=True)
    last = np.where(from_left, np.inf, bounds).min(1, keepdims=True)
    return (x >= first) & (x <= last)
