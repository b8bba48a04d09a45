"""Lesion segmentation on a backbone: Mask R-CNN with FPN (torchvision) and a light U-Net decoder (smp).

Every image of the test folds counts: where a model finds no lesion, Dice, PPV and sensitivity are 0.
"""

import json
from collections import OrderedDict
from dataclasses import asdict, dataclass

import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, masks_to_boxes
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from training.evaluation.backbones import Backbone
from training.evaluation.coco import encode
from training.evaluation.features import to_input
from training.evaluation.frames import cached
from training.evaluation.lesions import Lesions
from training.evaluation.protocols import Cell, training_items
from training.evaluation.task import EvaluationError
from training.method.fast_convolution import FastWeightGradients

HEADS = ("unet", "maskrcnn")
WIDTH = 128  # channels of the pyramid and of the Mask R-CNN's heads


@dataclass
class Segment:
    """How the segmentation heads are trained, all weights with the backbone's: Adam, one cycle of its rate."""

    heads: tuple[str, ...] = ("unet",)
    """'unet' (light and fast), 'maskrcnn' (the paper's)."""
    px: int = 128
    """Side of the squashed images."""
    epochs: int = 10
    """Passes over the training folds."""
    lr: float = 1e-3
    """Adam's peak learning rate."""
    batch: int = 16
    """Images a step."""


# --------------------------------------------------------------------------------------------------------- models


class _Pyramid(nn.Module):
    """The backbone's feature maps (strides 4 to 32) through an FPN, as torchvision's detectors want them."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body, self.out_channels = body, WIDTH
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), WIDTH, extra_blocks=LastLevelMaxPool())

    def forward(self, x):
        return self.fpn(OrderedDict((str(i), f) for i, f in enumerate(self.body(x))))


def features_only(backbone: Backbone) -> nn.Module:
    """The backbone as timm's features_only model of four maps, strides 4 to 32; every weight is the backbone's."""
    try:
        model = timm.create_model(backbone.architecture, features_only=True, out_indices=(-4, -3, -2, -1))
        strides = model.feature_info.reduction()
    except (RuntimeError, AttributeError, AssertionError, IndexError) as error:  # timm's ways to say no
        strides = f"none ({error})"
    if strides != [4, 8, 16, 32]:
        raise EvaluationError(
            f"{backbone.name}: {backbone.architecture} has no feature maps at strides 4, 8, 16 and 32, but {strides}; "
            "it cannot be tried on segmentation"
        )
    copy_weights(model, backbone.model)
    return model


def copy_weights(features: nn.Module, model: nn.Module):
    """Load a features_only model with the model's weights. Its names may be flattened: stages.0 is stages_0."""
    state = {key.replace(".", "_"): value for key, value in model.state_dict().items()}
    features.load_state_dict({key: state[key.replace(".", "_")] for key in features.state_dict()})


def build(head: str, backbone: Backbone, px: int) -> nn.Module:
    """The segmentation model of images (B, 3, px, px), its encoder a copy of the backbone."""
    body = features_only(backbone)
    if head == "unet":
        width = (128, 64, 32, 16, 16)
        model = smp.Unet(f"tu-{backbone.architecture}", encoder_weights=None, decoder_channels=width)
        copy_weights(model.encoder.model, backbone.model)
        return model
    sizes = tuple((px * share,) for share in (1 / 12, 1 / 6, 1 / 4, 1 / 2.5, 1 / 1.4))
    return MaskRCNN(
        _Pyramid(body),
        min_size=px,
        max_size=px,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,  # the input is normalised already
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        # heads of a quarter of torchvision's width: its mask head costs more than everything else together
        box_head=TwoMLPHead(WIDTH * 7**2, 256),
        box_predictor=FastRCNNPredictor(256, 2),
        mask_head=MaskRCNNHeads(WIDTH, (WIDTH, WIDTH), 1),
        mask_predictor=MaskRCNNPredictor(WIDTH, WIDTH, 2),
        box_detections_per_img=10,  # one lesion an image: torchvision's numbers are for crowded photographs
        rpn_pre_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=100,
        box_batch_size_per_image=32,
    )


