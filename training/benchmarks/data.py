"""Ingest and loading."""

import contextlib
import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np

from training import config as configs
from training.benchmarks.measure import (
    ROOT,
    Row,
    clip_folder,
    cores,
    quietly,
    ratio,
    spent,
    take_turns,
)
from training.benchmarks.steps import meta, plain, problem
from training.data import batches, index
from training.data.cache import FrameCache
from training.data.ingest import ingest
from training.data.simulate import write_demo
from uscl_hub.clips import UnreadableClip, find_clips, iter_frames


def write_cache(folder, size, clips, frames):
    """A frame cache as ingest writes it, but its frames are a hole in the file: they read as 0 and take no space."""
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"size": size}))
    line = {"fps": 25.0, "frames": frames, "source": "simulated", "stamp": [1, 1, 1], "notes": [], "text": False}
    with open(folder / "index.jsonl", "w") as file:
        for i in range(clips):
            line["id"], line["sha256"], line["offset"] = (
                f"sim/patient_{i // 4:07d}/{i:07d}.mp4",
                f"{i:064x}",
                i * frames,
            )
            file.write(json.dumps(line) + "\n")
    with open(folder / "frames.u8", "wb") as file:
        file.truncate(clips * frames * size**2)
    lines, _ = index.read_log(folder, size)
    index.save([folder], index.find_logs([folder]), index.columns(list(lines.values())))
    return FrameCache.open(folder)


def load_batches(cache, train, held_out, batch, step):
    """What a meta step wants, as training/run.py loads it."""
    chosen, clean = batches.train_clips(train, step, batch, 0), batches.meta_clips(held_out, step, batch, 0)
    return (
        batches.make_batch(cache, chosen, configs.Pairs(), (0, batches.TRAIN, step)),
        batches.make_batch(cache, clean, configs.Pairs(frames=1), (0, batches.META, step)),
    )


def loader(settings, device, folder):
    px, counter, loops = settings.sizes[0], itertools.count(), 20
    clips = np.arange(16 * settings.batch)
    cache = write_cache(folder / "loader", round(1.25 * px), len(clips), 24)
    p = problem("exact", settings, px, device)
    cpu = []

    def load():
        start = time.process_time()
        for _ in range(loops):
            load_batches(cache, clips, clips, settings.batch, next(counter))
        cpu.append((time.process_time() - start) / loops)

    seconds = take_turns({"load": load, "plain": partial(plain, p), "exact": partial(meta, p)}, settings, device)
    speed = 4 * settings.batch * loops / statistics.median(seconds["load"])
    # a plain step takes half of what load() makes
    yield Row(
        "loader", "batches loaded / consumed by plain steps", px, 2 * loops * ratio(seconds, "plain", "load"), ">= 1"
    )
    yield Row(
        "loader",
        "batches loaded / consumed by exact steps",
        px,
        loops * ratio(seconds, "exact", "load"),
        ">= 1",
        f"{speed:.0f} images/s",
    )
    busy = statistics.median(cpu) / statistics.median(seconds["exact"])
    yield Row("loader", "cores busy with loading", px, busy, "<= 1")

    few = settings.quick
    clips = write_demo(folder / "clips", 12 if few else 60, 4 if few else 12, px, seed=0)
    steps, skip = (4, 1) if few else (60, 10)
    command = f"""training/run.py --data.roots {clips} --out {folder / "run"} --model.name {settings.model}
        --model.size {px} --optim.batch {settings.batch} --optim.steps {steps} --data.meta_fraction 0.2
        --data.val_fraction 0.2 --eval_epochs 1000000 --device {device.type}"""
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"training/run.py failed: {done.stderr[-2000:]}")
    lines = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
    log = [line for line in lines if "wait_share" in line][skip:]
    each = [1 / line["images_per_s"] for line in log]
    waited = sum(line["wait_share"] * s for line, s in zip(log, each)) / sum(each)
    goal = "<= 0.02" if device.type == "cuda" else "<= 0.05"
    yield Row("loader", "share of a training that waits", px, waited, goal, f"{len(log)} steps")


def decode_only(clip):
    """Plain PyAV for videos; our reader for the few others."""
    from av.error import FFmpegError

    if clip.kind != "video" or clip.files[0].suffix.lower() == ".gif":
        frames = iter_frames(clip)
    else:
        frames = (frame.to_ndarray(format="gray") for frame in plain_av(clip.files[0]))
    with contextlib.suppress(UnreadableClip, FFmpegError):
        for _ in frames:
            pass


def plain_av(path):
    import av

    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"  # processes share the cores, as in ingest
        yield from container.decode(video=0)


def ingesting(settings, device, folder):
    root, counter, workers = clip_folder(settings, folder), itertools.count(), cores()
    clips = find_clips([root])
    megabytes = sum(file.stat().st_size for clip in clips for file in clip.files) / 1e6
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["uscl_hub.clips.decode", "uscl_hub.clips.crop"])  # as ingest does

    def decode():
        with ProcessPoolExecutor(workers, context) as pool:
            list(pool.map(decode_only, clips))

    def ingest_all():
        quietly(ingest, [root], folder / f"ingest{next(counter)}", size=80, workers=workers, progress=False)

    seconds = take_turns({"decode": decode, "ingest": ingest_all}, settings)
    note = spent(seconds, "ingest")
    if seconds["ingest"]:
        took = statistics.median(seconds["ingest"])
        note = f"{megabytes / took:.3g} MB/s, {len(clips) / took:.3g} clips/s, {workers} processes, {note}"
    yield Row("ingest", "speed / plain decoding", "", ratio(seconds, "decode", "ingest"), ">= 0.8", note)
