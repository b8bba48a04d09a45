"""Train Meta-USCL: `python training/run.py [--config FILE.yaml] [--dotted.override VALUE ...]`.

Clips -> frame cache -> groups and splits -> training -> export -> check of the export. Without --config and
data.roots it runs the demo on simulated clips (training/configs/demo.yaml).
"""

import contextlib
import difflib
import errno
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
import zipfile
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402
from tqdm import tqdm  # noqa: E402

from training import config as configs  # noqa: E402
from training import data, distributed, export, figures, probe  # noqa: E402
from training.cache import CacheError, ingest  # noqa: E402
from training.losses import info_nce  # noqa: E402
from training.model import CMWNet, Encoder, input_channels  # noqa: E402
from training.simulate import write_demo  # noqa: E402
from training.splits import assign_groups, split_groups  # noqa: E402
from training.step import contrastive_step, meta_step  # noqa: E402
from uscl_hub import files  # noqa: E402

DEMO = Path(__file__).parent / "configs" / "demo.yaml"
DIVERGED = "lower optim.lr or raise optim.warmup_epochs. The last checkpoint, if any, is from before"
COLLAPSED = 2.0  # an effective rank below this means that the features have (nearly) become one number
TINY = 1e-6
RANGES = {  # of the numbers that a user may get wrong
    "save_every": (1, math.inf),
    "eval_epochs": (1, math.inf),
    "data.cache_size": (0, math.inf),
    "data.max_frames": (1, math.inf),
    "data.workers": (0, math.inf),
    "data.meta_fraction": (TINY, 1),
    "data.val_fraction": (TINY, 1),
    "pairs.frames": (1, math.inf),
    "pairs.max_dist": (1, math.inf),
    "pairs.alpha": (TINY, math.inf),
    "pairs.beta": (TINY, math.inf),
    "pairs.jitter": (0, 1),
    "pairs.flip": (0, 1),
    "model.size": (1, math.inf),
    "model.dim": (1, math.inf),
    "meta.lr": (0, math.inf),
    "meta.batch": (0, math.inf),
    "meta.hidden": (1, math.inf),
    "meta.every": (1, math.inf),
    "optim.batch": (2, math.inf),
    "optim.epochs": (1, math.inf),
    "optim.steps": (0, math.inf),
    "optim.lr": (0, math.inf),
    "optim.warmup_epochs": (0, math.inf),
    "optim.momentum": (0, 1),
    "optim.weight_decay": (0, math.inf),
    "optim.temperature": (TINY, math.inf),
}


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


def check(config):
    """Refuse settings that cannot work before anything is decoded."""
    for name, choices in (
        ("method", ("simclr", "uscl", "meta_uscl")),
        ("precision", ("fp32", "bf16")),
        ("data.crop", ("crop", "blank", "none")),
        ("pairs.mode", ("standard", "inner")),
        ("meta.tangent", ("exact", "difference")),
    ):
        value = attrgetter(name)(config)
        if value not in choices:
            sys.exit(f"{name}: one of {', '.join(choices)}, not {value!r}")
    for name, (low, high) in RANGES.items():
        value = attrgetter(name)(config)
        if not low <= value <= high:  # also a NaN
            sys.exit(f"{name} must be at least {low}{'' if high == math.inf else f' and at most {high}'}, got {value}")
    for name, high in (("pairs.crop_scale", 1), ("pairs.crop_ratio", math.inf)):
        low, top = attrgetter(name)(config)
        if not 0 < low <= top <= high:
            sys.exit(
                f"{name}: the smallest, then the largest, above 0{' and at most 1' * (high == 1)}; got {low} {top}"
            )
    world = distributed.world()
    for name in ("optim.batch", "meta.batch"):
        value = attrgetter(name)(config)
        if value % world:
            sys.exit(f"{name} = {value} must be a multiple of the {world} processes")
    name = config.model.name
    if not timm.is_model(export.architecture(name)):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        sys.exit(f"model.name: timm has no {name!r}{'; near it: ' * bool(near)}{', '.join(near)}")
    missing = [root for root in config.data.roots if not Path(root).exists()]
    if missing:
        sys.exit(f"data.roots: no such folder: {', '.join(missing)}")


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


