"""The clips of a training: ingested, grouped, labelled and split."""

import numpy as np

from training import config as configs
from training import distributed
from training.data.groups import assign_groups, fingerprint, numbered, split_numbers
from training.data.ingest import ingest
from training.data.simulate import write_demo
from training.messages import say
from uscl_hub.errors import UserError

SIMULATED = "simulated"  # the source's name
SPLITS = ("meta", "val", "train")


class Clips:
    """The frame cache with every clip's group and label, and the clips of each split (arrays of cache indices).

    groups: int32 (clips,), places in group_names, sorted, or, where that is None, every clip for itself; labels: int32
    (clips,), alike for the same label; splits: int8 (clips,), places in SPLITS.
    """

    def __init__(self, cache, config):
        self.cache = cache
        pattern, csv, label = config.data.group, config.data.groups_csv, config.data.label
        self.groups, self.group_names = np.arange(len(cache), dtype=np.int32), None
        if pattern or csv:
            groups = assign_groups(cache.each_id(), pattern or None, csv or None, setting="data.group")
            self.groups, self.group_names = numbered(groups)
        self.labels = cache.source_numbers
        if label:
            self.labels, _ = numbered(assign_groups(cache.each_id(), label, setting="data.label"))
        held_out = config.data.meta_fraction, config.data.val_fraction
        fractions = dict(zip(SPLITS, (*held_out, 1 - sum(held_out))))
        self.splits = split_numbers(self.groups, fractions, config.seed, cache.source_numbers)
        self.meta, self.val, self.train = (np.flatnonzero(self.splits == s) for s in range(len(SPLITS)))
        # what the manifest and the export call a source: a folder's name only where data.licences has it
        self.public = {
            source: source if source in config.data.licences else f"source {i}"
            for i, source in enumerate(cache.source_names, start=1)
        }
        if SIMULATED in self.public and config.data.simulated:
            self.public[SIMULATED] = SIMULATED
        if not config.data.roots:
            self.public = dict.fromkeys(self.public, "simulated")

    def manifest(self):
        """What was trained on, without naming paths: yields a dict a clip."""
        prints = [fingerprint(name) for name in (self.cache.ids if self.group_names is None else self.group_names)]
        public = [self.public[name] for name in self.cache.source_names]
        numbers = (self.groups, self.cache.source_numbers, self.splits, self.cache.lengths)
        for sha, *row in zip(self.cache.sha256, *(values.tolist() for values in numbers)):
            group, source, split, frames = row
            yield {
                "sha256": sha,
                "group": prints[group],
                "source": public[source],
                "split": SPLITS[split],
                "frames": frames,
            }


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
    """Ingest and split. A problem with the data ends the run with a message."""
    roots = config.data.roots
    folders = configs.cache_folders(config, out)
    try:
        if not roots:
            if distributed.rank() == 0 and not (out / "demo").exists():
                say("No data.roots: simulating B-mode clips for the demo")
                write_demo(out / "demo.partial", clips=120, frames=24, size=96, seed=config.seed)
                (out / "demo.partial").rename(out / "demo")
            roots = (str(out / "demo"),)
        if config.data.simulated:
            roots = (*roots, _simulated(config, out))
        cache = ingest(
            roots,
            folders,
            size=config.data.cache_size or round(1.25 * config.model.size),
            crop=config.data.crop,
            max_frames=config.data.max_frames,
            stride=config.data.stride,
            workers=config.data.workers or None,
            min_clips=config.data.min_clips,
            sheets=config.data.sheets,
            frames=config.data.frames,
        )
        clips = Clips(cache, config)
    except (UserError, ValueError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"data: {error}") from error
    counts = ", ".join(f"{len(c)} {n}" for n, c in (("train", clips.train), ("meta", clips.meta), ("val", clips.val)))
    say(f"{len(cache)} clips of {clips.groups.max(initial=-1) + 1} groups: {counts}")
    if len(clips.train) < config.optim.batch:
        raise UserError(
            f"data: {len(clips.train)} training clips do not fill a batch of optim.batch = {config.optim.batch}"
        )
    if len(clips.val) < 2:
        raise UserError("data: validation needs 2 clips; raise data.val_fraction or add clips")
    return clips
