"""The probe of a training: frames, features, kNN and effective rank."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from helpers import cache_in_memory as cache
from sklearn.metrics import balanced_accuracy_score

from training.engine import validation as probe
from training.engine.validation import probe_backbone
from training.method.networks import Encoder, input_channels
from uscl_hub.models import size_arguments
from uscl_hub.preprocess import create_transform

CPU = torch.device("cpu")


@pytest.mark.parametrize("length", range(1, 30))
@pytest.mark.parametrize("per_clip", [1, 4])
def test_sampled_frames_are_different_and_evenly_spaced(length, per_clip):
    owner, numbers = probe.sample_frames(cache([5, length]), [1], per_clip)
    assert len(numbers) == min(per_clip, length) == len(set(numbers)) and set(owner) == {1}
    assert numbers[0] >= 0 and numbers[-1] < length
    if len(numbers) > 1:
        gaps = np.diff(numbers)
        assert gaps.max() - gaps.min() <= 1
    assert abs(numbers.mean() - (length - 1) / 2) <= 1  # about the middle


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_features_are_those_of_deployment(name):
    kwargs = size_arguments(name, 32)
    backbone = timm.create_model(name, num_classes=0, **kwargs).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    frames = cache([7], px=40).frames
    features = probe.representations(backbone, frames, 32, CPU, batch=3)
    assert backbone.training and features.dtype == np.float32 and len(features) == 7
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())  # running statistics, too

    transform = create_transform({"mean": 0.18, "std": 0.24, "input_size": (3, 32, 32)})
    with torch.no_grad():
        alone = [backbone.eval()(transform(frame)[None])[0].numpy() for frame in frames]
    np.testing.assert_allclose(features, alone, atol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_input_channels(name, in_chans):
    assert input_channels(Encoder(name, 8, in_chans=in_chans)) == in_chans


def naive_knn(train, labels, test, k):
    predicted = []
    for x in test:
        distance = [1 - x @ t / np.linalg.norm(x) / np.linalg.norm(t) for t in train]
        votes = {}
        for i in np.argsort(distance)[:k]:
            votes[labels[i]] = votes.get(labels[i], 0) + 1 / distance[i]
        predicted.append(max(votes, key=votes.get))
    return predicted


def test_knn_equals_the_naive_loop():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(60, 5)), rng.normal(size=(40, 5))
    labels = np.array(["a", "b", "c"])[rng.integers(0, 3, 60)]
    truth = np.array(["a", "b", "c"])[rng.choice(3, 40, p=[0.6, 0.3, 0.1])]
    expected = balanced_accuracy_score(truth, naive_knn(train, labels, test, 20))
    assert probe.knn_accuracy(train, labels, test, truth) == pytest.approx(expected, abs=1e-12)
    assert probe.knn_accuracy(3 * train, labels, 0.1 * test, truth) == pytest.approx(expected)  # by direction


def test_knn_is_balanced_and_silent():
    train, labels = np.eye(3), ["a", "b", "c"]
    test, truth = np.eye(3)[[0, 0, 0, 1, 2]], ["a", "a", "a", "a", "b"]  # c is predicted, but nobody's label
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe.knn_accuracy(train, labels, test, truth, k=1) == pytest.approx((3 / 4 + 0) / 2)


def test_effective_rank():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(50, 50)))[0]
    basis = q[:, :6] - q[:, :6].mean(0)
    orthogonal = np.linalg.qr(basis)[0]  # six centred directions with equal singular values
    assert probe.effective_rank(orthogonal) == pytest.approx(6, abs=1e-9)
    assert probe.effective_rank(7 + 3 * orthogonal) == pytest.approx(6, abs=1e-9)  # neither mean nor scale
    line = np.outer(rng.normal(size=50), rng.normal(size=6))
    assert probe.effective_rank(line) == pytest.approx(1, abs=1e-6)
    assert probe.effective_rank(np.ones((50, 6))) == 1.0
    s = np.array([4.0, 2.0, 1.0])
    p = s / s.sum()
    assert probe.effective_rank(orthogonal[:, :3] * s) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def clips(lengths, val, labels):
    """Clips whose frames all have their clip's own pattern: features find it without fail."""
    c = cache(lengths)
    for i, (offset, length) in enumerate(zip(c.offsets, c.lengths)):
        c.frames[offset : offset + length] = np.random.default_rng(i).integers(0, 256, (8, 8))
    everything = np.arange(len(lengths))
    return SimpleNamespace(cache=c, val=everything[:val], train=everything[val:], labels=np.array(labels))


def pixels(backbone, frames, size, device):
    return np.asarray(frames, np.float32).reshape(len(frames), -1) - 128


def test_probe_of_a_run(tiny, monkeypatch):
    monkeypatch.setattr(probe, "representations", pixels)
    told_apart = probe_backbone(None, tiny(), clips([6] * 40, 20, ["x"] * 40), CPU)
    assert told_apart["knn"] == 1.0 and told_apart["effective_rank"] > 10
    many = probe_backbone(None, tiny(), clips([6] * 500, 490, ["x"] * 500), CPU)
    assert many["knn"] == 1.0  # of every chosen clip, both halves are there
    some_single = probe_backbone(None, tiny(), clips([1, 6, 1, 6, 6], 4, ["x"] * 5), CPU)
    assert some_single["knn"] == 1.0
    images = probe_backbone(None, tiny(), clips([1] * 9, 5, ["x"] * 9), CPU)
    assert images["knn"] is None and images["effective_rank"] > 1

    labelled = clips([6] * 12, 4, ["a", "b"] * 6)
    for i in range(12):  # each label looks like itself
        labelled.cache.frames[6 * i : 6 * i + 6] = labelled.cache.frames[6 * (i % 2)]
    assert probe_backbone(None, tiny(), labelled, CPU)["knn"] == 1.0
    labelled.labels[4:] = labelled.labels[4:][::-1].copy()
    assert probe_backbone(None, tiny(), labelled, CPU)["knn"] == 0.0
