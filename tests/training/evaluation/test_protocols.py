"""Backbones by name and the protocols: kNN, linear probe, fine-tuning, out-of-fold predictions, leaks."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers import interrupted

from training import evaluate
from training.data.cache import FrameCache
from training.data.ingest import ingest
from training.data.provenance import Provenance
from training.engine.export import export, fingerprint
from training.evaluation import features, fine_tuning, protocols
from training.evaluation.backbones import LeakError, find_leaks, is_random, load_backbone, refuse_leaks, split_name
from training.evaluation.datasets import EvaluationError, TaskError, TaskFrames, load_task, make_folds
from training.evaluation.fine_tuning import FineTune, Tuning
from training.evaluation.protocols import Cell
from uscl_hub.checkpoints import CheckpointError
from uscl_hub.convert import convert
from uscl_hub.preprocess import create_transform, resize


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("random:test_resnet", 0, 32)


def write_export(folder, groups=(), clips=(), name="meta_uscl_resnet18"):
    torch.manual_seed(5)
    provenance = Provenance("uscl", 3, [], "", {}, groups=list(groups), clips=list(clips))
    return export(timm.create_model("resnet18", num_classes=0), name, 32, folder, provenance)


def bright_or_dark(count, px=32, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    return (rng.integers(0, 128, (count, px, px)) + 120 * labels[:, None, None]).astype(np.uint8), labels


# ---------------------------------------------------------------------------------------------------- backbones


def test_names_and_specs(tmp_path):
    folder = write_export(tmp_path / "mine" / "export")
    assert split_name(str(folder)) == ("mine", str(folder)) and split_name("a=b=c") == ("a", "b=c")
    assert split_name("timm:resnet18:pretrained") == ("timm:resnet18:pretrained",) * 2
    assert is_random("x=random:resnet18") and is_random("timm:resnet18")
    assert not is_random("timm:resnet18:pretrained") and not is_random(str(folder))
    for spec, error, said in (
        ("resnet18", EvaluationError, "neither a folder nor"),
        ("random:resnet1", EvaluationError, "'random:resnet1' cannot be loaded: Unknown model"),
        ("timm:resnet18.xx:pretrained", EvaluationError, "cannot be loaded: Invalid pretrained tag"),
        ("meta_uscl_resnet99", EvaluationError, "cannot be loaded: unknown model"),
        (str(tmp_path), CheckpointError, "config.json"),
    ):
        with pytest.raises(error, match=said):
            load_backbone(spec)


def test_random_weights_follow_the_seed_alone():
    state = torch.get_rng_state()
    a, b, c = (load_backbone("random:resnet18", seed) for seed in (0, 0, 1))
    assert a.sha == b.sha != c.sha and torch.equal(state, torch.get_rng_state())
    assert load_backbone("random:vit_tiny_patch16_224", 0, 32).model(torch.zeros(1, 3, 32, 32)).shape == (1, 192)


def test_an_export_is_loaded_with_its_weights_and_provenance(tmp_path):
    folder = write_export(tmp_path / "seed3", groups=["a"])
    found = load_backbone(f"ours={tmp_path}/seed{{seed}}", 3)
    torch.manual_seed(5)
    model = timm.create_model("resnet18", num_classes=0).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(found.model(x), model(x)) and (found.name, found.px) == ("ours", 32)
    assert found.provenance["groups"] == ["a"] and found.architecture == "resnet18"
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load_backbone(str(folder))


def test_the_authors_converted_checkpoint_is_a_backbone(tmp_path):
    torch.manual_seed(0)
    original = torchvision.models.resnet18().eval()
    encoder = torch.nn.Sequential(*list(original.children())[:-1])
    heads = {"l1.weight": torch.zeros(512, 512), "l1.bias": torch.zeros(512)}
    heads |= {"l2.weight": torch.zeros(256, 512), "l2.bias": torch.zeros(256)}
    state = {f"features.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"state_dict": {**state, **heads}}, tmp_path / "official.pth")
    convert(tmp_path / "official.pth", tmp_path / "converted")
    found, x = load_backbone(f"authors={tmp_path / 'converted'}"), torch.rand(2, 3, 64, 64)
    assert torch.allclose(found.model(x), encoder(x).flatten(1), atol=1e-5)
    assert not (found.provenance or {}).get("groups")


def test_the_input_is_what_deployment_makes(tmp_path):
    found = load_backbone(str(write_export(tmp_path / "x")))
    frame = np.random.default_rng(0).integers(0, 256, (50, 70)).astype(np.uint8)
    ours = features.to_input(resize(frame, 32)[None], found)[0]
    assert torch.equal(ours, create_transform(found.model)(frame))
    imagenet = SimpleNamespace(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    x = features.to_input(frame[None], imagenet)
    assert torch.allclose(x[0, 2] * 0.225 + 0.406, torch.from_numpy(frame / 255).float(), atol=1e-6)


# -------------------------------------------------------------------------------------------------------- leaks


def test_leaks_are_found_by_group_and_by_content(downstream, tmp_path):
    blues = load_task("blues", downstream, downstream / "covid_blues")
    busi = load_task("busi", downstream, downstream)
    ingest([downstream / "covid_blues"], tmp_path, size=32, crop="none", workers=0, progress=False)
    cache = FrameCache.open(tmp_path)
    by_group = SimpleNamespace(name="ours", provenance={"groups": [fingerprint("patient_3"), fingerprint("x")]})
    by_clip = SimpleNamespace(name="ours", provenance={"clips": cache.sha256[:1]})
    assert find_leaks(by_group, blues) == ["covid_blues/patient_3"]
    assert find_leaks(by_clip, blues) == ["covid_blues/patient_0"]
    whole = SimpleNamespace(name="ours", provenance={"groups": list(map(fingerprint, cache.ids)), "clips": []})
    assert len(find_leaks(whole, blues)) == 8
    with pytest.raises(LeakError, match=r"ours was pretrained on 8 of the 8 groups.*patient_0.*--leaks skip"):
        refuse_leaks(whole, blues)
    refuse_leaks(whole, busi)
    refuse_leaks(SimpleNamespace(name="unknown", provenance=None), blues)


def test_numbered_images_that_were_one_clip_are_found(downstream, tmp_path):
    """find_clips takes images of equal size, numbered, for the frames of one clip."""
    busi = load_task("busi", downstream, downstream)
    ingest([downstream / "busi"], tmp_path, size=32, crop="none", workers=0, progress=False)
    groups = list(map(fingerprint, FrameCache.open(tmp_path).ids))
    found = SimpleNamespace(name="ours", provenance={"groups": groups, "clips": []})
    assert set(find_leaks(found, busi)) == set(busi.groups)


# ---------------------------------------------------------------------------------------------- frozen features


def test_knn_against_naive():
    rng = np.random.default_rng(0)
    train, test, labels = rng.normal(size=(60, 5)), rng.normal(size=(7, 5)), rng.integers(0, 3, 60)
    cosine = (test / np.linalg.norm(test, axis=1, keepdims=True)) @ (train / np.linalg.norm(train, axis=1)[:, None]).T
    nearest = labels[np.argsort(-cosine, axis=1)[:, :20]]
    naive = np.stack([(nearest == c).mean(1) for c in range(3)], axis=1)
    assert protocols.knn(train, labels, test) == pytest.approx(naive)
    with pytest.raises(TaskError, match="at least 20 training frames, there are 19"):
        protocols.knn(train[:19], labels[:19], test)


def test_the_linear_probe_chooses_its_regularisation_by_group():
    """Feature 0 tells the label a little in every group; the others tell every training group apart, and mislead."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 5)
    labels = groups % 2
    identity = rng.normal(size=(60, 80))[groups]
    x = np.column_stack([labels + rng.normal(0, 0.7, 300), identity])
    new = np.repeat(np.arange(60, 120), 5)
    test = np.column_stack([new % 2 + rng.normal(0, 0.7, 300), rng.normal(size=(60, 80))[new - 60]])
    strict = protocols.linear(x, labels, groups, test, seed=0)
    by_frame = protocols.linear(x, labels, np.arange(300), test, seed=0)  # every frame a group: leaks
    assert strict.shape == (300, 2) and strict.sum(1) == pytest.approx(np.ones(300))
    right = [(p.argmax(1) == new % 2).mean() for p in (strict, by_frame)]
    assert right[0] > right[1] + 0.02, right
    assert np.array_equal(strict, protocols.linear(x, labels, groups, test, seed=0))