def find_checkpoint(config, out):
    path = out / "checkpoint.pt"
    if config.resume and not path.exists():
        say(f"{path} does not exist yet: starting from the beginning")
    elif path.exists() and not config.resume:
        sys.exit(f"{out} holds a training already: --resume True goes on with it, another --out starts a new one")
    return path if config.resume and path.exists() else None


# Data ---------------------------------------------------------------------------------------------------------


class Clips:
    """The frame cache with every clip's group and label, and the clips of each split (arrays of cache indices)."""

    def __init__(self, cache, config):
        self.cache = cache
        groups, csv, labels = config.data.group, config.data.groups_csv, config.data.label
        self.groups = assign_groups(cache.ids, groups or None, csv or None, setting="data.group")
        self.labels = np.array(assign_groups(cache.ids, labels, setting="data.label") if labels else cache.sources)
        fractions = {"meta": config.data.meta_fraction, "val": config.data.val_fraction}
        fractions["train"] = 1 - sum(fractions.values())
        self.splits = np.array(split_groups(self.groups, fractions, config.seed, cache.sources))
        self.train, self.meta, self.val = (np.flatnonzero(self.splits == s) for s in ("train", "meta", "val"))
        # what the manifest and the export call a source: a folder's name only where data.licences has it
        self.public = {
            source: source if source in config.data.licences else f"source {i}"
            for i, source in enumerate(sorted(set(cache.sources)), start=1)
        }
        if not config.data.roots:
            self.public = dict.fromkeys(self.public, "simulated (training/simulate.py)")

    def manifest(self):
        """What was trained on, without naming paths: one dict a clip."""
        return [
            {
                "sha256": sha,
                "group": export.fingerprint(group),
                "source": self.public[source],
                "split": str(split),
                "frames": int(frames),
            }
            for sha, group, source, split, frames in zip(
                self.cache.sha256, self.groups, self.cache.sources, self.splits, self.cache.lengths
            )
        ]


