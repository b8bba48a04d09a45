"""The training loop, and what it starts from."""

import contextlib
import math
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from training import distributed
from training.config import Config, training_pairs
from training.data import batches, faults
from training.data.dataset import Clips
from training.engine import sources
from training.engine.distil import Distillation
from training.engine.log import Log
from training.engine.state import Diverged, State, fixed, save
from training.engine.validation import validate
from training.messages import one_line, say, signals_set
from training.method.networks import CMWNet, Encoder, StatisticsNet, input_channels
from training.method.step import Learner, Step, contrastive_step, delayed_step, exact_step
from training.method.weighting import Weighting
from uscl_hub.errors import UserError
from uscl_hub.models import size_arguments


def build(config: Config, clips: Clips, device: torch.device) -> State:
    """Networks and optimizers at step 0. Raises UserError: the model cannot be made, or not for this size."""
    torch.manual_seed(config.seed)
    encoder = make_encoder(config.model).to(device, memory_format=torch.channels_last).train()
    cmw = cmw_optimizer = None
    if config.method == "meta_uscl":
        hidden = config.meta.hidden
        statistics = config.meta.input == "statistics"
        cmw = (StatisticsNet(hidden) if statistics else CMWNet(encoder.num_features, hidden)).to(device)
        try:
            encoder.last(config.meta.depth)
        except ValueError as error:
            raise UserError(f"meta.depth {config.meta.depth}: {error}") from error
        cmw_optimizer = torch.optim.Adam(cmw.parameters(), lr=config.meta.lr)
    optimizer = (adamw if config.method == "distil" else sgd)(encoder, config.optim, held(encoder, config.model))
    return State(encoder, cmw, optimizer, cmw_optimizer, fixed(config, clips))


def start(state: State, config: Config, clips: Clips, device: torch.device) -> Distillation | None:
    """Load what a training starts from (model.init) and learns from (distil.teachers); note it. Raises UserError."""
    if config.model.init:
        source = sources.load(config.model.init)
        sources.initialise(state.encoder.backbone, source)
        state.parents.append({"role": "init", **source.about})
    elif config.model.pretrained:
        state.parents.append({"role": "init", **sources.about_pretrained(state.encoder.backbone)})
    if config.method != "distil" and not config.distil.weight:
        return None
    distillation = Distillation(config, clips, state.encoder, device)
    state.parents += [{"role": "teacher", **about} for about in distillation.parents]
    state.distiller = distillation.distiller
    if config.method == "distil":
        head = {"params": list(state.distiller.head.parameters()), "weight_decay": config.optim.weight_decay}
        state.optimizer.add_param_group(head)
    else:
        state.distiller_optimizer = distillation.optimizer
    return distillation


def held(encoder, model):
    """The parameters of the stages that model.hold keeps."""
    try:
        return encoder.hold(model.hold)
    except ValueError as error:
        raise UserError(f"model.hold {model.hold}: {error}") from error


def make_encoder(model):
    try:
        encoder = Encoder(model.name, model.dim, pretrained=model.pretrained, **size_arguments(model.name, model.size))
    except (OSError, RuntimeError) as error:  # no such weights, or no network to fetch them
        message = f"model: cannot make {model.name} with pretrained {model.pretrained}: {one_line(error)}"
        raise UserError(message) from error
    try:
        with torch.no_grad():
            encoder.eval()(torch.zeros(2, input_channels(encoder), model.size, model.size))
    except (RuntimeError, ValueError, AssertionError) as error:
        message = f"model: {model.name} does not take images of model.size = {model.size}: {one_line(error)}"
        raise UserError(message) from error
    return encoder


def sgd(encoder, optim, kept=()):
    """SGD; the parameters in `kept` are in a group whose learning rate is 0 (scale)."""
    free = [p for p in encoder.parameters() if p not in kept]
    decay = [p for p in free if p.ndim > 1 or optim.decay_norm_and_bias]
    spared = [p for p in free if p.ndim <= 1 and not optim.decay_norm_and_bias]
    groups = [{"params": decay, "weight_decay": optim.weight_decay}]
    groups += [{"params": spared, "weight_decay": 0.0}] if spared else []
    groups += [{"params": [p for p in encoder.parameters() if p in kept], "scale": 0.0}] if kept else []
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)