def test_the_linear_probe_without_groups_to_choose_on():
    x = np.random.default_rng(0).normal(size=(300, 4))
    labels = (x[:, 0] > 0).astype(int)
    found = protocols.linear(x, labels, labels, x, seed=0)  # each class is one group
    assert (found.argmax(1) == labels).mean() > 0.9


def test_features_are_computed_once_and_must_be_finite(backbone, tmp_path, monkeypatch):
    images, _ = bright_or_dark(5)
    frames = TaskFrames(images, np.arange(5), "key")
    x = features.cached_features(backbone, frames, tmp_path, "cpu")
    with torch.inference_mode():
        assert x == pytest.approx(backbone.model(features.to_input(images, backbone)).numpy(), abs=1e-4)
    monkeypatch.setattr(features, "compute", None)
    assert np.array_equal(x, features.cached_features(backbone, frames, tmp_path, "cpu"))
    monkeypatch.undo()
    broken = copy.copy(backbone)
    broken.model, broken.sha = copy.deepcopy(backbone.model), "broken"
    next(broken.model.parameters()).data[0] = torch.nan
    with pytest.raises(EvaluationError, match="not finite"):
        features.cached_features(broken, frames, tmp_path, "cpu")


def test_pool_frames_is_the_mean_of_each_item():
    values = np.array([[1.0, 0], [3, 2], [5, 5]])
    assert protocols.pool_frames(values, np.array([0, 0, 1]), 2).tolist() == [[2, 1], [5, 5]]


