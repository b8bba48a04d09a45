"""Train Meta-USCL: `python training/run.py [--config FILE.yaml] [--dotted.override VALUE ...]`.

Clips -> frame cache -> groups and splits -> training -> export -> check of the export. Without --config and
data.roots it runs the demo on simulated clips (training/configs/demo.yaml).
"""

import contextlib
import errno
import hashlib
import json
import math
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402

from training import config as configs  # noqa: E402
from training import distributed  # noqa: E402
from training.data import batches  # noqa: E402
from training.data.dataset import prepare  # noqa: E402
from training.engine import (
    export,  # noqa: E402
    figures,  # noqa: E402
    probe,  # noqa: E402
)
from training.engine.checks import check  # noqa: E402
from training.engine.log import Log, one_line, say  # noqa: E402
from training.engine.state import State, find_checkpoint, fixed, restore, save  # noqa: E402
from training.engine.validation import DIVERGED, probe_backbone, validate  # noqa: E402
from training.method.networks import CMWNet, Encoder, input_channels, input_size  # noqa: E402
from training.method.step import contrastive_step, meta_step  # noqa: E402
from uscl_hub import files  # noqa: E402

DEMO = Path(__file__).parent / "configs" / "demo.yaml"


def main(config):
    device = distributed.setup(config.device)
    check(config)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"out: {out} cannot be made a folder ({error.strerror})")
    with locked(out), full_disk():
        checkpoint = find_checkpoint(config, out)
        clips = prepare(config, out)
        state = build(config, clips, device)
        if checkpoint:
            restore(state, checkpoint)
        if distributed.rank() == 0:
            configs.dump(config, out / "config.yaml")
        if not train(state, config, clips, out, device):
            return  # stopped by a signal, saved
        if distributed.rank() == 0:
            finish(state, config, clips, out, device)


