"""What an export says of the data behind it: hashes of groups, files and frames, and the networks it descends from."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np

from training.data.cache import FrameCache
from training.data.perceptual import frame_hashes, positions


@dataclass(frozen=True)
class DataSource:
    """A folder of clips that a training learned from: its public name, how much it holds, and its licence."""

    name: str
    clips: int
    frames: int
    licence: str


@dataclass(frozen=True)
class Provenance:
    """Where an export's weights come from: `uscl_hub` in its config.json, which also has code, sha256 and created.

    Attributes:
        method: 'simclr', 'uscl', 'meta_uscl' or 'distil'.
        steps: of the training.
        sources: of the clips.
        manifest_sha256: hex, of the run's manifest.json, a line a clip.
        metrics: val_loss, knn and effective_rank of the last validation; None: not measured.
        seed: of the training.
        projector_dim: width of the projection.
        config: the settings that a resumed run must share, by dotted name, without folders.
        parents: provenances of the weights that the training started from, and of its teachers.
        groups: fingerprints of the patients, sorted.
        clips, files, frame_hashes, frame_hashes_of: see `contents`.

    >>> known = Provenance("uscl", 10, [DataSource("lung", 3, 40, "CC BY 4.0")], "ab" * 32, {"knn": None})
    >>> known.as_dict()["sources"]
    [{'name': 'lung', 'clips': 3, 'frames': 40, 'licence': 'CC BY 4.0'}]
    """

    method: str
    steps: int
    sources: list[DataSource]
    manifest_sha256: str
    metrics: dict[str, float | None]
    seed: int = 0
    projector_dim: int = 128
    config: dict[str, object] = field(default_factory=dict)
    parents: list[dict] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    clips: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    frame_hashes: list[list[str]] = field(default_factory=list)
    frame_hashes_of: dict[str, object] = field(default_factory=dict)

    def as_dict(self) -> dict:
        """For JSON; without parents where there are none."""
        return {key: value for key, value in asdict(self).items() if value or key != "parents"}


def contents(cache: FrameCache) -> dict:
    """Hashes by which an evaluation recognises the clips of a cache, none of which names a path.

    Returns:
        clips: SHA-256 of every clip, sorted; files: of every single file of the numbered series among them, sorted;
        frame_hashes: in the order of clips, the perceptual hashes of a few frames of each; frame_hashes_of: how these
        frames were read (crop, stride, max_frames).
    """
    digests = cache.sha256  # a list that is made at each use
    order = np.argsort(digests)
    hashes = []
    for i in order:
        where = positions(int(cache.lengths[i]))
        hashes.append(frame_hashes(cache.take(np.full(1, i), where[None])[0]))
    settings = json.loads((cache.path / "settings.json").read_text(encoding="utf-8"))
    return {
        "clips": [digests[i] for i in order],
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