# -------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "tf_efficientnet_lite0"])
def test_before_and_after_the_last_block_is_the_whole_model(name):
    found = load_backbone(f"random:{name}", 0, 32)
    images, _ = bright_or_dark(3)
    entering = fine_tuning.before_last_block(found, images, "cpu")
    classifier = fine_tuning.Classifier(found.model, 2, last=True).eval()
    with torch.inference_mode():
        whole = classifier.head(found.model(features.to_input(images, found)))
        assert torch.allclose(classifier(entering), whole, atol=1e-4)


def test_last_three_is_the_paper_s(monkeypatch):
    """layer4's last block and the head, Adam at 0.01, weight decay 1e-4, cosine to 0, 30 epochs of batches of 128."""
    assert evaluate.EvaluateConfig().last == FineTune(epochs=30, lr=0.01, batch=128)
    backbone, made, rates, sizes = load_backbone("random:resnet18", 0, 32), {}, [], []

    class Spy(torch.optim.Adam):
        def __init__(self, parameters, **kwargs):
            parameters = list(parameters)
            made.update(kwargs, shapes=[tuple(p.shape) for p in parameters if p.requires_grad])
            super().__init__(parameters, **kwargs)

        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Spy)
    forward = fine_tuning.Classifier.forward
    monkeypatch.setattr(fine_tuning.Classifier, "forward", lambda s, x: (sizes.append(len(x)), forward(s, x))[1])
    x = torch.rand(256, 512, 1, 1)
    recipe = FineTune(epochs=4, lr=0.01, batch=128)
    fine_tuning.finetune(backbone, Tuning(True, recipe, 2, 0, "cpu"), x, np.arange(256) % 2, x[:2])
    expected = [tuple(p.shape) for p in backbone.model.layer4[1].parameters()] + [(2, 512), (2,)]
    assert made["shapes"] == expected and (made["lr"], made["weight_decay"]) == (0.01, 1e-4)
    cosine = [0.005 * (1 + np.cos(np.pi * epoch / 4)) for epoch in range(4)]
    assert rates == pytest.approx(np.repeat(cosine, 2)) and sizes == [128] * 8 + [2]


@pytest.mark.parametrize("last", [True, False])
def test_fine_tuning_learns_and_is_reproducible(backbone, last):
    images, labels = bright_or_dark(49)
    x = fine_tuning.before_last_block(backbone, images, "cpu") if last else images
    before, state = backbone.model.layer4[-1].conv1.weight.clone(), torch.get_rng_state()
    tuning = Tuning(last, FineTune(30 if last else 4, 1e-3, 16), 2, 3, "cpu")
    args = backbone, tuning, x[:33], labels[:33], x[33:]
    found = fine_tuning.finetune(*args)
    assert (found.argmax(1) == labels[33:]).mean() > 0.9 and found.sum(1) == pytest.approx(np.ones(16))
    assert np.array_equal(found, fine_tuning.finetune(*args))
    assert torch.equal(before, backbone.model.layer4[-1].conv1.weight) and torch.equal(state, torch.get_rng_state())


def test_a_diverged_fine_tuning_is_said(backbone):
    images, labels = bright_or_dark(8)
    with pytest.raises(EvaluationError, match="diverged .lr 1e[+]30.: lower"):
        fine_tuning.finetune(backbone, Tuning(False, FineTune(2, 1e30, 8), 2, 0, "cpu"), images, labels, images)


def test_an_unknown_last_block_is_named():
    with pytest.raises(EvaluationError, match="last block of a MobileNetV3 is not known"):
        fine_tuning.last_block(timm.create_model("mobilenetv3_small_050", num_classes=0))


# ------------------------------------------------------------------------------------------------- out of fold


