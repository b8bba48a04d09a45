"""A warning where letters may be burned into a clip's frames."""

import numpy as np
from scipy import ndimage

from uscl_hub.clips.crop import sample


def burned_in_text_suspected(frames: np.ndarray) -> bool:
    """Whether static, sharp, letter-sized bright marks stand in lines in uint8 (T, H, W) frames.

    A warning sign, not a proof: text over moving tissue, or in a one-frame clip, can be missed, and markers of a
    scanner reported. Give it cropped frames at full resolution, before the resize.
    """
    frames = sample(frames, 16)
    height, width = frames.shape[1:]
    if min(height, width) < 24:
        return False
    low, high = frames.min(0), frames.max(0)
    tophat = ndimage.white_tophat(low, size=(9, 9)).astype(np.float32)  # strokes, in the darkest moment
    limit = 70 if len(frames) > 1 else 110
    strokes = (tophat > limit) & (high.astype(int) - low < (20 if len(frames) > 1 else 256))  # what is drawn is still
    labels, count = ndimage.label(strokes, np.ones((3, 3)))
    if count < 3 or count > 5000:
        return False
    boxes = [(s[0].start, s[0].stop, s[1].start, s[1].stop) for s in ndimage.find_objects(labels)]
    sizes = np.bincount(labels.ravel())[1:]
    ink = np.zeros(count, int)
    np.maximum.at(ink, labels[strokes] - 1, low[strokes])
    tall = max(30, height // 10)
    letters = [
        (*b, peak)
        for b, n, peak in zip(boxes, sizes, ink)
        if 5 <= b[1] - b[0] <= tall and 1 <= b[3] - b[2] <= 2 * tall and n >= 5
    ]
    letters.sort(key=lambda b: b[2])
    for start in letters:  # letters of about one height and one brightness, on one line, close together
        size, run, end = start[1] - start[0], 1, start[3]
        for other in letters:
            if (
                0 <= other[2] - end <= 1.5 * size
                and abs(other[1] - start[1]) <= max(1, 0.15 * size)
                and 0.5 * size <= other[1] - other[0] <= 1.6 * size
                and abs(other[4] - start[4]) <= 16
            ):
                run, end = run + 1, other[3]
        if run >= 4:
            return True
    return False
