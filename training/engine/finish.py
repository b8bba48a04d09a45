"""The end of a training: figures, export, check of the export, comparison with random initialisation."""

import hashlib
import json

import numpy as np
import timm
import torch

from training.data.dataset import SIMULATED
from training.data.provenance import DataSource, Provenance, contents
from training.engine import export, figures
from training.engine.validation import probe_backbone, representations, sample_frames
from training.messages import say, without_folders
from uscl_hub.errors import UserError
from uscl_hub.files import write_text
from uscl_hub.models import size_arguments
from uscl_hub.registry import plain_name

RELOADED = 1e-3  # largest difference of the export's features, as a share of the largest feature


def finish(state, config, clips, out, device):
    """Write out/figures, out/manifest.json and out/export, and say what the export reaches."""
    log = figures.read_log(out / "log.jsonl")
    checks = next(row for row in reversed(log) if "val_loss" in row)
    plot(state, config, clips, log, out / "figures", device)
    provenance = describe(state, config, clips, checks, write_manifest(clips, out / "manifest.json"))
    path = export.export(state.encoder.backbone, config.model.name, config.model.size, out / "export", provenance)
    difference, scale = reloaded_difference(state, config, clips, path, device)
    if not difference <= RELOADED * scale:
        raise UserError(f"{path}: plain timm gives other features than the training (by {difference:g}): do not use it")
    say(f"exported to {path}; reloaded by plain timm, largest difference of the features: {difference:g}")
    compare(checks, untrained(config, clips, device), clips)
    say(
        f"use it: timm.create_model('local-dir:{path}', pretrained=True, num_classes=3), or "
        f"uscl_hub.load_meta_uscl_backbone('{config.model.name}', checkpoint='{path}')"
    )


def plot(state, config, clips, log, folder, device):
    """Loss curves and, where weights were learned, their histogram and how they fall along the longest clip."""
    folder.mkdir(exist_ok=True)
    figures.loss_curves(log, folder / "loss.png")
    if not any(row.get("weights") for row in log) or state.cmw is None:
        return
    figures.weight_histogram(log, clips.cache.sources, folder / "weights.png")
    if config.meta.input != "representation":
        return  # the other figure weighs pairs by their representations alone
    frames = clips.cache.clip(clips.val[np.argmax(clips.cache.lengths[clips.val])])
    path = folder / "similarity_and_weight.png"
    figures.similarity_against_weight(state.encoder, state.cmw, frames, config.model.size, device, path)


def write_manifest(clips, path):
    """One line a clip, without names or paths. Returns the rows and the sha256 of the file."""
    manifest = list(clips.manifest())
    text = json.dumps(manifest, indent=0)
    write_text(path, text)
    return manifest, hashlib.sha256(text.encode()).hexdigest()


def describe(state, config, clips, checks, manifest):
    """The export's `Provenance`."""
    rows, digest = manifest
    cache, numbers = clips.cache, clips.cache.source_numbers
    return Provenance(
        method=config.method,
        steps=state.step,
        sources=[
            DataSource(
                name=public,
                clips=int((numbers == number).sum()),
                frames=int(cache.lengths[numbers == number].sum()),
                licence=licence_of(name, config),
            )
            for number, (name, public) in enumerate(clips.public.items())
        ],
        manifest_sha256=digest,
        metrics={k: checks[k] for k in ("val_loss", "knn", "effective_rank")},
        seed=config.seed,
        projector_dim=config.model.dim,
        config={key: without_folders(value) for key, value in state.fixed.items()},
        parents=state.parents,
        groups=sorted({row["group"] for row in rows}),
        **contents(cache),
    )


def licence_of(source, config):
    """The licence of a source's clips, as data.licences says."""
    simulated = not config.data.roots or (source == SIMULATED and config.data.simulated)
    return config.data.licences.get(source, "simulated" if simulated else "not stated")


def reloaded_difference(state, config, clips, path, device):
    """Largest difference between the features of the trained network and of the export as timm loads it, and their
    largest value."""
    frames = clips.cache.take(*sample_frames(clips.cache, clips.val, 1))
    reloaded = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0)
    reloaded = reloaded.to(device, memory_format=torch.channels_last)
    models, size = (state.encoder.backbone, reloaded), config.model.size
    ours, theirs = (representations(model, frames, size, device) for model in models)
    return np.abs(ours - theirs).max(), np.abs(ours).max()


def untrained(config, clips, device):
    """The probe's figures of the same architecture at its random start."""
    torch.manual_seed(config.seed)
    name, size = config.model.name, config.model.size
    model = timm.create_model(plain_name(name), num_classes=0, **size_arguments(name, size))
    return probe_backbone(model.to(device, memory_format=torch.channels_last), config, clips, device)


def compare(trained, random, clips):
    labels = len(set(clips.labels[clips.val]))
    task = f"{labels} labels of held-out groups" if labels > 1 else f"{len(clips.val)} held-out clips told apart"
    if random["knn"] is None:
        say("no kNN probe: validation has single images of one label only (data.label)")
    else:
        say(
            f"kNN probe ({task}), balanced accuracy: trained {trained['knn']:.3f}, "
            f"random initialisation {random['knn']:.3f}"
        )
    say(
        f"effective rank of the features: trained {trained['effective_rank']:.1f}, "
        f"random initialisation {random['effective_rank']:.1f}"
    )
