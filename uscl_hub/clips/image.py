"""Frames of pictures, by Pillow: one image, an animation, or a folder of numbered frames."""

import warnings
from pathlib import Path
from typing import Iterator

import numpy as np
from PIL import Image

from uscl_hub.clips.clip import MAX_PIXELS, Clip, UnreadableClip, check_pixels, reason_of
from uscl_hub.preprocess import to_grey


def open_image(path: Path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning: our limit is lower
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise UnreadableClip(path, f"more pixels than the limit of {MAX_PIXELS / 1e6:.1f} million a frame") from error
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile bytes
        raise UnreadableClip(
            path,
            "not an image that Pillow can read"
            if isinstance(error, Image.UnidentifiedImageError)
            else reason_of(error),
        ) from error
    return image


def image_frames(clip: Clip, stride: int, note) -> Iterator[tuple[np.ndarray, float | None]]:
    """Every frame of a gif (an animated webp or multi-page tiff too); the one of any other image."""
    path = clip.files[0]
    with open_image(path) as image:
        try:
            image.verify()  # a png's checksums, which decoding does not look at
        except Exception as error:
            raise UnreadableClip(path, reason_of(error)) from error
    with open_image(path) as image:
        check_pixels(path, *image.size)
        index = 0
        while True:
            try:
                if index == 0:
                    animated = getattr(image, "is_animated", False)  # reads the file
                    duration = image.info.get("duration") if animated else None
                    fps = 1000 / duration if isinstance(duration, (int, float)) and duration > 0 else None
                image.seek(index)
                check_pixels(path, *image.size)
                grey = to_grey(image)
            except EOFError:
                return
            except UnreadableClip:
                raise
            except Exception as error:  # as in open_image
                raise UnreadableClip(
                    path, (f"damaged at frame {index}: " if index else "") + reason_of(error)
                ) from error
            if index % stride == 0:
                yield grey, fps
            index += 1
            if not animated:
                return


def numbered_frames(clip: Clip, stride: int, note) -> Iterator[tuple[np.ndarray, float | None]]:
    for path in clip.files[::stride]:
        for frame in image_frames(Clip(clip.id, clip.source, "image", (path,)), 1, note):
            yield frame[0], None
            break  # one frame a file
