"""The checks of a running training on its validation clips: loss, kNN accuracy, effective rank of the features."""

import math

import numpy as np
import torch
from sklearn.metrics import recall_score
from sklearn.neighbors import KNeighborsClassifier

from training.config import training_pairs
from training.data import batches
from training.engine.state import Diverged
from training.method.loss import info_nce
from training.method.networks import input_channels
from uscl_hub.preprocess import normalise, resize


@torch.no_grad()
def validate(encoder, config, clips, device, distillation=None):
    """Loss on the validation clips (always the same pairs or crops), kNN probe and effective rank, in eval mode.

    Raises Diverged: the loss is not finite.
    """
    encoder.eval()
    if config.method == "distil":
        loss = distillation.validate(encoder.backbone)
    else:
        loss = contrastive_loss(encoder, config, clips, device)
    encoder.train()
    if not math.isfinite(loss):
        raise Diverged(f"the validation loss is {loss}")
    return {"val_loss": loss, **probe_backbone(encoder.backbone, config, clips, device)}


def contrastive_loss(encoder, config, clips, device):
    """Mean loss of the validation clips' pairs."""
    channels, pairs = input_channels(encoder), training_pairs(config)
    losses, sizes = [], []
    for i in range(0, len(clips.val) - 1, config.optim.batch):  # a batch of one clip has no negative
        chosen = clips.val[i : i + config.optim.batch]
        if len(chosen) < 2:
            break
        batch = batches.make_batch(clips.cache, chosen, pairs, (config.seed, batches.VAL, i))
        _, z = encoder(batch.views(device, config.model.size, channels))
        z = z.unflatten(0, (2, -1))
        losses.append(info_nce(z, None, config.optim.temperature, config.loss.decoupled).item())
        sizes.append(len(chosen))
    return float(np.average(losses, weights=sizes))


def probe_backbone(backbone, config, clips, device, most=100):
    """kNN balanced accuracy on frames of `most` validation clips, and the effective rank of their features.

    The label of a validation frame is looked for among the training frames. Where validation has one label only,
    the frames of the second half of its clips look for their clip among those of the first half; where all of these
    are single images, too, there is nothing to look for: None.
    """

    def sample(split):
        some = split[np.linspace(0, len(split) - 1, min(most, len(split))).round().astype(int)]
        owner, numbers = sample_frames(clips.cache, some, 4)
        return representations(backbone, clips.cache.take(owner, numbers), config.model.size, device), owner, numbers

    val, owner, numbers = sample(clips.val)
    late = numbers >= clips.cache.lengths[owner] / 2
    if len(set(clips.labels[owner])) > 1:
        train, train_owner, _ = sample(clips.train)
        knn = knn_accuracy(train, clips.labels[train_owner], val, clips.labels[owner])
    elif late.any():
        knn = knn_accuracy(val[~late], owner[~late], val[late], owner[late], k=1)
    else:
        knn = None
    return {"knn": knn, "effective_rank": effective_rank(val)}


def sample_frames(cache, clips, per_clip):
    """Up to `per_clip` evenly spaced frames a clip: int arrays (n,) of their clips and of their numbers in these."""
    owner, numbers = [], []
    for clip in clips:
        n = min(per_clip, int(cache.lengths[clip]))
        numbers += ((2 * np.arange(n) + 1) * cache.lengths[clip] // (2 * n)).tolist()  # the middles of n equal parts
        owner += [clip] * n
    return np.array(owner), np.array(numbers)


@torch.no_grad()
def representations(backbone, frames, size, device, batch=64):
    """Representations of grey frames, preprocessed as in deployment.

    Args:
        backbone: maps (B, C, size, size) to (B, d); used in eval mode, its modules' modes are restored.
        frames: uint8 (B, S, S) of any S.

    Returns:
        float32 numpy (B, d).
    """
    training = [module for module in backbone.modules() if module.training]  # held stages are not
    backbone.eval()
    channels = input_channels(backbone)
    out = []
    for i in range(0, len(frames), batch):
        images = torch.stack([normalise(resize(np.asarray(f), size), channels) for f in frames[i : i + batch]])
        images = images.to(device, memory_format=torch.channels_last)
        out.append(backbone(images).float().cpu().numpy())
    for module in training:
        module.training = True
    return np.concatenate(out)


def knn_accuracy(train, train_labels, test, test_labels, k=20):
    """Balanced accuracy (mean recall of the labels in `test_labels`) of kNN classification by cosine distance."""
    k = min(k, len(train))
    classifier = KNeighborsClassifier(k, metric="cosine", weights="distance").fit(train, train_labels)
    present = np.unique(test_labels)
    return float(recall_score(test_labels, classifier.predict(test), labels=present, average="macro"))


def effective_rank(x):
    """exp(entropy) of the normalised singular values of the centred features (B, d): 1 when all collapse.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    s = np.linalg.svd(x - x.mean(0), compute_uv=False)
    if s.sum() == 0:
        return 1.0
    p = s / s.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))
