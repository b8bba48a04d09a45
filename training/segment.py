"""Lesion segmentation on a backbone: Mask R-CNN with FPN (torchvision), and a light U-Net (segmentation-models-pytorch).

Every image of the test folds counts: where a model finds no lesion, Dice, PPV and sensitivity are 0.
"""

import contextlib
import hashlib
import io
import json
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from tqdm import tqdm

from training import intervals, tasks
from training.backbones import Backbone, load_backbone
from training.protocols import label_subset, save_atomically, to_input
from uscl_hub.preprocess import resize

HEADS = {"maskrcnn": "Mask R-CNN, FPN", "unet": "U-Net decoder"}
SHOWN = 6  # overlays kept for the report


@dataclass
class Segment:
    """How the segmentation heads are trained, all weights with the backbone's."""

    heads: tuple[str, ...] = ("unet",)
    """'unet' (light and fast), 'maskrcnn' (the paper's)."""
    px: int = 128
    """Side of the squashed images."""
    epochs: int = 10
    """Passes over the training folds."""
    lr: float = 1e-3
    """Adam's learning rate."""
    batch: int = 16
    """Images a step."""
    freeze: bool = False
    """Keep the backbone as it is and train the head only."""


def load_pairs(task: tasks.Task, px: int, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, px, px) images and bool (N, px, px) masks, several lesions merged; aligned with task.items after it.

    A mask that is unreadable, empty or of another size than its image moves the item to task.excluded.
    """
    masks, kept = [], []
    for item in task.items:
        try:
            with Image.open(item.path) as image:
                size = image.size
            merged = np.zeros((px, px), bool)
            for path in item.masks:
                with Image.open(path) as image:
                    if image.size != size:
                        raise ValueError(
                            f"{path.name} is {image.size[0]} x {image.size[1]}, its image {size[0]} x {size[1]}"
                        )
                    mask = (np.asarray(image.convert("L")) > 127).astype(np.uint8) * 255
                merged |= resize(mask, px) > 127
            if not merged.any():
                raise ValueError(f"the mask of {item.path.name} is empty")
        except (OSError, ValueError) as error:
            task.excluded.append((item.id, f"unusable mask: {error}"))
            continue
        masks.append(merged)
        kept.append(item)
    task.items = kept
    frames = tasks.load_frames(task, px, cache, workers=None)
    assert len(frames.images) == len(task.items)
    ids = {item.id: i for i, item in enumerate(kept)}
    return frames.images, np.stack([masks[ids[item.id]] for item in task.items])


# --------------------------------------------------------------------------------------------------------- models


class _Pyramid(nn.Module):
    """The backbone's feature maps (from stride 4) through an FPN, as torchvision's detectors want them."""

    def __init__(self, body: nn.Module, channels: list[int], width: int = 128):
        super().__init__()
        self.body, self.out_channels = body, width
        self.fpn = FeaturePyramidNetwork(channels, width, extra_blocks=LastLevelMaxPool())

    def forward(self, x):
        return self.fpn(OrderedDict((str(i), f) for i, f in enumerate(self.body(x))))


def _copy_weights(features: nn.Module, backbone: Backbone):
    """Every weight of the feature extractor comes from the backbone, or this says which does not."""
    state = backbone.model.state_dict()
    wanted = features.state_dict()
    missing = [key for key in wanted if key not in state or state[key].shape != wanted[key].shape]
    if missing:
        raise ValueError(
            f"{backbone.name}: {backbone.architecture} as features_only has weights that the backbone "
            f"lacks ({', '.join(missing[:4])}); segmentation needs a convolutional timm model"
        )
    features.load_state_dict({key: state[key] for key in wanted})


def build(head: str, backbone: Backbone, px: int) -> nn.Module:
    if head == "unet":
        model = smp.Unet(
            f"tu-{backbone.architecture}",
            encoder_weights=None,
            in_channels=3,
            classes=1,
            decoder_channels=(128, 64, 32, 16, 16),
        )
        _copy_weights(model.encoder.model, backbone)
        return model
    body = timm.create_model(backbone.architecture, features_only=True, out_indices=(1, 2, 3, 4))
    _copy_weights(body, backbone)
    sizes = tuple((px * share,) for share in (1 / 12, 1 / 6, 1 / 4, 1 / 2.5, 1 / 1.4))
    return MaskRCNN(
        _Pyramid(body, body.feature_info.channels()),
        num_classes=2,
        min_size=px,
        max_size=px,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,  # the input is normalised already
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        box_detections_per_img=10,
        rpn_pre_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=100,
        box_batch_size_per_image=64,
    )


def encoder_of(head: str, model: nn.Module) -> nn.Module:
    return model.encoder if head == "unet" else model.backbone.body


def _loss(head: str, model: nn.Module, x: torch.Tensor, mask: torch.Tensor, dice) -> torch.Tensor:
    if head == "unet":
        logits = model(x)[:, 0]
        return F.binary_cross_entropy_with_logits(logits, mask) + dice(logits[:, None], mask[:, None])
    targets = []
    for one in mask:
        rows, columns = torch.nonzero(one, as_tuple=True)
        box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        targets.append(
            {
                "boxes": box[None],
                "labels": torch.ones(1, dtype=torch.int64, device=x.device),
                "masks": one[None].to(torch.uint8),
            }
        )
    return sum(model(list(x), targets).values())


def train(
    head: str, backbone: Backbone, images: np.ndarray, masks: np.ndarray, recipe: Segment, seed: int, device: str
) -> nn.Module:
    """A head trained on the images with their masks (horizontal flips); Adam, one cycle of its rate."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(head, backbone, recipe.px).to(device).train()
        encoder = encoder_of(head, model)
        if recipe.freeze:
            encoder.requires_grad_(False)
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=recipe.lr)
        steps = recipe.epochs * -(-len(images) // recipe.batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=max(2, steps))
        dice = smp.losses.DiceLoss("binary")
        for _ in range(recipe.epochs):
            for index in torch.randperm(len(images)).split(recipe.batch):
                x = to_input(images[index.numpy()], backbone).to(device)
                mask = torch.from_numpy(masks[index.numpy()]).float().to(device)
                if torch.rand(()) < 0.5:
                    x, mask = x.flip(-1), mask.flip(-1)
                if recipe.freeze:
                    encoder.eval()
                if len(index) > 1:  # batch normalisation needs more than one image
                    loss = _loss(head, model, x, mask, dice)
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    optimiser.step()
                schedule.step()
    if not torch.isfinite(loss):
        raise FloatingPointError(f"{head} on {backbone.name} diverged: lower --segment.lr")
    return model.eval()


@torch.inference_mode()
def predict(
    head: str, model: nn.Module, backbone: Backbone, images: np.ndarray, device: str
) -> tuple[np.ndarray, list]:
    """bool (N, px, px) masks, and every image's instances as (score, COCO run-length mask); none for the U-Net."""
    predicted, instances = np.zeros(images.shape, bool), [[] for _ in images]
    for start in range(0, len(images), 32):
        x = to_input(images[start : start + 32], backbone).to(device)
        if head == "unet":
            predicted[start : start + 32] = (model(x)[:, 0] > 0).cpu().numpy()
            continue
        for i, found in enumerate(model(list(x)), start=start):
            soft, scores = found["masks"][:, 0].cpu().numpy(), found["scores"].cpu().numpy()
            for mask, score in zip(soft > 0.5, scores):
                instances[i].append((float(score), coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))))
                if score > 0.5:
                    predicted[i] |= mask
            if len(scores) and not predicted[i].any():  # every image of this task has a lesion
                predicted[i] = soft[0] > 0.5
    return predicted, instances