def prepare(config, out):
    """Ingest (rank 0) and split. A problem with the data ends the run with a message."""
    roots = config.data.roots
    folder = Path(config.data.cache or out / "cache")
    try:
        if not roots:
            if distributed.rank() == 0 and not (out / "demo").exists():
                say("No data.roots: simulating B-mode clips for the demo")
                write_demo(out / "demo.partial", clips=120, frames=24, size=96, seed=config.seed)
                (out / "demo.partial").rename(out / "demo")
            roots = (str(out / "demo"),)
        cache = None
        if distributed.rank() == 0:
            cache = ingest(
                roots,
                folder,
                size=config.data.cache_size or round(1.25 * config.model.size),
                crop=config.data.crop,
                max_frames=config.data.max_frames,
                workers=config.data.workers or None,
                min_clips=config.data.min_clips,
                sheets=config.data.sheets,
            )
        cache = distributed.broadcast(cache)
        clips = Clips(cache, config)
    except (CacheError, ValueError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        sys.exit(f"data: {error}")
    counts = ", ".join(f"{len(c)} {n}" for n, c in (("train", clips.train), ("meta", clips.meta), ("val", clips.val)))
    say(f"{len(cache)} clips of {len(set(clips.groups))} groups: {counts}")
    if len(clips.train) < config.optim.batch:
        sys.exit(f"data: {len(clips.train)} training clips do not fill a batch of optim.batch = {config.optim.batch}")
    if len(clips.val) < 2:
        sys.exit("data: validation needs 2 clips; raise data.val_fraction or add clips")
    return clips


# Training -----------------------------------------------------------------------------------------------------


class State:
    """What a checkpoint holds: networks, optimisers, the number of steps done and the settings that must not change."""

    def __init__(self, encoder, cmw, optimizer, cmw_optimizer, fixed):
        self.encoder, self.cmw, self.optimizer, self.cmw_optimizer = encoder, cmw, optimizer, cmw_optimizer
        self.step, self.fixed = 0, fixed

    def parts(self):
        return {k: v for k, v in vars(self).items() if hasattr(v, "state_dict")}


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


def input_size(model):
    """Keyword arguments of `timm.create_model` for networks that are built for one size of images (ViT)."""
    cfg = timm.get_pretrained_cfg(export.architecture(model.name))
    return {"img_size": model.size} if cfg and cfg.fixed_input_size else {}


def training_pairs(config):
    """The settings of the pairs to learn from: SimCLR's are one frame twice."""
    return replace(config.pairs, frames=1) if config.method == "simclr" else config.pairs


def learning_rate(step, total, warmup, peak):
    """Linear warm-up over `warmup` steps, then a half cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak / 2 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def train(state, config, clips, out, device):
    """Run the remaining steps. Returns False when a signal ended it early (the checkpoint is written)."""
    optim, meta = config.optim, config.meta
    pairs, clean = training_pairs(config), replace(config.pairs, frames=1)
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
        chosen = data.train_clips(clips.train, step, optim.batch, config.seed)
        batch = data.make_batch(clips.cache, chosen, pairs, (config.seed, data.TRAIN, step), part)
        if not updates_cmw(step):
            return chosen, batch, None
        held_out = data.meta_clips(clips.meta, step, meta_batch, config.seed)
        return chosen, batch, data.make_batch(clips.cache, held_out, clean, (config.seed, data.META, step), meta_part)

    log = Log(out, state.step, total)
    with (
        stop_signals() as stopped,
        contextlib.closing(log),
        contextlib.closing(data.prefetch(load, range(state.step, total))) as batches,
    ):
        while state.step < total:
            start = time.perf_counter()
            chosen, batch, meta_batch_ = next(batches)
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


@torch.no_grad()
def validate(encoder, config, clips, device):
    """Loss of the validation clips' pairs (always the same ones), kNN probe and effective rank, in eval mode."""
    encoder.eval()
    channels, pairs = input_channels(encoder), training_pairs(config)
    losses, sizes = [], []
    for i in range(0, len(clips.val) - 1, config.optim.batch):  # a batch of one clip has no negative
        chosen = clips.val[i : i + config.optim.batch]
        if len(chosen) < 2:
            break
        batch = data.make_batch(clips.cache, chosen, pairs, (config.seed, data.VAL, i))
        _, z = encoder(batch.views(device, config.model.size, channels))
        losses.append(info_nce(z.unflatten(0, (2, -1)), None, config.optim.temperature).item())
        sizes.append(len(chosen))
    encoder.train()
    loss = float(np.average(losses, weights=sizes))
    if not math.isfinite(loss):
        sys.exit(f"the validation loss is {loss}; {DIVERGED}")
    return {"val_loss": loss, **probe_backbone(encoder.backbone, config, clips, device)}


def probe_backbone(backbone, config, clips, device, most=100):
    """kNN balanced accuracy on frames of `most` validation clips, and the effective rank of their features.

    The label of a validation frame is looked for among the training frames. Where validation has one label only,
    the frames of the second half of its clips look for their clip among those of the first half; where all of these
    are single images, too, there is nothing to look for: None.
    """

    def sample(split):
        some = split[np.linspace(0, len(split) - 1, min(most, len(split))).round().astype(int)]
        rows, owner = probe.sample_frames(clips.cache, some, 4)
        return probe.features(backbone, clips.cache.frames[rows], config.model.size, device), rows, owner

    val, rows, owner = sample(clips.val)
    late = rows - clips.cache.offsets[owner] >= clips.cache.lengths[owner] / 2
    if len(set(clips.labels[owner])) > 1:
        train, _, train_owner = sample(clips.train)
        knn = probe.knn_accuracy(train, clips.labels[train_owner], val, clips.labels[owner])
    elif late.any():
        knn = probe.knn_accuracy(val[~late], owner[~late], val[late], owner[late], k=1)
    else:
        knn = None
    return {"knn": knn, "effective_rank": probe.effective_rank(val)}


class Log:
    """Progress bar, log.jsonl and TensorBoard, on rank 0; elsewhere it does nothing."""

    def __init__(self, out, done, total):
        self.on = distributed.rank() == 0
        if not self.on:
            return
        path = out / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() and done else []
        kept = [line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= done]
        files.write_whole(path, lambda file: file.write_text("".join(kept)))  # what came later happens again
        self.file = open(path, "a")
        self.board = SummaryWriter(out / "tensorboard", purge_step=done + 1)
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)
        self.last = {}

    def step(self, step, loss, lr, clips_per_s, result, meta_share, wait_share, chosen):
        meta_loss = None if result.meta_loss is None else result.meta_loss.item()
        if not self.on:
            return
        numbers = {
            "loss": loss,
            "meta_loss": meta_loss,
            "lr": lr,
            "images_per_s": 2 * clips_per_s,
            "meta_share": meta_share,
            "wait_share": wait_share,
        }
        row = {"step": step, **{k: v for k, v in numbers.items() if v is not None}}
        for k, v in row.items():
            self.board.add_scalar(f"train/{k}", v, step)
        if result.weights is not None:
            row.update(weights=[round(w, 5) for w in result.weights.tolist()], clips=np.asarray(chosen).tolist())
            self.board.add_histogram("weights", result.weights, step)
        self.file.write(json.dumps(row) + "\n")
        self.last.update(loss=f"{loss:.3f}", lr=f"{lr:.3g}", img_s=f"{2 * clips_per_s:.0f}", meta=f"{meta_share:.0%}")
        self.bar.set_postfix(self.last, refresh=False)
        self.bar.update()

    def check(self, step, numbers):
        for k, v in numbers.items():
            if v is not None:
                self.board.add_scalar(f"validation/{k}", v, step)
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.last.update(
            val=f"{numbers['val_loss']:.3f}", knn="-" if numbers["knn"] is None else f"{numbers['knn']:.3f}"
        )
        if numbers["effective_rank"] < COLLAPSED:
            tqdm.write(
                f"step {step}: COLLAPSE? the features' effective rank is {numbers['effective_rank']:.2f}; "
                "lower optim.lr or use more different clips"
            )

    def flush(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self):
        if self.on:
            self.flush()
            self.file.close()
            self.board.close()
            self.bar.close()


