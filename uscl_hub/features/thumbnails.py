"""Thumbnails of a feature table, and the contact sheet of `uscl-hub search`."""

import io

import numpy as np
from PIL import Image, ImageDraw

from uscl_hub.clips.read import Frames
from uscl_hub.features.table import THUMBNAIL, TableError
from uscl_hub.preprocess import resize


def make_thumbnail(frames: Frames) -> bytes:
    """PNG of a clip's frame after the crop."""
    buffer = io.BytesIO()
    Image.fromarray(resize(np.ascontiguousarray(frames.after), THUMBNAIL)).save(buffer, "PNG")
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


def contact_sheet(tiles: list[tuple[str, bytes]], columns: int = 4) -> Image.Image:
    """A picture of (caption, png) tiles."""
    cell, margin, caption = 2 * THUMBNAIL, 6, 16
    lines = -(-len(tiles) // columns)
    sheet = Image.new("L", (columns * (cell + margin) + margin, lines * (cell + caption + margin) + margin), 255)
    draw = ImageDraw.Draw(sheet)
    for i, (text, png) in enumerate(tiles):
        x, y = margin + i % columns * (cell + margin), margin + i // columns * (cell + caption + margin)
        sheet.paste(open_thumbnail(png).resize((cell, cell)), (x, y))
        short = text if len(text) <= 30 else text[:8] + "..." + text[-19:]
        draw.text((x, y + cell + 2), short.encode("latin-1", "replace").decode("latin-1"), fill=0)
    return sheet
