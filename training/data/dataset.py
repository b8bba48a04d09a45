"""The clips of a training: ingested, grouped, labelled and split."""

from pathlib import Path

import numpy as np

from training import distributed
from training.data.groups import assign_groups, fingerprint, split_groups
from training.data.ingest import ingest
from training.data.simulate import write_demo
from training.messages import say
from uscl_hub.errors import UserError

SIMULATED = "simulated"  # the source's name


class Clips:
    """The frame cache with every clip's group and label, and the clips of each split (arrays of cache indices)."""

    def __init__(self, cache, config):
        self.cache = cache
        groups, csv, labels = config.data.group, config.data.groups_csv, config.data.label
        self.groups = assign_groups(cache.ids, groups or None, csv or None, setting="data.group")
        self.labels = np.array(assign_groups(cache.ids, labels, setting="data.label") if labels else cache.sources)
        fractions = {"meta": config.data.meta_fraction, "val": config.data.val_fraction}
        fractions["train"] = 1 - sum(fractions.values())
        self.splits = np.array(split_groups(self.groups, fractions, config.seed, cache.sources))
        self.train, self.meta, self.val = (np.flatnonzero(self.splits == s) for s in ("train", "meta", "val"))
        # what the manifest and the export call a source: a folder's name only where data.licences has it
        self.public = {
            source: source if source in config.data.licences else f"source {i}"
            for i, source in enumerate(sorted(set(cache.sources)), start=1)
        }
        if SIMULATED in self.public and config.data.simulated:
            self.public[SIMULATED] = SIMULATED
        if not config.data.roots:
            self.public = dict.fromkeys(self.public, "simulated")

    def manifest(self):
        """What was trained on, without naming paths: one dict a clip."""
        return [
            {
                "sha256": sha,
                "group": fingerprint(group),
                "source": self.public[source],
                "split": str(split),
                "frames": int(frames),
            }
            for sha, group, source, split, frames in zip(
                self.cache.sha256, self.groups, self.cache.sources, self.splits, self.cache.lengths
            )
        ]


def _simulated(config, out):
    """The folder of data.simulated clips, made once. Its parent's name tells how many there are."""
    folder = out / f"simulated_{config.data.simulated}" / SIMULATED
    if distributed.rank() == 0 and not folder.exists():
        say(f"simulating {config.data.simulated} B-mode clips")
        partial = folder.with_name("partial")
        write_demo(partial, clips=config.data.simulated, frames=8, size=256, seed=config.seed)
        partial.rename(folder)
    return str(folder)


def prepare(config, out):
    """Ingest (rank 0) and split. A problem with the data ends the run with a message."""
    roots = config.data.roots
    folder = Path(config.data.cache or out / "cache")
    try:
        if not roots:
            if distributed.rank() == 0 and not (out / "demo").exists():
                say("No data.roots: simulating B-mode clips for the demo")
                write_demo(out / "demo.partial", clips=120, frames=24, size=96, seed=config.seed)
                (out / "demo.partial").rename(out / "demo")
            roots = (str(out / "demo"),)
        if config.data.simulated:
            roots = (*roots, _simulated(config, out))
        cache = None
        if distributed.rank() == 0:
            cache = ingest(
                roots,
                folder,
                size=config.data.cache_size or round(1.25 * config.model.size),
                crop=config.data.crop,
                max_frames=config.data.max_frames,
                stride=config.data.stride,
                workers=config.data.workers or None,
                min_clips=config.data.min_clips,
                sheets=config.data.sheets,
                frames=config.data.frames,
            )
        cache = distributed.broadcast(cache)
        clips = Clips(cache, config)
    except (UserError, ValueError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"data: {error}") from error
    counts = ", ".join(f"{len(c)} {n}" for n, c in (("train", clips.train), ("meta", clips.meta), ("val", clips.val)))
    say(f"{len(cache)} clips of {len(set(clips.groups))} groups: {counts}")
    if len(clips.train) < config.optim.batch:
        raise UserError(
            f"data: {len(clips.train)} training clips do not fill a batch of optim.batch = {config.optim.batch}"
        )
    if len(clips.val) < 2:
        raise UserError("data: validation needs 2 clips; raise data.val_fraction or add clips")
    return clips