# Checkpoints --------------------------------------------------------------------------------------------------


def save(state, path):
    """Write the checkpoint, whole or not at all: a crash or a full disk leaves the old one."""
    content = {name: part.state_dict() for name, part in state.parts().items()}
    content |= {"step": state.step, "fixed": state.fixed}

    def write(temporary):
        with open(temporary, "wb") as file:
            torch.save(content, file)

    try:
        files.write_whole(path, write)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        sys.exit(f"{path}: cannot write the checkpoint ({one_line(error)}); the previous one, if any, is intact")


def fixed(config, clips):
    """The settings that a resumed run must share with the run that it continues, and a hash of clips and splits."""
    values = {"method": config.method, "seed": config.seed, "precision": config.precision}
    for group in ("pairs", "model", "meta", "optim"):
        values.update({f"{group}.{k}": v for k, v in vars(getattr(config, group)).items()})
    cached = [clips.cache.path.name, clips.manifest()]
    return values | {"data (clips, splits, frames)": hashlib.sha256(json.dumps(cached).encode()).hexdigest()[:16]}


def restore(state, path):
    """Load a checkpoint of the same settings. The random numbers need no restoring: they follow from the step."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if changed := archive.testzip():
                raise zipfile.BadZipFile(f"{changed} does not match its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
        there = content["fixed"]
    except Exception as error:  # whatever a damaged file makes torch raise
        sys.exit(f"{path}: damaged or not a checkpoint of ours ({type(error).__name__}: {one_line(error)})")
    differ = [f"{k}: {there.get(k)!r} there, {v!r} here" for k, v in state.fixed.items() if there.get(k) != v]
    if differ:
        sys.exit(f"{path}: --resume needs the settings it was started with; " + "; ".join(differ))
    for name, part in state.parts().items():
        part.load_state_dict(content[name])
    state.step = content["step"]
    say(f"resumed at step {state.step}")


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


def one_line(error):
    return " ".join(str(error).split())


def say(message):
    if distributed.rank() == 0:
        print(message, flush=True)


if __name__ == "__main__":
    own_clips = any(arg.partition("=")[0] == "--data.roots" for arg in sys.argv)
    settings = configs.cli(configs.Config, __doc__, fallback=None if own_clips else DEMO)
    try:
        main(settings)
    except KeyboardInterrupt:
        sys.exit("interrupted")
