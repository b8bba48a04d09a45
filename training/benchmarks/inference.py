"""Embedding and loading of a model."""

import itertools
import statistics
from functools import partial

import numpy as np
import timm
import torch

from training.benchmarks.measure import Row, clip_folder, fresh_process, ratio, spent, take_turns
from training.data.provenance import Provenance
from training.engine.export import export
from uscl_hub import registry
from uscl_hub.clips import find_clips
from uscl_hub.features.embed import embed
from uscl_hub.features.network import placed
from uscl_hub.preprocess import normalise

UNTRAINED = Provenance("no training", steps=0, sources=[], manifest_sha256="", metrics={})


def embedding(settings, device, folder):
    clips = [clip for clip in find_clips([clip_folder(settings, folder)]) if len(clip.files) == 1]
    chosen = [clip.files[0] for clip in clips[:: max(1, len(clips) // 40)]]
    counter = itertools.count()
    for px in settings.sizes:
        torch.manual_seed(0)
        model = timm.create_model(settings.model, num_classes=0).to(device).eval()
        checkpoint = export(model, settings.model, px, folder / f"embed{px}", UNTRAINED)
        frames = []

        def embed_all():
            out = folder / f"{next(counter)}.parquet"
            options = {"name": settings.model, "checkpoint": checkpoint, "device": str(device), "progress": False}
            frames.append(embed(chosen, out, **options)["frames"])

        embed_all()
        x = normalise(np.random.default_rng(0).integers(0, 256, (64, px, px), dtype=np.uint8)).to(device)

        @torch.inference_mode()
        def forward():
            for i in range(0, frames[0], 64):
                model(x[: frames[0] - i]).cpu()

        seconds = take_turns({"forward": forward, "embed": embed_all}, settings, device)
        note = f"{frames[0]} frames, {spent(seconds, 'embed')}, {spent(seconds, 'forward')}"
        yield Row("embed", "speed / forward alone", px, ratio(seconds, "forward", "embed"), ">= 0.9", note)


def loading(settings, device, folder):
    path = export(timm.create_model(settings.model, num_classes=0), settings.model, 64, folder / "load", UNTRAINED)
    ours = f"import uscl_hub; uscl_hub.load_meta_uscl_backbone({settings.model!r}, checkpoint={str(path)!r})"
    theirs = f"import timm; timm.create_model('local-dir:{path}', pretrained=True, num_classes=0).eval()"
    time_it = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
    seconds = {"ours": [], "timm": []}
    for i in range(settings.repeats + 1):
        for name, code in (("ours", ours), ("timm", theirs)):
            one = fresh_process(time_it.format(code))
            if i:  # the first round brings the files into memory
                seconds[name].append(one)
    note = f"{spent(seconds, 'ours')}, {spent(seconds, 'timm')}"
    yield Row("load", "import and load / timm's", "", ratio(seconds, "ours", "timm"), "<= 1.15", note)


def using(settings, device, folder):
    """Images a second of every release, and of what one may use instead, at their pixels."""
    sizes = {name: entry["px"] for name, entry in registry.releases().items()} | {"tf_efficientnet_lite0": 224}
    sizes["resnet18"] = 224
    functions = {}
    for name, px in sizes.items():
        model = placed(timm.create_model(name, num_classes=0).eval(), device)
        x = torch.rand(32, 3, px, px, device=device).contiguous(memory_format=torch.channels_last)
        functions[name] = torch.inference_mode()(partial(model, x))
    seconds = take_turns(functions, settings, device)
    for name, px in sizes.items():
        note = f"{32 / statistics.median(seconds[name]):.0f} images/s" if seconds[name] else ""
        speed = ratio(seconds, "tf_efficientnet_lite0", name)
        yield Row("use", f"speed of {name} / tf_efficientnet_lite0 at 224 px", px, speed, "", note)
