"""Perceptual hashes of frames: alike for the same picture encoded again or resized, unlike for another one."""

import numpy as np
from PIL import Image

FRAMES = 3  # of a clip, evenly spread
SIDE = 16  # of the hash: SIDE**2 bits


def positions(length: int, count: int = FRAMES) -> np.ndarray:
    """Numbers of `count` frames evenly spread over a clip, int, each once."""
    return np.unique(((np.arange(count) + 0.5) / count * length).astype(int))


def frame_hashes(frames: np.ndarray) -> list[str]:
    """Perceptual hashes of frames, SIDE**2 bits in hex, each once.

    Args:
        frames: uint8 (T, H, W); those of a training are cropped and squashed, the size matters little. One that is
            nearly of one colour has no hash: such frames are all alike.
    """
    import imagehash  # here: of what imports this module, few need it

    shown = [frame for frame in frames if frame.std() >= 4]
    return list(dict.fromkeys(str(imagehash.phash(Image.fromarray(frame), SIDE)) for frame in shown))


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """How many bits of the hashes of two frames, uint8 (H, W), differ."""
    import imagehash

    first, second = (imagehash.phash(Image.fromarray(frame), SIDE) for frame in (one, other))
    return int(first - second)


def bits(hashes: list[str]) -> np.ndarray:
    """float32 (N, SIDE**2), +1 and -1: the Hamming distance of two is (SIDE**2 - a @ b) / 2.

    Raises ValueError for a text that is no such hash.
    """
    rows = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in hashes]
    if any(len(row) != SIDE**2 // 8 for row in rows):
        raise ValueError(f"a perceptual hash has {SIDE**2 // 4} hex digits")
    stacked = np.concatenate([np.zeros(0, np.uint8), *rows]).reshape(len(rows), -1 if rows else SIDE**2 // 8)
    return np.unpackbits(stacked, axis=1).astype(np.float32) * 2 - 1
