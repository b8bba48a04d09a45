"""Refuse settings that cannot work before anything is decoded."""

import difflib
from operator import attrgetter

import timm

from training import distributed
from training.config import training_pairs
from uscl_hub.errors import UserError
from uscl_hub.files import existing
from uscl_hub.registry import plain_name

TINY = 1e-6
ADAMW_LR = 0.05  # no training goes well above it
RANGES = {  # of the numbers that a user may get wrong; the upper ends are beyond any use
    "seed": (0, 2**32),
    "save_every": (1, 10**9),
    "eval_epochs": (1, 10**9),
    "data.cache_size": (0, 4096),
    "data.max_frames": (1, 10**6),
    "data.min_clips": (0, 10**9),
    "data.workers": (0, 1024),
    "data.simulated": (0, 10**6),
    "data.stride": (1, 10_000),
    "data.balance": (0, 1),
    "data.meta_fraction": (TINY, 1),
    "data.val_fraction": (TINY, 1),
    "pairs.frames": (1, 1000),
    "pairs.max_dist": (1, 10**6),
    "pairs.alpha": (TINY, 1000),
    "pairs.beta": (TINY, 1000),
    "pairs.jitter": (0, 1),
    "pairs.flip": (0, 1),
    "pairs.rotate": (0, 180),
    "pairs.max_seconds": (0, 10**6),
    "pairs.corrupt": (0, 1),
    "pairs.corrupt_often": (0, 1),
    "model.hold": (0, 100),
    "model.size": (1, 4096),
    "model.dim": (1, 2**16),
    "distil.weight": (0, 10**6),
    "distil.size": (8, 4096),
    "distil.components": (1, 100_000),
    "distil.dense": (0, 10**6),
    "distil.batch": (0, 10**6),
    "distil.lr": (0, 1000),
    "distil.mixup": (0, 1),
    "distil.pictures": (0, 1),
    "distil.round": (0, 10**7),
    "distil.passes": (1, 10_000),
    "meta.lr": (0, 1000),
    "meta.batch": (0, 2**20),
    "meta.hidden": (1, 2**20),
    "meta.every": (1, 10**9),
    "meta.depth": (0, 100),
    "meta.warmup": (0, 0.9),
    "optim.batch": (2, 2**20),
    "optim.epochs": (1, 10**6),
    "optim.steps": (0, 10**9),
    "optim.lr": (0, 10**6),
    "optim.warmup_epochs": (0, 10**6),
    "optim.momentum": (0, 1),
    "optim.weight_decay": (0, 1000),
    "optim.temperature": (TINY, 1000),
}


def check(config):
    """Refuse settings that cannot work before anything is decoded."""
    for name, choices in (
        ("method", ("simclr", "uscl", "meta_uscl", "distil")),
        ("precision", ("fp32", "bf16")),
        ("data.crop", ("crop", "blank", "none")),
        ("pairs.mode", ("standard", "inner")),
        ("meta.tangent", ("exact", "difference")),
        ("meta.input", ("representation", "statistics")),
        ("loss.weights", ("uniform", "distance")),
    ):
        value = attrgetter(name)(config)
        if value not in choices:
            raise UserError(f"{name}: one of {', '.join(choices)}, not {value!r}")
    if config.meta.batch == 1:
        raise UserError("meta.batch must be at least 2: with one clean pair there is no negative; 0: as optim.batch")
    if config.meta.shuffle and (config.meta.delayed or config.meta.every > 1):
        raise UserError("meta.shuffle: a control of the exact step; leave meta.delayed at False and meta.every at 1")
    if config.method == "meta_uscl" and config.meta.tangent == "difference" and config.precision == "bf16":
        raise UserError("meta.tangent difference: bf16 rounds its small steps away; take --precision fp32, or 'exact'")
    if config.model.init and config.model.pretrained:
        raise UserError("model.init and model.pretrained both name weights to start from; leave one of them out")
    if config.method == "distil" and config.optim.lr > ADAMW_LR:
        raise UserError(
            f"optim.lr {config.optim.lr:g} is too much for AdamW, which method distil takes: at most {ADAMW_LR}; "
            "training/distil.py starts from 2e-3"
        )
    if config.loss.weights != "uniform" and config.method != "uscl":
        raise UserError(f"loss.weights {config.loss.weights}: for method uscl only, not {config.method}")
    if config.pairs.corrupt and (config.method == "distil" or training_pairs(config).frames < 2):
        raise UserError("pairs.corrupt: takes method uscl or meta_uscl, and pairs.frames of at least 2")
    for name, (low, high) in RANGES.items():
        value = attrgetter(name)(config)
        if not low <= value <= high:  # also a NaN
            raise UserError(f"{name} must be at least {low} and at most {high}, got {value}")
    for name, high in (("pairs.crop_scale", 1), ("pairs.crop_ratio", 1000), ("distil.scale", 1)):
        low, top = attrgetter(name)(config)
        if not 0 < low <= top <= high:
            raise UserError(f"{name}: the smallest, then the largest, above 0 and at most {high}; got {low} {top}")
    world = distributed.world()
    for name in ("optim.batch", "meta.batch", "distil.batch"):
        value = attrgetter(name)(config)
        if value % world:
            raise UserError(f"{name} = {value} must be a multiple of the {world} processes")
    name = config.model.name
    if not timm.is_model(plain_name(name)):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UserError(f"model.name: timm has no {name!r}{'; near it: ' * bool(near)}{', '.join(near)}")
    missing = [root for root in config.data.roots if existing(root) is None]
    if missing:
        raise UserError(f"data.roots: no such folder: {', '.join(missing)}")
