"""Segmentation: masks, models on a backbone, metrics against naive ones, out-of-fold predictions."""

import shutil

import numpy as np
import pytest
import torch
from helpers import dicom
from PIL import Image

from training.evaluation import coco, intervals, segmentation
from training.evaluation.backbones import load_backbone
from training.evaluation.datasets import EvaluationError, load_task, make_folds
from training.evaluation.lesions import Lesions, image_metrics, load_lesions
from training.evaluation.own import OwnData, load_own
from training.evaluation.protocols import Cell
from training.evaluation.segmentation import Segment
from uscl_hub.preprocess import resize


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("random:test_resnet", 0, 64)


def load(root):
    return load_task("busi_seg", root, root)


def squares(count, px=64, seed=0):
    """Dark squares on noise: Lesions of images that were of 2 * px x px pixels."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, px, px), bool)
    for mask in masks:
        row, column = rng.integers(4, px // 2, 2)
        mask[row : row + px // 3, column : column + px // 3] = True
    images = np.where(masks, 10, rng.integers(80, 200, masks.shape)).astype(np.uint8)
    return Lesions(images, masks, np.tile([2 * px, px], (count, 1)))


def test_images_and_masks_are_aligned_and_lesions_merged(downstream, tmp_path):
    root = shutil.copytree(downstream, tmp_path / "data")
    folder = root / "busi" / "benign" / "mask"
    second = np.zeros((48, 64), bool)
    second[:6, :6] = True
    Image.fromarray(second).save(folder / "benign (0)_mask_1.png")
    Image.fromarray(second[:-5]).save(folder / "benign (1)_mask.png")
    Image.fromarray(np.zeros_like(second)).save(folder / "benign (2)_mask.png")
    (folder / "benign (3)_mask.png").write_bytes(b"")
    task = load(root)
    found = load_lesions(task, 32, tmp_path / "cache")
    images, masks = found.images, found.masks
    assert (found.sizes == (48, 64)).all() and found.sizes.shape == (61, 2)
    assert images.shape == masks.shape == (61, 32, 32) and len(task.items) == 61 and task.found == 64
    assert masks[[item.path.stem for item in task.items].index("benign (0)")][:3, :2].all()
    said = dict((name.rsplit("/")[-1], why) for name, why in task.excluded)
    assert "64 x 43 pixels, its image 64 x 48" in said["benign (1).png"]
    assert "nothing is marked" in said["benign (2).png"] and "unusable mask" in said["benign (3).png"]
    for image, mask in zip(images, masks):
        assert image[mask].mean() < image[~mask].mean()  # the lesions are dark


def test_of_a_clip_with_a_mask_the_first_frame_counts(tmp_path):
    lines, movies = ["path,mask"], []
    for i in range(4):
        movies.append(np.random.default_rng(i).integers(0, 255, (30, 40, 48), np.uint8))
        dicom(tmp_path / f"{i}.dcm", movies[i], CineRate=20)
        Image.fromarray(np.eye(40, 48, dtype=bool)).save(tmp_path / f"m{i}.png")
        lines.append(f"{i}.dcm,m{i}.png")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    task = load_own(OwnData(str(tmp_path / "labels.csv"), task="segmentation"))
    found = load_lesions(task, 32, tmp_path / "cache")
    assert np.array_equal(found.images, [resize(movie[0], 32) for movie in movies]) and len(found.masks) == 4


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_the_feature_maps_are_the_backbone_s(name):
    found = load_backbone(f"random:{name}", 0, 64)
    for parameter in found.model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        maps = segmentation.features_only(found).eval()(x)
        whole = found.model.forward_features(x)
        assert [m.shape[-1] for m in maps] == [16, 8, 4, 2] and torch.allclose(maps[-1], whole, atol=1e-4)
        encoder = segmentation.build("unet", found, 64).encoder.eval()
        assert torch.allclose(encoder(x)[-1], whole, atol=1e-4)


def test_a_backbone_without_a_pyramid_is_named():
    with pytest.raises(EvaluationError, match="vit_tiny_patch16_224 has no feature maps at strides 4, 8, 16 and 32"):
        segmentation.build("unet", load_backbone("random:vit_tiny_patch16_224", 0, 64), 64)


def test_image_metrics_by_hand():
    masks = np.zeros((3, 4, 4), bool)
    masks[:, :2] = True  # 8 pixels
    predicted = np.zeros_like(masks)
    predicted[0, :1] = True  # 4 of them
    predicted[1, 1:] = True  # 4 of them, 8 others
    found = image_metrics(predicted, Lesions(predicted, masks, np.array([(4, 4), (8, 4), (30, 40)])))
    assert found["Dice"] == pytest.approx([2 * 4 / 12, 2 * 4 / 20, 0])
    assert found["PPV"] == pytest.approx([1, 4 / 12, 0]) and found["sensitivity"] == pytest.approx([0.5, 0.5, 0])
    # by a row too few; by two rows of a double height too many; nothing predicted: the diagonal
    assert found["HD95"] == pytest.approx([1, 4, 50])


def test_average_precision_against_copied_images():
    """Draws against pycocotools on copies of the images; detections of all qualities, some images without."""
    rng = np.random.default_rng(0)
    masks = squares(24, 32).masks
    instances = [
        [
            [score / 50, coco.encode(np.roll(mask, rng.integers(-2, 3, 2), (0, 1)))]
            for score in rng.permutation(50)[: rng.integers(0, 4)].tolist()  # equal ones in different images only
        ]
        for mask in masks
    ]
    groups = np.arange(24) // 2
    found = coco.average_precision(masks, instances, groups, draws=15, seed=1)
    for draw, counts in enumerate(intervals.draw_groups(12, 15, 1)):
        copies = np.repeat(np.arange(24), counts[groups])
        precision = coco.accumulated(masks[copies], [instances[i] for i in copies]).eval["precision"]
        assert found["COCO AP"].draws[draw] == pytest.approx(precision.mean(), abs=1e-9)
        assert found["COCO AP50"].draws[draw] == pytest.approx(precision[0].mean(), abs=1e-9)
    assert 0.05 < found["COCO AP"].value < found["COCO AP50"].value < 0.95
    perfect = [[[0.9, coco.encode(mask)]] for mask in masks]
    assert coco.average_precision(masks, perfect, groups, draws=5)["COCO AP"].value == pytest.approx(1)
    nothing = coco.average_precision(masks, [[] for _ in masks], groups, draws=5)
    assert nothing["COCO AP"].value == 0 and nothing["COCO AP50"].draws.tolist() == [0] * 5


def test_the_unet_learns(backbone):
    lesions = squares(40)
    model = segmentation.train("unet", backbone, lesions[:24], Segment(px=64, epochs=6, batch=8), 0, "cpu")
    predicted, instances = segmentation.predict("unet", model, backbone, lesions.images[24:], "cpu")
    assert image_metrics(predicted, lesions[24:])["Dice"].mean() > 0.7 and instances == [[]] * 16


@pytest.mark.slow
def test_mask_rcnn_learns(backbone):
    lesions = squares(22, 48)
    recipe = Segment(px=48, epochs=10, batch=4, lr=4e-3)
    model = segmentation.train("maskrcnn", backbone, lesions[:16], recipe, 0, "cpu")
    predicted, instances = segmentation.predict("maskrcnn", model, backbone, lesions.images[16:], "cpu")
    assert image_metrics(predicted, lesions[16:])["Dice"].mean() > 0.5
    assert any(instances) and all(0 <= score <= 1 for one in instances for score, _ in one)
    found = coco.average_precision(lesions.masks[16:], instances, np.arange(6), draws=5)
    assert found["COCO AP50"].value > 0.1


def test_every_image_is_predicted_by_a_model_that_has_not_seen_its_group(downstream, backbone, tmp_path, monkeypatch):
    task = load(downstream)
    lesions = load_lesions(task, 32, tmp_path)
    images = lesions.images
    folds = make_folds(task.labels, task.groups, task.classes, 2, 0)
    seen = []

    def train(head, backbone, lesions, *_):
        seen.append({image.tobytes() for image in lesions.images})

    def predict(head, model, backbone, images, device):
        assert not seen[-1] & {image.tobytes() for image in images}
        return images < 60, [[[0.5, coco.encode(image < 60)]] for image in images]

    monkeypatch.setattr(segmentation, "train", train)
    monkeypatch.setattr(segmentation, "predict", predict)
    args = Cell(task, lesions, folds, backbone, 0, "cpu", tmp_path), "maskrcnn", 1.0, Segment(px=32)
    predicted, instances = segmentation.masks_out_of_fold(*args)
    assert len(seen) == 2 and np.array_equal(predicted, images < 60)
    assert instances == [[[0.5, coco.encode(image < 60)]] for image in images]
    again = segmentation.masks_out_of_fold(*args)  # nothing is trained again
    assert len(seen) == 2 and np.array_equal(again[0], predicted) and again[1] == instances
