"""Contact sheets: pictures to look at, side by side, each with a line of text."""

from typing import Sequence

import numpy as np
from PIL import Image, ImageDraw

from uscl_hub.clips.crop import Region

GAP, LINE = 3, 12  # pixels between pictures, and of a line of text
LETTER = 6  # pixels, of Pillow's own font
DARK, LIGHT, YELLOW = (30, 30, 30), (220, 220, 220), (255, 200, 0)
SIDE = 160  # pixels of the pictures before and after the crop


def tile(pictures: Sequence[Image.Image], text: str = "") -> Image.Image:
    """Pictures side by side; above them a line of text, without its beginning where it is too long."""
    top = LINE if text else 0
    width, height = (sum(p.width + GAP for p in pictures), max(p.height for p in pictures) + top + GAP)
    tile, left = Image.new("RGB", (width, height), DARK), 0
    for picture in pictures:
        tile.paste(picture, (left, top))
        left += picture.width + GAP
    shown = text[-(width // LETTER) :].encode("latin-1", "replace").decode("latin-1")  # what that font has
    ImageDraw.Draw(tile).text((1, 0), shown, fill=LIGHT)
    return tile


def contact_sheet(tiles: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Tiles in rows, each in a place of the largest one's size."""
    width, height = max(t.width for t in tiles), max(t.height for t in tiles)
    sheet = Image.new("RGB", (width * min(columns, len(tiles)), height * -(-len(tiles) // columns)), DARK)
    for i, t in enumerate(tiles):
        sheet.paste(t, (width * (i % columns), height * (i // columns)))
    return sheet


def before_after(name: str, frame: np.ndarray, region: Region, after: np.ndarray) -> Image.Image:
    """What the crop does, as a tile: clip id, a frame uint8 (H, W) with its region, the frame after the crop."""
    before = Image.fromarray(frame).convert("RGB")
    ImageDraw.Draw(before).rectangle(
        (region.left, region.top, region.right - 1, region.bottom - 1),
        outline=YELLOW,
        width=max(1, max(before.size) // 150),
    )
    return tile([_within(picture) for picture in (before, Image.fromarray(np.ascontiguousarray(after)))], name)


def _within(picture: Image.Image) -> Image.Image:
    """In the middle of a square of SIDE pixels, smaller if it must be."""
    picture.thumbnail((SIDE, SIDE))
    square = Image.new("RGB", (SIDE, SIDE), DARK)
    square.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return square
