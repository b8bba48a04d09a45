"""Thumbnails of a feature table."""

import io

import numpy as np
from PIL import Image

from uscl_hub.clips.read import Frames
from uscl_hub.features.table import THUMBNAIL, TableError
from uscl_hub.preprocess import resize


def make_thumbnail(frames: Frames) -> bytes:
    """PNG of a clip's frame after the crop."""
    return to_png(Image.fromarray(resize(np.ascontiguousarray(frames.after), THUMBNAIL)))


def to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def open_thumbnail(png: bytes) -> Image.Image:
    """A table may come from elsewhere: nothing but a small png is opened. Raises TableError."""
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            if max(image.size) > 4 * THUMBNAIL:
                raise ValueError(f"{image.width} x {image.height} pixels")
            return image.convert("L")
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile bytes
        raise TableError(f"the feature table's thumbnails are not those of `uscl-hub embed` ({error})") from error
