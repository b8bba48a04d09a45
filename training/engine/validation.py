"""The checks of a running training on its validation clips."""

import math
import sys

import numpy as np
import torch

from training.config import training_pairs
from training.data import batches
from training.engine import probe
from training.method.loss import info_nce
from training.method.networks import input_channels

DIVERGED = "lower optim.lr or raise optim.warmup_epochs. The last checkpoint, if any, is from before"


@torch.no_grad()
def validate(encoder, config, clips, device):
    """Loss of the validation clips' pairs (always the same ones), kNN probe and effective rank, in eval mode."""
    encoder.eval()
    channels, pairs = input_channels(encoder), training_pairs(config)
    losses, sizes = [], []
    for i in range(0, len(clips.val) - 1, config.optim.batch):  # a batch of one clip has no negative
        chosen = clips.val[i : i + config.optim.batch]
        if len(chosen) < 2:
            break
        batch = batches.make_batch(clips.cache, chosen, pairs, (config.seed, batches.VAL, i))
        _, z = encoder(batch.views(device, config.model.size, channels))
        losses.append(info_nce(z.unflatten(0, (2, -1)), None, config.optim.temperature).item())
        sizes.append(len(chosen))
    encoder.train()
    loss = float(np.average(losses, weights=sizes))
    if not math.isfinite(loss):
        sys.exit(f"the validation loss is {loss}; {DIVERGED}")
    return {"val_loss": loss, **probe_backbone(encoder.backbone, config, clips, device)}


def probe_backbone(backbone, config, clips, device, most=100):
    """kNN balanced accuracy on frames of `most` validation clips, and the effective rank of their features.

    The label of a validation frame is looked for among the training frames. Where validation has one label only,
    the frames of the second half of its clips look for their clip among those of the first half; where all of these
    are single images, too, there is nothing to look for: None.
    """

    def sample(split):
        some = split[np.linspace(0, len(split) - 1, min(most, len(split))).round().astype(int)]
        rows, owner = probe.sample_frames(clips.cache, some, 4)
        return probe.features(backbone, clips.cache.frames[rows], config.model.size, device), rows, owner

    val, rows, owner = sample(clips.val)
    late = rows - clips.cache.offsets[owner] >= clips.cache.lengths[owner] / 2
    if len(set(clips.labels[owner])) > 1:
        train, _, train_owner = sample(clips.train)
        knn = probe.knn_accuracy(train, clips.labels[train_owner], val, clips.labels[owner])
    elif late.any():
        knn = probe.knn_accuracy(val[~late], owner[~late], val[late], owner[late], k=1)
    else:
        knn = None
    return {"knn": knn, "effective_rank": probe.effective_rank(val)}