@pytest.fixture
def simulated():
    """40 groups of 1 or 2 items of 3 frames; features that only tell the group."""
    rng = np.random.default_rng(0)
    groups = np.repeat([f"g{i}" for i in range(40)], rng.integers(1, 3, 40))
    labels = np.array([int(g[1:]) % 2 for g in groups])
    task = SimpleNamespace(
        labels=labels, targets=labels, strata=labels, groups=groups, classes=("a", "b"), kind="classification"
    )
    frames = TaskFrames(None, np.repeat(np.arange(len(groups)), 3), "key")
    x = rng.normal(size=(40, 30))[[int(g[1:]) for g in groups[frames.item]]]
    return task, frames, x, make_folds(labels, groups, ("a", "b"), 5, 0)


NOBODY = SimpleNamespace(key=["none", "sha", 0, 1])


def test_no_model_sees_its_test_groups(simulated, monkeypatch, tmp_path):
    task, frames, x, folds = simulated
    seen = []

    def spy(train, labels, test):
        seen.append((set(train[:, 0]), set(test[:, 0]), len(train)))
        return np.tile([0.5, 0.5], (len(test), 1))

    monkeypatch.setattr(protocols, "knn", spy)
    done = []
    for fraction in (1.0, 0.25):
        cell = Cell(task, frames, folds, NOBODY, 0, "cpu", tmp_path)
        found = protocols.scores_out_of_fold(cell, "knn", lambda: x, fraction, done=lambda: done.append(1))
        assert not np.isnan(found).any()
    assert len(seen) == len(done) == 10 and all(not train & test for train, test, _ in seen)
    for full, few in zip(seen[:5], seen[5:]):
        assert len(few[0]) == 8 and few[0] < full[0] and few[1] == full[1]  # a quarter of 32 training groups


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_features_that_only_tell_the_patient_are_worth_nothing(simulated, protocol, tmp_path):
    task, frames, x, folds = simulated
    found = protocols.scores_out_of_fold(
        Cell(task, frames, folds, NOBODY, 0, "cpu", tmp_path), protocol, lambda: x, 1.0
    )
    assert found.sum(1) == pytest.approx(np.ones(len(x)))
    assert abs((found.argmax(1) == task.labels[frames.item]).mean() - 0.5) < 0.25


def test_finished_folds_are_not_computed_again(simulated, monkeypatch, tmp_path):
    task, frames, x, folds = simulated
    cell = Cell(task, frames, folds, NOBODY, 0, "cpu", tmp_path)
    knn = interrupted(protocols.knn, call=4)
    monkeypatch.setattr(protocols, "knn", knn)
    with pytest.raises(KeyboardInterrupt):
        protocols.scores_out_of_fold(cell, "knn", lambda: x, 1.0)
    first = protocols.scores_out_of_fold(cell, "knn", lambda: x, 1.0)
    assert knn.call_count == 6  # three, the one that was cut short, and the last two
    assert np.array_equal(first, protocols.scores_out_of_fold(cell, "knn", None, 1.0)) and knn.call_count == 6


def test_folds_of_other_groups_are_computed_again(simulated, tmp_path):
    task, frames, x, _ = simulated
    folds = np.where(np.arange(len(task.groups)) < 8, 0, -1)  # an external test: the groups do not make the folds
    task.groups = np.array([f"g{i}" for i in range(len(task.groups))])

    def scores(folder):
        return protocols.scores_out_of_fold(Cell(task, frames, folds, NOBODY, 0, "cpu", folder), "knn", lambda: x, 0.25)

    first = scores(tmp_path / "shared")
    task.groups = np.roll(task.groups, 5)
    again, fresh = scores(tmp_path / "shared"), scores(tmp_path / "new")
    assert np.array_equal(again, fresh, equal_nan=True) and not np.array_equal(again, first, equal_nan=True)


def test_columns_of_any_unit_choose_alpha_alike():
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(12), 10)
    x, test = rng.normal(size=(120, 40)), rng.normal(size=(50, 40))
    signal = x @ rng.normal(size=40)
    targets = np.stack([signal + rng.normal(size=120), rng.normal(size=120)], 1)
    units = np.array([1.0, 1000.0])
    same = protocols.linear_values(x, targets, groups, test)
    assert np.allclose(protocols.linear_values(x, targets * units, groups, test), same * units, atol=1e-6)


@pytest.mark.parametrize("fraction, said", [(1.0, "100% of the labels leave"), (4, "4 labels leave")])
def test_too_few_labels_are_said(simulated, tmp_path, fraction, said):
    task, frames, x, folds = simulated
    task.targets, task.strata = np.where(task.groups == "g0", 1, 0), np.zeros(len(task.groups), int)
    with pytest.raises(TaskError, match=f"{said} a class without a training item"):
        cell = Cell(task, frames, folds, NOBODY, 0, "cpu", tmp_path)
        protocols.scores_out_of_fold(cell, "linear", lambda: x, fraction)