# -------------------------------------------------------------------------------------------------------- metrics


def image_metrics(predicted: np.ndarray, masks: np.ndarray) -> dict[str, np.ndarray]:
    """Dice, PPV and sensitivity of every image, float (N,) each; 0 where nothing is predicted."""
    stats = smp.metrics.get_stats(
        torch.from_numpy(predicted[:, None]).long(), torch.from_numpy(masks[:, None]).long(), mode="binary"
    )
    return {
        name: metric(*stats, reduction="none", zero_division=0.0).numpy()[:, 0]
        for name, metric in (
            ("Dice", smp.metrics.f1_score),
            ("PPV", smp.metrics.positive_predictive_value),
            ("sensitivity", smp.metrics.sensitivity),
        )
    }


class AveragePrecision:
    """COCO's mask AP (0.50:0.95) and AP50 of pooled images, matched once and accumulated again for every draw."""

    def __init__(self, masks: list[np.ndarray], instances: list[list]):
        truth, found = COCO(), []
        annotations = []
        for i, mask in enumerate(masks, start=1):
            code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": i,
                    "image_id": i,
                    "category_id": 1,
                    "iscrowd": 0,
                    "segmentation": code,
                    "area": float(mask.sum()),
                    "bbox": coco_mask.toBbox(code).tolist(),
                }
            )
            found += [
                {"image_id": i, "category_id": 1, "score": score, "segmentation": code}
                for score, code in instances[i - 1]
            ]
        truth.dataset = {
            "images": [{"id": i, "height": m.shape[0], "width": m.shape[1]} for i, m in enumerate(masks, start=1)],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "lesion"}],
            "info": {},
        }
        self.empty = not found
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            if not self.empty:
                self.evaluation = COCOeval(truth, truth.loadRes(found), "segm")
                self.evaluation.params.areaRng, self.evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
                self.evaluation.params.maxDets = [10]
                self.evaluation.evaluate()
                self.matches = list(self.evaluation.evalImgs)

    def __call__(self, multiplicity: np.ndarray) -> dict[str, float]:
        """multiplicity: int (images,). AP is 0 where there is no detection at all."""
        if self.empty:
            return {"COCO AP": 0.0, "COCO AP50": 0.0}
        repeated = np.repeat(np.arange(len(self.matches)), multiplicity)
        evaluation = self.evaluation
        evaluation.evalImgs = [self.matches[i] for i in repeated]
        evaluation.params.imgIds = evaluation._paramsEval.imgIds = list(range(1, len(repeated) + 1))
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.accumulate()
        precision = evaluation.eval["precision"]  # (IoU, recall, class, area, maxDets), -1 where undefined
        return {"COCO AP": float(precision.mean()), "COCO AP50": float(precision[0].mean())}


