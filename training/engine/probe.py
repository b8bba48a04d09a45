"""Is the representation any good yet? kNN accuracy on held-out clips and the features' effective rank."""

import numpy as np
import torch
from sklearn.metrics import recall_score
from sklearn.neighbors import KNeighborsClassifier

from training.method.networks import input_channels
from uscl_hub.preprocess import normalise, resize


def sample_frames(cache, clips, per_clip):
    """Up to `per_clip` evenly spaced frames a clip: row numbers in the cache and the clip of each."""
    rows, owner = [], []
    for clip in clips:
        n = min(per_clip, int(cache.lengths[clip]))
        numbers = (2 * np.arange(n) + 1) * cache.lengths[clip] // (2 * n)  # the middles of n equal parts
        rows += (cache.offsets[clip] + numbers).tolist()
        owner += [clip] * n
    return np.array(rows), np.array(owner)


@torch.no_grad()
def features(backbone, frames, size, device, batch=64):
    """Representations of grey frames, preprocessed as in deployment.

    Args:
        backbone: maps (B, C, size, size) to (B, d); used in eval mode, its mode is restored.
        frames: uint8 (B, S, S) of any S.

    Returns:
        float32 numpy (B, d).
    """
    training = backbone.training
    backbone.eval()
    channels = input_channels(backbone)
    out = []
    for i in range(0, len(frames), batch):
        images = torch.stack([normalise(resize(np.asarray(f), size), channels) for f in frames[i : i + batch]])
        images = images.to(device, memory_format=torch.channels_last)
        out.append(backbone(images).float().cpu().numpy())
    backbone.train(training)
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
