"""Training the last stages or the whole network: AdamW, layer-wise decay of the learning rate, warm-up, cosine."""

import contextlib
import copy
import math
import statistics
import time
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from training.evaluation.backbones import Backbone
from training.evaluation.features import to_input
from training.method.fast_convolution import FastWeightGradients
from training.tuning import unet
from training.tuning.augment import augment
from training.tuning.pixels import Pixels
from training.tuning.problem import Problem
from training.tuning.recipes import BATCH, WARM_UP, WEIGHT_DECAY, Recipe, freeze
from uscl_hub.errors import UserError
from uscl_hub.labels import Labels
from uscl_hub.registry import plain_name

FRAMES = 8  # of an item in one epoch, at most
DRAWS = 512  # frames in one epoch, at least: a small set is gone through several times
TIMED = 5  # steps for an estimate


@dataclass(frozen=True)
class Setting:
    """All that a training depends on beside which items it may see."""

    backbone: Backbone
    problem: Problem
    found: Labels
    pixels: Pixels
    seed: int
    device: str


def build(backbone: Backbone, problem: Problem) -> nn.Module:
    """A copy of the backbone with a new head, of torch's generator; a U-Net for segmentation."""
    if problem.task == "segmentation":
        return unet.build(plain(backbone), backbone.model, problem.outputs)
    model = copy.deepcopy(backbone.model)
    model.reset_classifier(problem.outputs)
    return model


def plain(backbone: Backbone) -> str:
    """Its architecture as timm alone knows it."""
    return plain_name(backbone.architecture)


class Diverged(UserError):
    """A training whose loss is no number any more."""


def train(setting: Setting, recipe: Recipe, items: np.ndarray, epochs: int, check: Callable = None) -> nn.Module:
    """Train on the frames of `items`.

    Args:
        items: int, indices into setting.found.
        epochs: how many of the schedule's recipe.epochs are done: fewer stop early.
        check: called with (epochs done, model in eval mode) after every epoch.

    Returns:
        The model in eval mode. Raises Diverged if the loss is not finite.
    """
    problem, device = setting.problem, setting.device
    with _seeded(setting.seed, device), FastWeightGradients():
        model = build(setting.backbone, problem).to(device, memory_format=torch.channels_last)
        steps = math.ceil(in_epoch(setting, items) / BATCH)
        optimizer, schedule = _optimizer(model, recipe, steps * recipe.epochs)
        scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
        step = 0
        for epoch in range(epochs):
            model.train()
            freeze(model, recipe.depth)
            frames = epoch_frames(setting, items, torch.initial_seed() + epoch)
            for index in np.array_split(frames, steps):  # equal batches: batch norm has no statistics of one left over
                schedule.step_update(step)
                loss = _step(model, setting, index, optimizer, scaler)
                step += 1
            if not torch.isfinite(loss):
                raise Diverged(f"{setting.backbone.name}, {recipe.name}: the loss became {float(loss)}: left out")
            model.eval()
            if check:
                check(epoch + 1, model)
    return model.eval().requires_grad_(True)


def _step(model: nn.Module, setting: Setting, index: np.ndarray, optimizer, scaler) -> torch.Tensor:
    loss = _loss(model, setting, index)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def seconds(setting: Setting, recipe: Recipe) -> tuple[float, float]:
    """Of training on one frame and of predicting one: medians of a few batches."""
    index = np.resize(np.arange(len(setting.pixels.images)), BATCH)
    device, trained, looked = setting.device, [], []
    with _seeded(setting.seed, device), FastWeightGradients():
        model = build(setting.backbone, setting.problem).to(device, memory_format=torch.channels_last).train()
        optimizer, _ = _optimizer(model, recipe, TIMED)
        scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
        for _ in range(TIMED):
            model.train()
            freeze(model, recipe.depth)
            begun = time.monotonic()
            float(_step(model, setting, index, optimizer, scaler))  # waits for a GPU
            trained.append((time.monotonic() - begun) / BATCH)
            model.eval()
            begun = time.monotonic()
            predict(model, setting, index)
            looked.append((time.monotonic() - begun) / BATCH)
    return statistics.median(trained), statistics.median(looked)


def _loss(model: nn.Module, setting: Setting, index: np.ndarray) -> torch.Tensor:
    """Of one batch of frames, augmented, in mixed precision on a GPU."""
    pixels, problem, device = setting.pixels, setting.problem, setting.device
    masks = torch.from_numpy(pixels.masks[index]) if problem.task == "segmentation" else None
    images, masks = augment(torch.from_numpy(pixels.images[index]), masks)
    target = masks if masks is not None else torch.from_numpy(problem.encode(setting.found.targets)[pixels.item[index]])
    x = to_input(images.numpy(), setting.backbone).to(device, memory_format=torch.channels_last)
    with torch.autocast(device, enabled=device == "cuda", dtype=torch.float16):
        logits = model(x)
    return problem.loss(logits.float(), target.to(device))


def _optimizer(model: nn.Module, recipe: Recipe, steps: int):
    freeze(model, recipe.depth)
    groups = param_groups_layer_decay(model, WEIGHT_DECAY, layer_decay=recipe.decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    warm = max(1, round(WARM_UP * steps))
    schedule = CosineLRScheduler(
        optimizer, max(2, steps), warmup_t=warm, warmup_lr_init=recipe.lr / 20, warmup_prefix=False, t_in_epochs=False
    )
    return optimizer, schedule


def in_epoch(setting: Setting, items: np.ndarray) -> int:
    """How many frames an epoch shows: at most FRAMES of an item, as often as DRAWS asks for."""
    once = int(np.bincount(setting.pixels.item)[items].clip(max=FRAMES).sum())
    return once * max(1, round(DRAWS / once))


def epoch_frames(setting: Setting, items: np.ndarray, seed: int) -> np.ndarray:
    """The frames of one epoch, int (in_epoch,), shuffled."""
    rng = np.random.default_rng(seed)
    frames, chosen = [np.flatnonzero(setting.pixels.item == item) for item in items], []
    total = in_epoch(setting, items)
    while len(chosen) < total:
        taken = [f if len(f) <= FRAMES else rng.choice(f, FRAMES, replace=False) for f in frames]
        chosen.extend(rng.permutation(np.concatenate(taken)))
    return np.array(chosen)


@contextlib.contextmanager
def _seeded(seed: int, device: str):
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.inference_mode()
def predict(model: nn.Module, setting: Setting, frames: np.ndarray, batch: int = 64) -> np.ndarray:
    """Logits of some frames, float32 (N, outputs); segmentation: float16 (N, 1, px, px)."""
    kind = np.float16 if setting.problem.task == "segmentation" else np.float32
    out = []
    for start in range(0, len(frames), batch):
        x = to_input(setting.pixels.images[frames[start : start + batch]], setting.backbone)
        x = x.to(setting.device, memory_format=torch.channels_last)
        with torch.autocast(setting.device, enabled=setting.device == "cuda", dtype=torch.float16):
            out.append(model(x).float().cpu().numpy().astype(kind))
    return np.concatenate(out)