def adamw(encoder, optim, kept=()):
    """AdamW of the backbone: the projector takes no part in a distillation."""
    free = [p for p in encoder.backbone.parameters() if p not in kept]
    groups = [{"params": [p for p in free if p.ndim > 1], "weight_decay": optim.weight_decay}]
    groups += [{"params": [p for p in free if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim.lr)


class Schedule(NamedTuple):
    """Steps of the whole training, of its warm-up and of an epoch."""

    total: int
    warmup: int
    epoch: int


def schedule(config: Config, clips: Clips) -> Schedule:
    epoch = len(clips.train) // config.optim.batch
    total = config.optim.steps or config.optim.epochs * epoch
    return Schedule(total, min(int(config.optim.warmup_epochs * epoch), total // 10), epoch)


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then a half cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak / 2 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class Loaded(NamedTuple):
    """A step's clips (indices), their pairs, and the clean pairs of held-out clips where CMW-Net is updated.

    plain: the step belongs to the plain ones before the weights (meta.warmup).
    """

    clips: np.ndarray
    pairs: batches.Batch
    clean: batches.Batch | None
    plain: bool = False

    @property
    def faults(self):
        return self.pairs.faults


def loader(config: Config, clips: Clips):
    """A function of the step that loads this rank's share of it."""
    pairs, one_frame = training_pairs(config), replace(config.pairs, frames=1)
    meta_batch = config.meta.batch or config.optim.batch
    part, meta_part = distributed.share(config.optim.batch), distributed.share(meta_batch)
    sources_of_train = clips.cache.source_numbers[clips.train]
    wrong = faults.plant(clips.cache, clips.train, config.pairs, config.seed)
    plain = round(config.meta.warmup * schedule(config, clips).total)

    def load(step):
        if config.data.balance:
            names, balance = sources_of_train, config.data.balance
            chosen = batches.balanced_clips(clips.train, names, balance, step, config.optim.batch, config.seed)
        else:
            chosen = batches.train_clips(clips.train, step, config.optim.batch, config.seed)
        batch = batches.make_batch(clips.cache, chosen, pairs, (config.seed, batches.TRAIN, step), part, wrong)
        if config.method != "meta_uscl" or step < plain or step % config.meta.every:
            return Loaded(chosen, batch, None, step < plain)
        held_out = batches.meta_clips(clips.meta, step, meta_batch, config.seed)
        key = (config.seed, batches.META, step)
        return Loaded(chosen, batch, batches.make_batch(clips.cache, held_out, one_frame, key, meta_part))

    return load


def train(state: State, config: Config, clips: Clips, out, device: torch.device, distillation=None) -> bool:
    """Run the remaining steps. Returns False when a signal ended it early (the checkpoint is written).

    Raises UserError: it diverged; the message says from which step the checkpoint is.
    """
    try:
        return loop(state, config, clips, out, device, distillation)
    except Diverged as error:
        raise error.ended(state) from None


def loop(state: State, config: Config, clips: Clips, out, device: torch.device, distillation=None) -> bool:
    total, warmup, epoch = schedule(config, clips)
    log = Log(out, state.step, total)
    load = distillation.load if config.method == "distil" else loader(config, clips)
    upcoming = batches.prefetch(load, range(state.step, total))
    crops = contextlib.closing(distillation) if distillation else contextlib.nullcontext()
    images = distillation.crops if config.method == "distil" else 2 * config.optim.batch
    with signals_set() as stopped, contextlib.closing(log), contextlib.closing(upcoming), crops:
        while state.step < total:
            start = time.perf_counter()
            loaded = next(upcoming)
            waited = time.perf_counter() - start

            # Each step has its own seed (dropout and the like): a resumed run needs no state of random numbers.
            torch.manual_seed(config.seed * 1_000_003 + state.step)
            lr = learning_rate(state.step, total, warmup, config.optim.lr)
            for group in state.optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1.0)

            result = step(state, config, loaded, device, distillation)
            state.step += 1
            loss = result.loss.item()  # waits for the device
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss}")
            seconds = time.perf_counter() - start
            speed = {"images_per_s": images / seconds, "wait_share": waited / seconds}
            log.step(state.step, loss, result, loaded, {"lr": lr, **speed})

            last = state.step == total
            stop = distributed.any_(stopped.is_set(), device)
            if last or state.step % (config.eval_epochs * epoch) == 0:
                distributed.average_buffers(state.encoder)
                if distributed.rank() == 0:
                    log.check(state.step, validate(state.encoder, config, clips, device, distillation))
            if stop or last or state.step % config.save_every == 0:
                distributed.average_buffers(state.encoder)
                if distributed.rank() == 0:
                    log.flush()  # first: a resumed run keeps the rows up to its checkpoint
                    save(state, out / "checkpoint.pt")
                distributed.barrier()
            if stop and not last:
                say(f"stopped by a signal at step {state.step} of {total}; go on with --resume")
                return False
    return True


def learner_of(state: State, config: Config) -> Learner:
    """What learns by the method's step, with the configured objective."""
    weighting = Weighting(config.meta.input, config.meta.by_source, config.loss.weights == "distance")
    return Learner(
        state.encoder,
        state.optimizer,
        state.cmw,
        state.cmw_optimizer,
        config.optim.temperature,
        config.loss.decoupled,
        config.meta.tangent,
        config.meta.depth,
        weighting,
        config.precision == "bf16",
    )


def step(state: State, config: Config, loaded, device: torch.device, distillation=None) -> Step:
    """One step of the configured method."""
    if config.method == "distil":
        return distillation.step(state, loaded)
    learner = learner_of(state, config)
    if loaded.plain:
        learner = replace(learner, cmw=None)
    anchor = None
    if distillation:
        anchor = dict(zip(learner.parameters, distillation.gradients(state.encoder, state.step)))
    size, channels = config.model.size, input_channels(state.encoder)
    views, about = loaded.pairs.views(device, size, channels), loaded.pairs.about.to(device)
    if loaded.clean is None:
        return contrastive_step(learner, views, anchor, about)
    clean = loaded.clean.views(device, size, channels)
    if config.meta.delayed:
        return delayed_step(learner, views, clean, anchor, about)
    return exact_step(learner, views, clean, anchor, config.meta.shuffle, about)
