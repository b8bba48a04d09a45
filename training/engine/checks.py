"""Refuse settings that cannot work before anything is decoded."""

import difflib
import math
import sys
from operator import attrgetter
from pathlib import Path

import timm

from training import distributed
from training.engine import export

TINY = 1e-6
RANGES = {  # of the numbers that a user may get wrong
    "save_every": (1, math.inf),
    "eval_epochs": (1, math.inf),
    "data.cache_size": (0, math.inf),
    "data.max_frames": (1, math.inf),
    "data.workers": (0, math.inf),
    "data.meta_fraction": (TINY, 1),
    "data.val_fraction": (TINY, 1),
    "pairs.frames": (1, math.inf),
    "pairs.max_dist": (1, math.inf),
    "pairs.alpha": (TINY, math.inf),
    "pairs.beta": (TINY, math.inf),
    "pairs.jitter": (0, 1),
    "pairs.flip": (0, 1),
    "model.size": (1, math.inf),
    "model.dim": (1, math.inf),
    "meta.lr": (0, math.inf),
    "meta.batch": (0, math.inf),
    "meta.hidden": (1, math.inf),
    "meta.every": (1, math.inf),
    "optim.batch": (2, math.inf),
    "optim.epochs": (1, math.inf),
    "optim.steps": (0, math.inf),
    "optim.lr": (0, math.inf),
    "optim.warmup_epochs": (0, math.inf),
    "optim.momentum": (0, 1),
    "optim.weight_decay": (0, math.inf),
    "optim.temperature": (TINY, math.inf),
}


def check(config):
    """Refuse settings that cannot work before anything is decoded."""
    for name, choices in (
        ("method", ("simclr", "uscl", "meta_uscl")),
        ("precision", ("fp32", "bf16")),
        ("data.crop", ("crop", "blank", "none")),
        ("pairs.mode", ("standard", "inner")),
        ("meta.tangent", ("exact", "difference")),
    ):
        value = attrgetter(name)(config)
        if value not in choices:
            sys.exit(f"{name}: one of {', '.join(choices)}, not {value!r}")
    if config.meta.shuffle and (config.meta.delayed or config.meta.every > 1):
        sys.exit("meta.shuffle: a control of the exact step; leave meta.delayed at False and meta.every at 1")
    for name, (low, high) in RANGES.items():
        value = attrgetter(name)(config)
        if not low <= value <= high:  # also a NaN
            sys.exit(f"{name} must be at least {low}{'' if high == math.inf else f' and at most {high}'}, got {value}")
    for name, high in (("pairs.crop_scale", 1), ("pairs.crop_ratio", math.inf)):
        low, top = attrgetter(name)(config)
        if not 0 < low <= top <= high:
            sys.exit(
                f"{name}: the smallest, then the largest, above 0{' and at most 1' * (high == 1)}; got {low} {top}"
            )
    world = distributed.world()
    for name in ("optim.batch", "meta.batch"):
        value = attrgetter(name)(config)
        if value % world:
            sys.exit(f"{name} = {value} must be a multiple of the {world} processes")
    name = config.model.name
    if not timm.is_model(export.architecture(name)):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        sys.exit(f"model.name: timm has no {name!r}{'; near it: ' * bool(near)}{', '.join(near)}")
    missing = [root for root in config.data.roots if not Path(root).exists()]
    if missing:
        sys.exit(f"data.roots: no such folder: {', '.join(missing)}")