@contextlib.contextmanager
def full_disk():
    """Ends the run with a message where a file cannot be written for want of space."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"{error}. The last checkpoint, if any, is intact: make room and go on with --resume True")


@contextlib.contextmanager
def locked(out):
    """One run an output folder: a second one is refused."""
    if distributed.rank() != 0:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(out))
        except files.InUse as error:
            sys.exit(f"out: {error}")
        yield


# Training -----------------------------------------------------------------------------------------------------


def build(config, clips, device):
    torch.manual_seed(config.seed)
    model = config.model
    try:
        encoder = Encoder(model.name, model.dim, pretrained=model.pretrained, **input_size(model))
    except (OSError, RuntimeError) as error:  # no such weights, or no network to fetch them
        sys.exit(f"model: cannot make {model.name} with pretrained {model.pretrained}: {one_line(error)}")
    try:
        with torch.no_grad():
            encoder.eval()(torch.zeros(2, input_channels(encoder), model.size, model.size))
    except (RuntimeError, ValueError, AssertionError) as error:
        sys.exit(f"model: {model.name} does not take images of model.size = {model.size}: {one_line(error)}")
    encoder = encoder.to(device, memory_format=torch.channels_last).train()
    optim = config.optim
    decay = [p for p in encoder.parameters() if p.ndim > 1 or optim.decay_norm_and_bias]
    spared = [p for p in encoder.parameters() if p.ndim <= 1 and not optim.decay_norm_and_bias]
    groups = [{"params": decay, "weight_decay": optim.weight_decay}]
    groups += [{"params": spared, "weight_decay": 0.0}] if spared else []
    optimizer = torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    cmw = cmw_optimizer = None
    if config.method == "meta_uscl":
        cmw = CMWNet(encoder.num_features, config.meta.hidden).to(device)
        cmw_optimizer = torch.optim.Adam(cmw.parameters(), lr=config.meta.lr)
    return State(encoder, cmw, optimizer, cmw_optimizer, fixed(config, clips))


def learning_rate(step, total, warmup, peak):
    """Linear warm-up over `warmup` steps, then a half cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak / 2 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def train(state, config, clips, out, device):
    """Run the remaining steps. Returns False when a signal ended it early (the checkpoint is written)."""
    optim, meta = config.optim, config.meta
    pairs, clean = configs.training_pairs(config), replace(config.pairs, frames=1)
    epoch = len(clips.train) // optim.batch
    total = optim.steps or optim.epochs * epoch
    warmup = min(int(optim.warmup_epochs * epoch), total // 10)
    channels = input_channels(state.encoder)
    meta_batch = meta.batch or optim.batch
    part, meta_part = distributed.share(optim.batch), distributed.share(meta_batch)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

    def updates_cmw(step):
        return config.method == "meta_uscl" and step % meta.every == 0

    def load(step):
        chosen = batches.train_clips(clips.train, step, optim.batch, config.seed)
        batch = batches.make_batch(clips.cache, chosen, pairs, (config.seed, batches.TRAIN, step), part)
        if not updates_cmw(step):
            return chosen, batch, None
        held_out = batches.meta_clips(clips.meta, step, meta_batch, config.seed)
        return (
            chosen,
            batch,
            batches.make_batch(clips.cache, held_out, clean, (config.seed, batches.META, step), meta_part),
        )

    log = Log(out, state.step, total)
    with (
        stop_signals() as stopped,
        contextlib.closing(log),
        contextlib.closing(batches.prefetch(load, range(state.step, total))) as upcoming,
    ):
        while state.step < total:
            start = time.perf_counter()
            chosen, batch, meta_batch_ = next(upcoming)
            waited = time.perf_counter() - start
            torch.manual_seed(config.seed * 1_000_003 + state.step)  # dropout and the like, if the backbone has any
            lr = learning_rate(state.step, total, warmup, optim.lr)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            views = batch.views(device, config.model.size, channels)
            with autocast:
                if meta_batch_ is not None:
                    clean_views = meta_batch_.views(device, config.model.size, channels)
                    result = meta_step(
                        state.encoder,
                        state.cmw,
                        state.optimizer,
                        state.cmw_optimizer,
                        views,
                        clean_views,
                        optim.temperature,
                        meta.delayed,
                        meta.tangent,
                        meta.shuffle,
                    )
                else:
                    result = contrastive_step(state.encoder, state.optimizer, views, optim.temperature, state.cmw)
            loss = result.loss.item()
            state.step += 1
            if not math.isfinite(loss):
                sys.exit(f"step {state.step}: the loss is {loss}; {DIVERGED}")
            seconds = time.perf_counter() - start
            log.step(
                state.step,
                loss,
                lr,
                optim.batch / seconds,
                result,
                result.meta_seconds / seconds,
                waited / seconds,
                chosen,
            )

            last = state.step == total
            stop = distributed.any_(stopped.is_set(), device)
            if last or state.step % (config.eval_epochs * epoch) == 0:
                distributed.average_buffers(state.encoder)
                if distributed.rank() == 0:
                    log.check(state.step, validate(state.encoder, config, clips, device))
            if stop or last or state.step % config.save_every == 0:
                distributed.average_buffers(state.encoder)
                if distributed.rank() == 0:
                    log.flush()
                    save(state, out / "checkpoint.pt")
                distributed.barrier()
            if stop and not last:
                say(f"stopped by a signal at step {state.step} of {total}; go on with --resume True")
                return False
    return True


@contextlib.contextmanager
def stop_signals():
    """SIGTERM and SIGINT let the running step end; the caller then saves and leaves. A second one kills."""
    event = threading.Event()

    def handler(number, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# The end ------------------------------------------------------------------------------------------------------


def finish(state, config, clips, out, device):
    """Figures, export, check of the export, comparison with random initialisation."""
    log = figures.read_log(out / "log.jsonl")
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    figures.loss_curves(log, folder / "loss.png")
    if state.cmw is not None:
        figures.weight_histogram(log, clips.cache.sources, folder / "weights.png")
        longest = clips.val[np.argmax(clips.cache.lengths[clips.val])]
        figures.similarity_against_weight(
            state.encoder,
            state.cmw,
            clips.cache.clip(longest),
            config.model.size,
            device,
            folder / "similarity_and_weight.png",
        )

    checks = next(r for r in reversed(log) if "val_loss" in r)
    manifest = clips.manifest()
    text = json.dumps(manifest, indent=0)
    (out / "manifest.json").write_text(text)
    sources = np.array(clips.cache.sources)
    provenance = {
        "method": config.method,
        "steps": state.step,
        "seed": config.seed,
        "projector_dim": config.model.dim,
        "config": state.fixed,
        "sources": [
            {
                "name": public,
                "clips": int((sources == name).sum()),
                "frames": int(clips.cache.lengths[sources == name].sum()),
                "licence": config.data.licences.get(name, "simulated" if not config.data.roots else "not stated"),
            }
            for name, public in clips.public.items()
        ],
        "manifest_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "groups": sorted({m["group"] for m in manifest}),
        "clips": sorted(m["sha256"] for m in manifest),
        "metrics": {k: checks[k] for k in ("val_loss", "knn", "effective_rank")},
    }
    path = export.export(state.encoder.backbone, config.model.name, config.model.size, out / "export", provenance)

    frames = clips.cache.frames[probe.sample_frames(clips.cache, clips.val, 1)[0]]
    ours = probe.features(state.encoder.backbone, frames, config.model.size, device)
    reloaded = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).to(
        device, memory_format=torch.channels_last
    )
    difference = np.abs(ours - probe.features(reloaded, frames, config.model.size, device)).max()
    torch.manual_seed(config.seed)
    untrained = timm.create_model(
        export.architecture(config.model.name),
        num_classes=0,
        **input_size(config.model),
    )
    untrained = untrained.to(device, memory_format=torch.channels_last)
    random = probe_backbone(untrained, config, clips, device)
    say(f"exported to {path}; reloaded by plain timm, largest difference of the features: {difference:g}")
    labels = len(set(clips.labels[clips.val]))
    task = f"{labels} labels of held-out groups" if labels > 1 else f"{len(clips.val)} held-out clips told apart"
    if random["knn"] is None:
        say("no kNN probe: validation has single images of one label only (data.label)")
    else:
        say(
            f"kNN probe ({task}), balanced accuracy: trained {checks['knn']:.3f}, "
            f"random initialisation {random['knn']:.3f}"
        )
    say(
        f"effective rank of the features: trained {checks['effective_rank']:.1f}, "
        f"random initialisation {random['effective_rank']:.1f}"
    )
    say(
        f"use it: timm.create_model('local-dir:{path}', pretrained=True, num_classes=3), or "
        f"uscl_hub.load_meta_uscl_backbone('{config.model.name}', checkpoint='{path}')"
    )


if __name__ == "__main__":
    own_clips = any(arg.partition("=")[0] == "--data.roots" for arg in sys.argv)
    settings = configs.cli(configs.Config, __doc__, fallback=None if own_clips else DEMO)
    try:
        main(settings)
    except KeyboardInterrupt:
        sys.exit("interrupted")
