"""Frames of pictures, by Pillow: one image, an animation or pages, or a folder of numbered files."""

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import numpy as np
from PIL import Image, ImageOps

from uscl_hub.clips.clip import (
    DEPTHS,
    MAX_PIXELS,
    PICTURE_FORMATS,
    Clip,
    UnreadableClip,
    check_pixels,
    extension_of,
    opened,
    reason_of,
)
from uscl_hub.clips.quiet import quiet
from uscl_hub.preprocess import to_grey

ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
SEVERAL = {".png", ".apng", ".tif", ".tiff", ".webp"}  # extensions of pictures that `has_frames` may be true of


@contextmanager
def open_image(path: Path, formats=None) -> Iterator[Image.Image]:
    """A picture of the formats that its name may mean, `formats` or by its extension; Pillow has not decoded it yet.

    Raises UnreadableClip, OSError.
    """
    formats = formats or PICTURE_FORMATS.get(extension_of(path), ())
    with opened(path) as file:  # by a name, Pillow maps files into memory, and turned ones (EXIF) wrongly
        try:
            with quiet():  # Pillow's own bomb warning: our limit is lower
                image = Image.open(file, formats=formats)
        except Image.DecompressionBombError as error:
            limit = f"{MAX_PIXELS / 1e6:.1f} million a frame"
            raise UnreadableClip(path, f"more pixels than the limit of {limit}") from error
        except Image.UnidentifiedImageError as error:
            raise UnreadableClip(path, f"not a {' or '.join(formats)} picture, which its name says it is") from error
        except Exception as error:  # Pillow's parsers raise nearly anything on hostile bytes
            raise UnreadableClip(path, reason_of(error)) from error
        with image:
            yield image


def has_frames(image: Image.Image) -> bool:
    """Whether it is an animation or has several pages; reads the file. A camera's jpg with a preview or a depth map in
    it (MPO) is one picture."""
    return image.format != "MPO" and bool(getattr(image, "is_animated", False))


def image_frames(clip: Clip, stride: int, note) -> Iterator[tuple[np.ndarray, float | None, float | None]]:
    """Every frame of an animation, every page of a tif, the one frame of any other image; upright, as EXIF has it."""
    path = clip.files[0]
    top = _top([path], note)
    for index, (grey, fps, time) in enumerate(_pages(path, top, note)):
        if index % stride == 0:
            yield grey, fps, time


def numbered_frames(clip: Clip, stride: int, note) -> Iterator[tuple[np.ndarray, float | None, float | None]]:
    """The first frame of each file."""
    top = _top(clip.files, note)
    for path in clip.files[::stride]:
        for grey, _, _ in _pages(path, top, note, first=True):
            yield grey, None, None


def _pages(path: Path, top: int, note, first: bool = False):
    """Yields grey, frames per second, seconds since the first frame."""
    with open_image(path) as image:
        try:
            image.verify()  # a png's checksums, which decoding does not look at
        except Exception as error:
            raise UnreadableClip(path, reason_of(error)) from error
    with open_image(path) as image:
        check_pixels(path, *image.size)
        index = 0
        time: float | None = 0.0
        fps: float | None = None
        while True:
            try:
                if index == 0:
                    animated = has_frames(image)
                    if animated and first:
                        note("files of several pages or frames among numbered ones: only the first frame of each")
                image.seek(index)
                check_pixels(path, *image.size)
                image.load()
                grey = _grey(image, top)
                duration = image.info.get("duration") if animated else None  # webp knows it only now
            except EOFError:
                return
            except UnreadableClip:
                raise
            except Exception as error:  # as in open_image
                where = f"damaged at frame {index}: " if index else ""
                raise UnreadableClip(path, where + reason_of(error)) from error
            seconds = duration / 1000 if isinstance(duration, (int, float)) and duration > 0 else None
            if index == 0 and duration is not None and seconds is not None:
                fps = 1000 / duration
            yield grey, fps, time
            time = None if time is None or seconds is None else time + seconds
            index += 1
            if not animated or first:
                return


def _grey(image: Image.Image, top: int) -> np.ndarray:
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        array = np.array(image)
        if array.min() >= 0 and array.max() <= 65535:
            return np.rint(array.clip(0, top) * (255 / top)).astype(np.uint8)
    return to_grey(image)


def _top(files, note) -> int:
    """The value shown as white in grey pictures of 16 bits: the full 65535, or less if no frame needs that many bits.

    One for the whole clip, so that brightness does not jump from frame to frame.
    """
    highest = 0
    for path in files:
        try:
            with open_image(path) as image:
                if not image.mode.startswith("I"):
                    return 65535
                check_pixels(path, *image.size)
                for index in range(getattr(image, "n_frames", 1)):
                    image.seek(index)
                    check_pixels(path, *image.size)
                    highest = max(highest, int(np.array(image).max()))
        except Exception:  # noqa: BLE001 - decoding, which comes next, says what is wrong with the file
            return 65535
    for bits in DEPTHS:
        if highest < 2**bits:
            note(f"its 16 bits hold values of {bits} bits: shown with {2**bits - 1} as white")
            return 2**bits - 1
    return 65535
