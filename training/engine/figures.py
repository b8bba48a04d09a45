"""The figures of a training run: loss curves, weights by source, similarity against weight along a clip."""

import json
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch

from training.engine.validation import representations
from uscl_hub.files import write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SHOWN = 10  # frames of a clip in one figure


def read_log(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def loss_curves(log, path):
    """Training and meta loss by step, validation loss, probe and effective rank by validation."""
    steps = [r for r in log if "loss" in r]
    checks = [r for r in log if "val_loss" in r]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    axes[0].plot([r["step"] for r in steps], [r["loss"] for r in steps], lw=0.6, label="training")
    if metas := [r for r in steps if "meta_loss" in r]:
        axes[0].plot([r["step"] for r in metas], [r["meta_loss"] for r in metas], lw=0.6, label="meta")
    axes[0].plot([r["step"] for r in checks], [r["val_loss"] for r in checks], "o-", ms=3, label="validation")
    axes[0].set(xlabel="step", ylabel="InfoNCE")
    axes[0].legend()
    axes[1].plot([r["step"] for r in checks], [r["knn"] for r in checks], "o-", ms=3)
    axes[1].set(xlabel="step", ylabel="kNN balanced accuracy")
    axes[2].plot([r["step"] for r in checks], [r["effective_rank"] for r in checks], "o-", ms=3)
    axes[2].set(xlabel="step", ylabel="effective rank of the features")
    _save(figure, path)


def weight_histogram(log, sources, path, last=100):
    """Learned weights by source, over the last `last` steps. sources: the source of every clip in the cache."""
    rows = [r for r in log if r.get("weights")][-last:]
    clips = np.concatenate([r["clips"] for r in rows])
    weights = np.concatenate([r["weights"] for r in rows])
    names = np.array(sources)[clips]
    figure, axis = plt.subplots(figsize=(6, 3.6))
    bins = np.linspace(weights.min(), weights.max() + 1e-6, 41)
    for name in sorted(set(names)):
        part = weights[names == name]
        axis.hist(part, bins, density=True, alpha=0.5, label=f"{name} (mean {part.mean():.4f}, n {len(part)})")
    axis.set(xlabel="CMW-Net's weight", ylabel="density")
    axis.legend()
    _save(figure, path)


@torch.no_grad()
def similarity_against_weight(encoder, cmw, frames, size, device, path):
    """A clip's frames against its first: cosine similarity of the representations and the pair's weight."""
    numbers = np.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().astype(int)
    h = torch.from_numpy(representations(encoder.backbone, frames[numbers], size, device)).to(device)
    first = h[:1].expand_as(h)
    similarity = torch.cosine_similarity(first, h).cpu()
    weights = cmw.float()(torch.stack([first, h])).cpu()
    figure = plt.figure(figsize=(1.3 * len(numbers), 4.2))
    grid = figure.add_gridspec(2, len(numbers), height_ratios=[1, 1.6])
    for i, number in enumerate(numbers):
        axis = figure.add_subplot(grid[0, i])
        axis.imshow(frames[number], cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"frame {number}", fontsize=8)
        axis.axis("off")
    axis = figure.add_subplot(grid[1, :])
    axis.plot(numbers, similarity, "o-", color="tab:blue")
    axis.set_xlabel("frame")
    axis.set_ylabel("cosine similarity to frame 0", color="tab:blue")
    axis = axis.twinx()
    axis.plot(numbers, weights, "s-", color="tab:red")
    axis.set_ylabel("weight of the pair", color="tab:red")
    _save(figure, path)


def _save(figure, path):
    figure.tight_layout()
    write_whole(path, partial(figure.savefig, dpi=110))
    plt.close(figure)