def _loss(head: str, model: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if head == "unet":
        logits, target = model(x), mask[:, None].float()
        return F.binary_cross_entropy_with_logits(logits, target) + smp.losses.DiceLoss("binary")(logits, target)
    boxes = masks_to_boxes(mask) + torch.tensor([0, 0, 1, 1], device=x.device)  # the far side included
    one = torch.ones(1, dtype=torch.int64, device=x.device)
    targets = [{"boxes": b[None], "labels": one, "masks": m[None].byte()} for b, m in zip(boxes, mask)]
    return sum(model(list(x), targets).values())


def train(head: str, backbone: Backbone, lesions: Lesions, recipe: Segment, seed: int, device: str) -> nn.Module:
    """A head on the backbone, trained on the images with their masks and random horizontal flips; in eval mode."""
    images, masks = lesions.images, lesions.masks
    with torch.random.fork_rng(devices=[]), FastWeightGradients():
        torch.manual_seed(seed)
        model = build(head, backbone, recipe.px).to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
        batches = -(-len(images) // recipe.batch)  # equal ones: batch normalisation needs more than one image
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.lr, total_steps=max(2, recipe.epochs * batches)
        )
        for _ in range(recipe.epochs):
            for index in torch.randperm(len(images)).tensor_split(batches):
                x = to_input(images[index.numpy()], backbone).to(device)
                mask = torch.from_numpy(masks[index.numpy()]).to(device)
                flip = (torch.rand(len(x), 1, 1) < 0.5).to(device)
                x, mask = torch.where(flip[:, None], x.flip(-1), x), torch.where(flip, mask.flip(-1), mask)
                loss = _loss(head, model, x, mask)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
    if not torch.isfinite(loss):
        raise EvaluationError(f"{head} on {backbone.name} diverged: lower --segment.lr")
    return model.eval()


@torch.inference_mode()
def predict(
    head: str, model: nn.Module, backbone: Backbone, images: np.ndarray, device: str
) -> tuple[np.ndarray, list[list]]:
    """bool (N, px, px) masks, and every image's instances as [score, COCO run-length mask]; none for the U-Net."""
    predicted, instances = np.zeros(images.shape, bool), [[] for _ in images]
    for start in range(0, len(images), 32):
        x = to_input(images[start : start + 32], backbone).to(device)
        if head == "unet":
            predicted[start : start + 32] = (model(x)[:, 0] > 0).cpu().numpy()
            continue
        for i, found in enumerate(model(list(x)), start=start):
            soft, scores = found["masks"][:, 0].cpu().numpy() > 0.5, found["scores"].tolist()
            instances[i] = [[score, encode(mask)] for mask, score in zip(soft, scores)]
            if scores:  # every image of this task has a lesion: the surest one, and all that are likely
                predicted[i] = soft[[j == 0 or score > 0.5 for j, score in enumerate(scores)]].any(0)
    return predicted, instances


# ------------------------------------------------------------------------------------------------ out-of-fold runs


def masks_out_of_fold(
    cell: Cell, head: str, fraction: float, recipe: Segment, done=lambda: None
) -> tuple[np.ndarray, list[list]]:
    """Masks, bool (N, px, px), and instances of every image from a model that has not seen its fold; see `predict`.

    cell.data: the Lesions of cell.task. Images that are never tested have no mask.
    """
    lesions, task, folds, backbone = cell.data, cell.task, cell.folds, cell.backbone
    predicted, instances = np.zeros(lesions.masks.shape, bool), [[] for _ in lesions.masks]
    settings = {**asdict(recipe), "heads": head}
    described = ["segment", *backbone.key, lesions.key, folds.tolist()]
    described += [task.groups.tolist(), task.strata.tolist()]
    for fold in range(folds.max() + 1):
        test, training = folds == fold, training_items(task, folds, fold, fraction, cell.seed)
        assert not set(task.groups[training]) & set(task.groups[test])

        def make():
            model = train(head, backbone, lesions[training], recipe, cell.seed, cell.device)
            mask, found = predict(head, model, backbone, lesions.images[test], cell.device)
            return {"mask": mask, "found": np.array(json.dumps(found))}

        saved = cached(cell.cache, [*described, fold, fraction, cell.seed, settings], make)
        predicted[test] = saved["mask"]
        for i, found in zip(np.flatnonzero(test), json.loads(str(saved["found"]))):
            instances[i] = found
        done()
    return predicted, instances
