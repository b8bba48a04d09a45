"""Speed and memory: `python training/benchmark.py [--only step memory ...] [--device cuda]`.

step     a Meta-USCL step, exact and with its cheaper options, over a plain SimCLR step and over double backward
memory   peak memory of those steps, each in a process of its own
accuracy cosines of the cheaper meta-gradients to the exact float32 one, in a training on clips
loader   batches loaded / batches consumed; the share of a real training that waits for data
ingest   ingest into the frame cache over plain decoding in as many processes
embed    `uscl-hub embed` over the bare model's forward
load     import and load of a pretrained model over timm's own
index    a cache of 100,000 clips: opening, splitting, memory over the steps

Every figure is a ratio within one run: what is compared takes turns (A B A B ...), and the median over the rounds of
the ratio within each round counts. Prints a table and writes it as JSON. The machine should have nothing else to do.
"""

import contextlib
import copy
import datetime
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import av  # noqa: E402
import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from torch.func import functional_call  # noqa: E402

from training import config as configs  # noqa: E402
from training import distributed  # noqa: E402
from training.data import batches  # noqa: E402
from training.data.cache import FrameCache  # noqa: E402
from training.data.groups import assign_groups, split_groups  # noqa: E402
from training.data.ingest import ingest  # noqa: E402
from training.data.simulate import write_demo  # noqa: E402
from training.engine.export import export  # noqa: E402
from training.method.forward_mode import scratch_buffers  # noqa: E402
from training.method.loss import info_nce  # noqa: E402
from training.method.networks import CMWNet, Encoder, input_channels  # noqa: E402
from training.method.step import Learner, contrastive_step, delayed_step, exact_step  # noqa: E402
from uscl_hub.clips import UnreadableClip, find_clips, iter_frames  # noqa: E402
from uscl_hub.features.embed import embed  # noqa: E402
from uscl_hub.preprocess import normalise  # noqa: E402

TEMPERATURE = 0.5
UNTRAINED = {"method": "no training", "steps": 0, "metrics": {}, "sources": [], "manifest_sha256": ""}


@dataclass
class Settings:
    """What is measured, and on what."""

    only: tuple[str, ...] = ("step", "memory", "accuracy", "loader", "ingest", "embed", "load", "index")
    """Sections to run."""
    quick: bool = False
    """Tiny settings that only show that everything runs: the figures mean nothing."""
    out: str = "runs/benchmark.json"
    """Where the JSON goes."""
    data: str = ""
    """Folder of clips for accuracy, ingest and embed; '': simulated ones."""
    device: str = "auto"
    """'auto', 'cpu' or 'cuda', of the steps, accuracy and embed."""
    model: str = "meta_uscl_resnet18"
    """One of ours."""
    sizes: tuple[int, ...] = (64, 112, 224)
    """Pixels, ascending. Options of the step and the loader are measured at the first."""
    batch: int = 32
    """Clips a step, and as many clean ones."""
    repeats: int = 7
    """Rounds of each comparison."""
    limit: float = 300.0
    """Seconds for a comparison's rounds: fewer rounds, then none, beyond it."""
    clips: int = 100_000
    """Of section index."""
    steps: int = 500
    """Batches made in section index."""


class Row(NamedTuple):
    """A line of the table. value: None if not measured; `note` then says why. goal: '<= 3.2' or ''."""

    section: str
    figure: str
    px: int | str = ""
    value: float | None = None
    goal: str = ""
    note: str = ""

    def cells(self):
        met = ""
        if self.goal and self.value is not None:
            bound = float(self.goal.split()[1])
            met = " met" if (self.value <= bound if self.goal.startswith("<=") else self.value >= bound) else " MISSED"
        value = "skipped" if self.value is None else f"{self.value:.3g}"
        return [self.section, self.figure, str(self.px), value, self.goal + met, self.note]


