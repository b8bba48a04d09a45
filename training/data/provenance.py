"""What an export says of the data behind it: hashes of groups, files and frames, and the networks it descends from."""

import json
from collections.abc import Iterator

import numpy as np

from training.data.cache import FrameCache
from training.data.perceptual import frame_hashes, positions


def contents(cache: FrameCache) -> dict:
    """Hashes by which an evaluation recognises the clips of a cache, none of which names a path.

    Returns:
        clips: SHA-256 of every clip, sorted; files: of every single file of the numbered series among them, sorted;
        frame_hashes: in the order of clips, the perceptual hashes of a few frames of each; frame_hashes_of: how these
        frames were read (crop, stride, max_frames).
    """
    order = np.argsort(cache.sha256)
    hashes = []
    for i in order:
        where = positions(int(cache.lengths[i]))
        hashes.append(frame_hashes(cache.take(np.full(1, i), where[None])[0]))
    settings = json.loads((cache.path / "settings.json").read_text(encoding="utf-8"))
    return {
        "clips": [cache.sha256[i] for i in order],
        "files": sorted({file for files in cache.files for file in files}),
        "frame_hashes": hashes,
        "frame_hashes_of": {key: settings.get(key) for key in ("crop", "stride", "max_frames")},
    }


def chain(provenance: dict | None) -> Iterator[dict]:
    """A provenance, and those of the networks that it started from or learned from (`parents`), and theirs."""
    waiting = [provenance] if isinstance(provenance, dict) else []
    while waiting:
        known = waiting.pop(0)
        yield known
        parents = known.get("parents")
        waiting += [parent for parent in parents if isinstance(parent, dict)] if isinstance(parents, list) else []
