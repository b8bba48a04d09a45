"""The labelled files as small grey squares, decoded once and kept in the run's cache."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.evaluation.frames import cached, digest, frame_numbers
from uscl_hub.clips import UnreadableClip
from uscl_hub.clips.decode import decode
from uscl_hub.clips.read import read_clip
from uscl_hub.dataset import read_mask
from uscl_hub.labels import Item, LabelError, Labels
from uscl_hub.preprocess import resize

RATE = 3.0  # frames a second that are taken of a video


@dataclass(frozen=True)
class Pixels:
    """images: uint8 (N, px, px). item: int (N,), the labelled file of every frame. masks: bool (N, px, px), or None.
    key: of everything they depend on."""

    images: np.ndarray
    item: np.ndarray
    masks: np.ndarray | None
    key: str

    @property
    def px(self) -> int:
        return self.images.shape[1]

    def frames_of(self, items: np.ndarray) -> np.ndarray:
        """The frames of some items, int, in order."""
        return np.flatnonzero(np.isin(self.item, items))


def load(found: Labels, px: int, crop: str, cache: Path) -> Pixels:
    """Decode all clips at about RATE frames a second. Raises LabelError for a file or mask that cannot be read."""

    def make():
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders and resizing release the GIL
            if found.task == "segmentation":
                pairs = list(pool.map(lambda item: _pair(item, px), found.items))
                images, masks = (np.stack(part) for part in zip(*pairs))
                return {"images": images, "masks": masks, "item": np.arange(len(pairs))}
            decoded = list(pool.map(lambda item: _frames(item, px, crop), found.items))
        return {"images": np.concatenate(decoded), "item": np.repeat(np.arange(len(decoded)), list(map(len, decoded)))}

    described = ["pixels", found.sha(), px, crop, RATE]
    saved = cached(cache, described, make)
    return Pixels(saved["images"], saved["item"], saved.get("masks"), digest(described))


def _frames(item: Item, px: int, crop: str) -> np.ndarray:
    try:
        frames = read_clip(item.clip, px, crop=crop)
    except UnreadableClip as error:
        raise LabelError(f"{error}. Repair it or leave it out") from error
    return frames.images[frame_numbers(len(frames.images), frames.fps, RATE)]


def _pair(item: Item, px: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask, uint8 and bool (px, px)."""
    try:
        image = decode(item.clip, max_frames=1)[0][0]
    except UnreadableClip as error:
        raise LabelError(f"{error}. Repair it or leave it out") from error
    mask = read_mask(item, image.shape)
    return resize(image, px), resize(mask.astype(np.uint8) * 255, px) > 127
