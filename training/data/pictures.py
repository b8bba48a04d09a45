"""Natural pictures with free licences that scikit-image and scikit-learn ship, cut into tiles: crops for distillation.

Which ones, with their licences: scikit-image's data registry and scikit-learn's datasets/images/README.txt.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from uscl_hub.preprocess import resize, to_grey

SKIMAGE = (  # public domain or CC0
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "moon.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
SKLEARN = ("china.jpg", "flower.jpg")  # CC BY 2.0: danielbuechele and vultilion
LICENCE = "CC0 1.0 and public domain (12 of scikit-image), CC BY 2.0 (2 of scikit-learn)"
DATA = "12 pictures that scikit-image ships, 2 that scikit-learn ships"


def packaged() -> list[Path]:
    """The files of the pictures. Raises ImportError, naming the extra, if a package is missing."""
    try:
        import skimage
        import sklearn
    except ImportError as error:
        raise ImportError("distil.pictures needs scikit-image: pip install -e '.[imagenet]'") from error
    skimage_data = Path(skimage.__file__).parent / "data"
    sklearn_images = Path(sklearn.__file__).parent / "datasets" / "images"
    return [skimage_data / name for name in SKIMAGE] + [sklearn_images / name for name in SKLEARN]


def tiles(files, size) -> np.ndarray:
    """Square tiles of pictures, the whole picture and overlapping quarters of it, uint8 (N, size, size), grey."""
    found = []
    for file in files:
        with Image.open(file) as image:
            grey = to_grey(image)
        for parts in (1, 2, 3):
            side = min(grey.shape) // parts
            if parts > 1 and side < size // 2:
                continue
            rows, columns = (np.linspace(0, length - side, max(1, 2 * parts - 1)) for length in grey.shape)
            for y in rows.astype(int):
                for x in columns.astype(int):
                    found.append(resize(np.ascontiguousarray(grey[y : y + side, x : x + side]), size))
    return np.stack(found)
