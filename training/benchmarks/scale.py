"""What grows with the clips and the processes: opening a frame cache; ingest and embed by several processes."""

import itertools
import json
import sys
import time

import numpy as np
import timm
import torch

from training import distributed
from training.benchmarks.data import load_batches, write_cache
from training.benchmarks.inference import UNTRAINED
from training.benchmarks.measure import Row, clip_folder, fresh_process, json_of, memory_use, ratio, spent
from training.data.cache import FrameCache
from training.data.groups import assign_groups, numbered, split_numbers
from training.data.ingest import ingest
from training.engine.export import export
from uscl_hub.features.embed import embed


def opening(settings, device, folder):
    few = max(settings.clips // 100, 200)
    for clips in (few, settings.clips):
        write_cache(folder / f"index{clips}", 80, clips, 100)
    call = "index_use({!r}, {}, {})"
    small, large = (
        fresh_process(
            "import json; from training.benchmarks.scale import index_use; "
            f"print(json.dumps({call.format(str(folder / f'index{clips}'), settings.steps, settings.batch)}))"
        )
        for clips in (few, settings.clips)
    )
    note = f"{settings.clips} clips, {settings.steps} steps"
    yield Row("index", "growth of own memory over the steps, MiB", "", large["grown"], "<= 8", note)
    per_clip = (large["own"] - small["own"]) * 1024 / (settings.clips - few)
    yield Row("index", "memory of the index and splits, KiB a clip", "", per_clip)
    yield Row("index", "opening and splitting, s", "", large["opened"], "", f"{settings.clips} clips")
    note = f"{1000 * large['step']:.3g} ms a step"
    yield Row("index", f"a step's batches / those from {few} clips", "", large["step"] / small["step"], "<= 2", note)


def index_use(path, steps, batch):
    """Open a cache, split it, make batches; own memory in MiB and seconds. Call it in a fresh process."""
    before, start = memory_use(), time.perf_counter()
    cache = FrameCache.open(path)
    groups, _ = numbered(assign_groups(cache.each_id(), r"(patient_\d+)"))
    splits = split_numbers(groups, {"train": 0.8, "meta": 0.1, "val": 0.1}, 0, cache.source_numbers)
    train, held_out = np.flatnonzero(splits == 0), np.flatnonzero(splits == 1)
    opened = time.perf_counter() - start
    for step in range(steps // 10):
        load_batches(cache, train, held_out, batch, step)
    middle, start = memory_use(), time.perf_counter()
    for step in range(steps // 10, steps // 10 + steps):
        load_batches(cache, train, held_out, batch, step)
    seconds, after = (time.perf_counter() - start) / steps, memory_use()
    grown = after["own"] - middle["own"]
    return {"opened": opened, "own": middle["own"] - before["own"], "grown": grown, "step": seconds}


def ranks(settings, device, folder):
    """Two processes that each decode, or compute, with one core against one: torchrun, its own time left out."""
    root, counter = clip_folder(settings, folder), itertools.count()
    size = settings.sizes[0]
    checkpoint = export(
        timm.create_model(settings.model, num_classes=0), settings.model, size, folder / "by", UNTRAINED
    )
    work = {"ingest": (str(root), size, ""), "embed": (str(root), size, str(checkpoint))}
    for name, arguments in work.items():
        seconds = {"one": [], "two": []}
        for i in range(settings.repeats + 1):
            for many, processes in (("one", 1), ("two", 2)):
                out = folder / f"{name}{next(counter)}"
                took = _by(processes, name, *arguments, settings.model, str(out))
                if i:  # the first round brings the files into memory
                    seconds[many].append(took)
        note = f"{spent(seconds, 'one')}, {spent(seconds, 'two')}"
        yield Row(
            "ranks", f"speed of {name} by two processes / by one", "", ratio(seconds, "one", "two"), ">= 1.8", note
        )


def _by(processes, *arguments):
    """Seconds that the work itself takes."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=127.0.0.1:0", "--module", "training.benchmarks.scale", *map(str, arguments)]
    return json_of(launch, OMP_NUM_THREADS="1")


def main(name, root, size, checkpoint, model, out):
    """A process of `_by`: its work, timed by the first."""
    distributed.setup("cpu")
    torch.set_num_threads(1)
    distributed.barrier()
    start = time.perf_counter()
    if name == "ingest":
        ingest([root], out, size=int(size), workers=0, progress=False)
    else:
        embed([root], out + ".parquet", name=model, checkpoint=checkpoint, progress=False)
    distributed.barrier()
    distributed.finished.set()
    if distributed.rank() == 0:
        print(json.dumps(time.perf_counter() - start))


if __name__ == "__main__":
    main(*sys.argv[1:])