def main(settings):
    if unknown := set(settings.only) - set(SECTIONS):
        sys.exit(f"--only: {', '.join(sorted(unknown))} unknown; there are {', '.join(SECTIONS)}")
    if settings.quick:
        settings = replace(settings, sizes=(32,), batch=4, repeats=1, clips=2000, steps=20)
    device = distributed.setup(settings.device)
    machine = {
        "cpu": cpu_name(),
        "cores": cores(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "load_before": os.getloadavg()[0],
    }
    print(", ".join(f"{k} {v}" for k, v in machine.items()))
    print("| section | figure | px | value | goal | note |\n|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in settings.only:
            for row in SECTIONS[name](settings, device, Path(folder)):
                row = row._replace(goal="" if settings.quick else row.goal)
                rows.append(row)
                print("|", " | ".join(row.cells()), "|", flush=True)
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    rows = [row._asdict() for row in rows]
    report = {"created": created, "machine": machine, "settings": asdict(settings), "rows": rows}
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {out}")
    return report


# Measuring ----------------------------------------------------------------------------------------------------


def take_turns(functions, settings, device=torch.device("cpu")):
    """Seconds by name, one entry a round, after a call each to warm up. No entries: a round is beyond the limit."""
    first = sum(clock(f, device) for f in functions.values())
    seconds = {name: [] for name in functions}
    for _ in range(min(settings.repeats, int(settings.limit / first))):
        for name, f in functions.items():
            seconds[name].append(clock(f, device))
    return seconds


def clock(function, device):
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def ratio(seconds, a, b):
    """Median over the rounds of a / b; None without rounds."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b])) if seconds[a] else None


def spent(seconds, name):
    """'median s of name in n rounds', for a note."""
    n = len(seconds[name])
    return f"{name} {statistics.median(seconds[name]):.3g} s, rounds {n}" if n else "a round is beyond --limit"


def fresh_process(code, **environment):
    """Run Python code in a new process from the checkout; the last line that it prints is JSON: its value."""
    command, env = [sys.executable, "-W", "ignore", "-c", code], {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a measuring process failed ({done.returncode}): {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_use():
    """MiB of this process: 'peak' and 'now', and 'own', what is not pages of mapped files. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return {"peak": kib["VmHWM"] / 1024, "now": kib["VmRSS"] / 1024, "own": kib["RssAnon"] / 1024}


def cpu_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# Steps --------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """A training in its first steps (momentum buffers filled), and a batch to step on."""

    encoder: torch.nn.Module
    cmw: torch.nn.Module
    optimizer: torch.optim.Optimizer
    cmw_optimizer: torch.optim.Optimizer
    views: torch.Tensor
    clean: torch.Tensor


def problem(name, settings, px, device, batch=None):
    """The problem for the step `name`."""
    torch.manual_seed(0)
    layout = layout_of(name, device)
    encoder = Encoder(settings.model).to(device, memory_format=layout).train()
    cmw = CMWNet(encoder.num_features).to(device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    cmw_optimizer = torch.optim.Adam(cmw.parameters(), lr=6e-5)
    p = Problem(encoder, cmw, optimizer, cmw_optimizer, *images(encoder, batch or settings.batch, px, device, layout))
    plain(p)
    return p


def layout_of(name, device):
    # Second-order convolutions are slower in channels_last on the CPU: each side has its better layout.
    return torch.contiguous_format if name == "double backward" and device.type == "cpu" else torch.channels_last


def images(encoder, batch, px, device, layout):
    shape = 2 * batch, input_channels(encoder), px, px
    return [torch.randn(shape).to(device, memory_format=layout) for _ in range(2)]


def plain(p):
    contrastive_step(Learner(p.encoder, p.optimizer, temperature=TEMPERATURE), p.views)


def meta(p, step=exact_step, tangent="exact"):
    step(Learner(p.encoder, p.optimizer, p.cmw, p.cmw_optimizer, TEMPERATURE, tangent=tangent), p.views, p.clean)


def bf16(step, p):
    with torch.autocast(p.views.device.type, torch.bfloat16):
        step(p)


def double_backward(p):
    """The exact step with a second-order graph: plain modules, one view after the other, the SGD step unrolled."""
    params = dict(p.encoder.named_parameters())
    h, z = per_view(p.encoder, p.views, params)
    grads = torch.autograd.grad(info_nce(z, p.cmw(h), TEMPERATURE), list(params.values()), create_graph=True)
    group, ahead = p.optimizer.param_groups[0], {}
    for (name, param), grad in zip(params.items(), grads):
        momentum = group["momentum"] * p.optimizer.state[param]["momentum_buffer"]
        ahead[name] = param - group["lr"] * (momentum + grad + group["weight_decay"] * param)
    _, clean_z = per_view(p.encoder, p.clean, ahead)
    info_nce(clean_z, None, TEMPERATURE).backward(inputs=list(p.cmw.parameters()))
    p.cmw_optimizer.step()
    p.cmw_optimizer.zero_grad()
    del h, z, grads, grad, ahead, clean_z  # the graph, before the next one is built
    h, z = per_view(p.encoder, p.views)
    info_nce(z, p.cmw(h).detach(), TEMPERATURE).backward()
    p.optimizer.step()
    p.optimizer.zero_grad()


def per_view(encoder, images, params=None):
    """Representations and projections, (2, N, d) each; with `params` the running statistics are left alone."""
    if params is None:
        outputs = [encoder(view) for view in images.chunk(2)]
    else:
        outputs = [functional_call(encoder, {**params, **scratch_buffers(encoder)}, (v,)) for v in images.chunk(2)]
    return [torch.stack(o) for o in zip(*outputs)]


STEPS = {
    "plain": plain,
    "exact": meta,
    "double backward": double_backward,
    "delayed": partial(meta, step=delayed_step),
    "difference": partial(meta, tangent="difference"),
    "plain bf16": partial(bf16, plain),
    "exact bf16": partial(bf16, meta),
}


def steps(settings, device, folder):
    cuda = device.type == "cuda"
    expected = 0.0
    for i, px in enumerate(settings.sizes):
        if expected > settings.limit:
            yield Row("step", "all", px, note=f"a round would take about {expected:.0f} s (--limit)")
            continue
        # bfloat16 is no gain on a CPU; the options' shares of a step are about the same at any size
        names = list(STEPS)[: 3 if i else len(STEPS) if cuda else -2]
        try:
            functions = {name: partial(STEPS[name], problem(name, settings, px, device)) for name in names}
            seconds = take_turns(functions, settings, device)
        except torch.OutOfMemoryError:
            yield Row("step", "all", px, note="does not fit into the device's memory")
            continue
        if seconds["plain"] and i + 1 < len(settings.sizes):
            round_ = sum(statistics.median(seconds[name]) for name in list(STEPS)[:3])
            expected = round_ * (settings.sizes[i + 1] / px) ** 2
        goal = "<= 3.5" if cuda or px > 64 else "<= 3.2"
        yield Row("step", "exact / plain", px, ratio(seconds, "exact", "plain"), goal, spent(seconds, "plain"))
        goal, note = "<= 0.35" if cuda else "<= 0.58" if px <= 112 else "", spent(seconds, "double backward")
        yield Row("step", "exact / double backward", px, ratio(seconds, "exact", "double backward"), goal, note)
        for name in names[3:]:
            if name != "plain bf16":
                base, goal = ("plain bf16", "<= 3.5") if name == "exact bf16" else ("plain", "")
                note = f"{name} / float32 {ratio(seconds, name, 'exact'):.3g}" if "bf16" in name else ""
                yield Row("step", f"{name} / {base}", px, ratio(seconds, name, base), goal, note)


def peaks_of_steps(settings, device, folder):
    peaks, before = {}, None
    for px in settings.sizes:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        if before and peaks["double backward"] * 2**20 * (px / before) ** 2 > 0.9 * free:
            yield Row("memory", "all", px, note=f"would not fit into the {free >> 30} GiB that are free")
            continue
        for name in ("plain", "exact", "double backward"):
            call = f"step_peak({name!r}, {settings.model!r}, {px}, {settings.batch}, {str(device)!r})"
            code = f"from training.benchmark import step_peak; print({call})"
            # Large blocks come from the system and return to it: the peak is of what is in use, not of what is kept.
            peaks[name] = fresh_process(code, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
        before, note = px, ", ".join(f"{name} {peak:.0f} MiB" for name, peak in peaks.items())
        goal = "<= 0.6" if device.type == "cpu" else ""
        yield Row("memory", "exact / double backward", px, peaks["exact"] / peaks["double backward"], goal, note)


def free_memory():
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def step_peak(name, model, px, batch, device):
    """MiB that a step needs at its peak beyond what the process, networks and optimizers had after a tiny step."""
    settings, device = Settings(model=model, batch=batch), torch.device(device)
    p = problem(name, settings, 32, device, batch=2)
    STEPS[name](p)
    base = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else memory_use()["now"]
    p.views, p.clean = images(p.encoder, batch, px, device, layout_of(name, device))
    STEPS[name](p)
    return (torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else memory_use()["peak"]) - base


# Accuracy -----------------------------------------------------------------------------------------------------


def accuracy(settings, device, folder):
    """Early steps are sensitive to rounding; later ones have the goals."""
    px, every, settled = settings.sizes[0], 10, 2
    cache = quietly(ingest, [clip_folder(settings, folder)], folder / "accuracy", size=round(1.25 * px), progress=False)
    clips = np.arange(len(cache.ids))
    held_out = clips[::5]
    train, p = np.setdiff1d(clips, held_out), problem("exact", settings, px, device)
    batch = min(settings.batch, len(train))
    for group in p.optimizer.param_groups:
        group["lr"] = configs.Optim().lr
    ways = {"bf16": partial(bf16, meta), "difference": partial(meta, tangent="difference")}
    cosines = {name: [] for name in ways}
    for step in range(every * (settled + settings.repeats)):
        p.views, p.clean = (
            b.views(device, px, input_channels(p.encoder)) for b in load_batches(cache, train, held_out, batch, step)
        )
        if step % every == 0:
            exact = meta_gradient(meta, p)
            for name, way in ways.items():
                cosines[name].append(torch.cosine_similarity(meta_gradient(way, p), exact, dim=0).item())
        meta(p)
    for name, goal in (("bf16", ">= 0.99"), ("difference", ">= 0.999")):
        first, later = cosines[name][:settled], cosines[name][settled:]
        note = f"median of {len(later)} from step {every * settled} on, lowest {min(later):.4f}; before: "
        note += ", ".join(f"{c:.4f}" for c in first)
        yield Row("accuracy", f"{name}, cosine to exact float32", px, statistics.median(later), goal, note)


def meta_gradient(step, p):
    """What `step` would give CMW-Net's optimizer; nothing of the problem changes."""
    p = copy.deepcopy(p)
    step(p)
    return torch.cat([w.grad.flatten() for w in p.cmw.parameters()])


# Loader -------------------------------------------------------------------------------------------------------


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


# Clips --------------------------------------------------------------------------------------------------------


def clip_folder(settings, folder):
    if not settings.data:
        few = settings.quick
        if not (folder / "simulated").exists():
            write_demo(folder / "simulated", 6 if few else 120, 6 if few else 48, 64 if few else 256, seed=1)
        return folder / "simulated"
    if not Path(settings.data).is_dir():
        sys.exit(f"--data {settings.data}: no such folder")
    return Path(settings.data)


def quietly(function, *args, **kwargs):
    """Without what it writes to stderr."""
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        return function(*args, **kwargs)


def decode_only(clip):
    """Plain PyAV for videos; our reader for the few others."""
    if clip.kind != "video" or clip.files[0].suffix.lower() == ".gif":
        frames = iter_frames(clip)
    else:
        frames = (frame.to_ndarray(format="gray") for frame in plain_av(clip.files[0]))
    with contextlib.suppress(UnreadableClip, av.error.FFmpegError):
        for _ in frames:
            pass


def plain_av(path):
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


# Index --------------------------------------------------------------------------------------------------------


def index(settings, device, folder):
    few = max(settings.clips // 100, 200)
    for clips in (few, settings.clips):
        write_cache(folder / f"index{clips}", 80, clips, 100)
    call = "index_use({!r}, {}, {})"
    small, large = (
        fresh_process(
            "import json; from training.benchmark import index_use; "
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
    groups = assign_groups(cache.ids, r"(patient_\d+)")
    splits = np.array(split_groups(groups, {"train": 0.8, "meta": 0.1, "val": 0.1}, 0, cache.sources))
    train, held_out = np.flatnonzero(splits == "train"), np.flatnonzero(splits == "meta")
    opened = time.perf_counter() - start
    for step in range(steps // 10):
        load_batches(cache, train, held_out, batch, step)
    middle, start = memory_use(), time.perf_counter()
    for step in range(steps // 10, steps // 10 + steps):
        load_batches(cache, train, held_out, batch, step)
    seconds, after = (time.perf_counter() - start) / steps, memory_use()
    grown = after["own"] - middle["own"]
    return {"opened": opened, "own": middle["own"] - before["own"], "grown": grown, "step": seconds}


SECTIONS = {
    "step": steps,
    "memory": peaks_of_steps,
    "accuracy": accuracy,
    "loader": loader,
    "ingest": ingesting,
    "embed": embedding,
    "load": loading,
    "index": index,
}

if __name__ == "__main__":
    main(configs.cli(Settings, __doc__))