def rows(config, task: tasks.Task, spec: str, name: str, device: str, cache: Path, arrays: dict):
    """Yields one (row of results.json, its Estimates) for every head and label fraction."""
    recipe = config.segment
    images, masks = load_pairs(task, recipe.px, cache)
    labels, groups = task.labels, task.groups
    tasks.check_excluded(task, config.max_excluded)
    for head in recipe.heads:
        for fraction in config.fractions:
            pooled, found = [], []
            for seed in config.seeds:
                folds = tasks.make_folds(labels, groups, task.classes, config.folds, seed, task.title)
                arrays[f"folds/{task.name}/{seed}"] = folds
                backbone = load_backbone(spec, seed, recipe.px)
                predicted, instances = np.zeros(masks.shape, bool), [[] for _ in masks]
                for fold in tqdm(range(config.folds), f"{task.name} {name} {head} {fraction:.0%} seed {seed}"):
                    one, several = _fold(
                        config,
                        head,
                        backbone,
                        images,
                        masks,
                        labels,
                        groups,
                        folds,
                        fold,
                        fraction,
                        seed,
                        device,
                        cache,
                        task,
                    )
                    predicted[folds == fold] = one
                    for i, value in zip(np.flatnonzero(folds == fold), several):
                        instances[i] = value
                pooled.append(predicted)
                found += instances
            shown = np.linspace(0, len(images) - 1, SHOWN).round().astype(int)
            arrays[f"overlay/{task.name}/{name}/{head}/{fraction:g}"] = np.stack(
                [images[shown], masks[shown] * np.uint8(255), pooled[0][shown] * np.uint8(255)], axis=1
            )
            yield _row(
                config,
                task,
                name,
                head,
                fraction,
                np.concatenate(pooled),
                np.tile(masks, (len(pooled), 1, 1)),
                found,
                np.tile(groups, len(pooled)),
            )


def _row(config, task, name, head, fraction, predicted, masks, instances, groups):
    values = image_metrics(predicted, masks)
    estimates = intervals.mean_of_rows(values, groups, config.draws)
    if head == "maskrcnn":
        precision, (unique, group) = AveragePrecision(list(masks), instances), np.unique(groups, return_inverse=True)
        estimates |= intervals.bootstrap(lambda counts: precision(counts[group]), len(unique), config.draws)
    return {
        "task": task.name,
        "backbone": name,
        "protocol": head,
        "fraction": fraction,
        "level": "image",
        "n": len(task.items),
        "groups": len(set(groups)),
        "found": task.found,
        "excluded": len(task.excluded),
        "metrics": {key: e.to_dict() for key, e in estimates.items()},
    }, estimates


def _fold(config, head, backbone, images, masks, labels, groups, folds, fold, fraction, seed, device, cache, task):
    recipe = {**asdict(config.segment), "heads": head}
    content = hashlib.sha256(images.tobytes() + masks.tobytes()).hexdigest()
    described = [backbone.sha, content, folds.tolist(), fold, fraction, seed, recipe]
    file = cache / f"segment-{hashlib.sha256(json.dumps(described).encode()).hexdigest()[:20]}.npz"
    test = folds == fold
    if not file.exists():
        training = np.flatnonzero(~test)
        training = training[label_subset(labels[training], groups[training], fraction, seed)]
        assert not set(groups[training]) & set(groups[test])
        model = train(head, backbone, images[training], masks[training], config.segment, seed, device)
        predicted, instances = predict(head, model, backbone, images[test], device)
        text = json.dumps(
            [[(score, [*code["size"]], code["counts"].decode()) for score, code in one] for one in instances]
        )
        save_atomically(file, lambda f: np.savez_compressed(f, predicted=predicted, instances=np.array(text)))
    with np.load(file) as saved:
        instances = [
            [(score, {"size": size, "counts": counts.encode()}) for score, size, counts in one]
            for one in json.loads(str(saved["instances"]))
        ]
        return saved["predicted"], instances
