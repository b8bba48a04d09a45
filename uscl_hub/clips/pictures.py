"""Contact sheets to check the crop by eye."""

from typing import Iterable

import numpy as np

from uscl_hub.clips.crop import Region


def before_after_sheet(clips: Iterable[tuple[str, np.ndarray, Region, np.ndarray]], path, columns: int = 4):
    """PNG of clip id, a frame uint8 (H, W), its region, and the frame after the crop, side by side."""
    from PIL import Image, ImageDraw

    side, tiles = 160, []
    for name, frame, region, after in clips:
        tile = Image.new("RGB", (2 * side + 6, side + 14), (30, 30, 30))
        before = Image.fromarray(frame).convert("RGB")
        ImageDraw.Draw(before).rectangle(
            (region.left, region.top, region.right - 1, region.bottom - 1),
            outline=(255, 200, 0),
            width=max(1, max(before.size) // 150),
        )
        for x, picture in ((0, before), (side + 3, Image.fromarray(np.ascontiguousarray(after)))):
            picture.thumbnail((side, side))
            tile.paste(picture, (x, 12))
        ImageDraw.Draw(tile).text((2, 0), name[-52:], fill=(220, 220, 220))
        tiles.append(tile)
    if not tiles:
        return
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * tiles[0].width, rows * tiles[0].height))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * tile.width, i // columns * tile.height))
    sheet.save(path)
