"""CMW-Net's gradient when it is made cheaper: what it costs, and where it points."""

import copy
import itertools
import statistics
from functools import partial

import numpy as np
import torch

from training import config as configs
from training.benchmarks.data import load_batches
from training.benchmarks.measure import Row, clip_folder, quietly, ratio, spent, take_turns
from training.benchmarks.steps import meta, plain, problem
from training.data.ingest import ingest
from training.method.networks import input_channels
from training.method.step import delayed_step

EVERY = 1, 2, 4
STEP, SETTLED = 10, 2  # gradients are compared at every tenth step; the first two comparisons are of a fresh network
WAYS = {
    "exact": meta,
    "exact, half the clean pairs": partial(meta, clean=0.5),
    "delayed": partial(meta, step=delayed_step),
    "depth 2": partial(meta, depth=2),
    "depth 1": partial(meta, depth=1),
    "depth 1, half the clean pairs": partial(meta, depth=1, clean=0.5),
    "depth 1, a quarter of the clean pairs": partial(meta, depth=1, clean=0.25),
    "depth 1, delayed": partial(meta, step=delayed_step, depth=1),
}


def costs(settings, device, folder):
    """Rows: each way's cost over a plain step, with CMW-Net's update at every k-th step, and its cosine to exact."""
    px = settings.sizes[0]
    p = problem("exact", settings, px, device)
    functions = {"plain": partial(plain, p), **{name: partial(way, p) for name, way in WAYS.items()}}
    seconds = take_turns(functions, settings, device)
    others = {name: way for name, way in WAYS.items() if name != "exact"}
    found = cosines(others, settings, device, folder)
    for name in WAYS:
        cost = ratio(seconds, name, "plain")
        at = {k: None if cost is None else (cost + k - 1) / k for k in EVERY}
        note = ", ".join(f"every {k}: {value:.3g}" for k, value in at.items() if k > 1 and value is not None)
        yield Row("meta", f"{name} / plain", px, cost, "", f"{note}; {spent(seconds, name)}")
        if name in found:
            yield Row("meta", f"{name}, cosine to exact", px, *direction(found[name]))


def direction(values):
    """The median cosine from step STEP x SETTLED on, no goal, and a note with the others."""
    first, later = values[:SETTLED], values[SETTLED:]
    note = f"median of {len(later)} from step {STEP * SETTLED} on, lowest {min(later):.4f}; before: "
    return statistics.median(later), "", note + ", ".join(f"{c:.4f}" for c in first)


def accuracy(settings, device, folder):
    """Early steps are sensitive to rounding; later ones have the goals."""
    ways = {"bf16": partial(meta, bf16=True), "difference": partial(meta, tangent="difference")}
    goals = {"bf16": ">= 0.99", "difference": ">= 0.999"}
    for name, values in cosines(ways, settings, device, folder).items():
        value, _, note = direction(values)
        yield Row("accuracy", f"{name}, cosine to exact float32", settings.sizes[0], value, goals[name], note)


def cosines(ways, settings, device, folder):
    """Cosines of the ways' gradients to the exact one, lists by name, along an exact training on clips."""
    px, number = settings.sizes[0], itertools.count()
    while (out := folder / f"cosines{next(number)}").exists():
        pass
    cache = quietly(ingest, [clip_folder(settings, folder)], out, size=round(1.25 * px), progress=False)
    clips = np.arange(len(cache.ids))
    held_out = clips[::5]
    train, p = np.setdiff1d(clips, held_out), problem("exact", settings, px, device)
    batch = min(settings.batch, len(train))
    for group in p.optimizer.param_groups:
        group["lr"] = configs.Optim().lr
    found = {name: [] for name in ways}
    for step in range(STEP * (SETTLED + settings.repeats)):
        p.views, p.clean = (
            b.views(device, px, input_channels(p.encoder)) for b in load_batches(cache, train, held_out, batch, step)
        )
        if step % STEP == 0:
            exact = meta_gradient(meta, p)
            for name, way in ways.items():
                found[name].append(torch.cosine_similarity(meta_gradient(way, p), exact, dim=0).item())
        meta(p)
    return found


def meta_gradient(step, p):
    """What `step` would give CMW-Net's optimizer; nothing of the problem changes."""
    p = copy.deepcopy(p)
    step(p)
    return torch.cat([w.grad.flatten() for w in p.cmw.parameters()])
