"""Are numbered pictures of one folder the frames of one clip? By how alike neighbours look.

Measured as here (the median correlation of neighbours' thumbnails) on public data, folder by folder:

    frames of one clip                      least   median     separate images            median    most
    carotid_splab, 100 folders              0.80    0.99       BUS-UC, 2 classes          0.36      0.38
    phantom_plus, 3 sweeps                  1.00    1.00       MMOTU ovary, 8 classes     0.56      0.71

Those of BUSI and DL_Track differ in size, so that they are separate images whatever they look like.
"""

from pathlib import Path
from typing import Sequence

import numpy as np
from PIL import Image

from uscl_hub.clips.clip import check_pixels
from uscl_hub.clips.image import has_frames, open_image
from uscl_hub.clips.quiet import quiet

ALIKE = 0.75  # the median correlation from which neighbours are frames of one clip
_PAIRS = 8  # looked at, evenly spread
_THUMBNAIL = 32  # pixels


def headers(files: Sequence[Path]) -> tuple[set[tuple[int, int]], int]:
    """The sizes of some pictures, and the largest number of pages or frames (2 stands for more). Unreadable ones say
    nothing here: decoding reports them."""
    sizes, pages = set(), 1
    for path in files:
        try:
            with open_image(path) as image:
                sizes.add(image.size)
                pages = max(pages, 1 + has_frames(image))
        except Exception:  # noqa: BLE001 - see above
            continue
    return sizes, pages


def likeness(files: Sequence[Path]) -> float:
    """Median correlation of the thumbnails of a few neighbours among numbered pictures; 1 if none can be read."""
    found = []
    for i in sorted({round(x) for x in np.linspace(0, len(files) - 2, _PAIRS)}):
        try:
            found.append(_correlation(_thumbnail(files[i]), _thumbnail(files[i + 1])))
        except Exception:  # noqa: BLE001 - an unreadable picture says nothing here: decoding reports it
            continue
    return float(np.median(found)) if found else 1.0


def _thumbnail(path: Path) -> np.ndarray:
    with quiet(), open_image(path) as image:
        check_pixels(path, *image.size)
        image.draft("L", (2 * _THUMBNAIL, 2 * _THUMBNAIL))  # a jpg is decoded at an eighth of its size
        grey = image if image.mode.startswith(("I", "F")) else image.convert("L")
        array = np.asarray(grey, np.float32)
    return np.asarray(Image.fromarray(array).resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of two thumbnails; two flat ones are alike."""
    a, b = a - a.mean(), b - b.mean()
    flat = [float(np.abs(x).max()) < 1e-3 for x in (a, b)]
    if any(flat):
        return float(all(flat))
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
