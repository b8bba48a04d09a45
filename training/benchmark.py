"""Speed and memory: `python training/benchmark.py [--only a,b] [--quick True] [--device cuda]`.

a        a Meta-USCL step (exact, and its cheaper options) over a plain SimCLR step
b        the exact step over one with a second-order graph ("double backward"): time and peak memory
c        the loader against the step's appetite; the share of a real training that waits for data
d        ingest into the frame cache over plain decoding in as many processes
e        `uscl-hub embed` over the bare model's forward
f        import and load of a pretrained model over timm's own
memory   an index of 100,000 clips and 500 steps' batches

Every figure is a ratio within one run: what is compared takes turns (A B A B ...), and the median over the rounds
of the ratio within each round is taken. Prints a table, writes JSON. Run it on an otherwise idle machine.
"""

import contextlib
import copy
import datetime
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from torch.func import functional_call  # noqa: E402

from training import config as configs  # noqa: E402
from training import data  # noqa: E402
from training.cache import FrameCache, ingest  # noqa: E402
from training.dual import scratch_buffers  # noqa: E402
from training.export import export  # noqa: E402
from training.losses import info_nce  # noqa: E402
from training.model import CMWNet, Encoder  # noqa: E402
from training.simulate import KINDS, simulate_clip, write_demo  # noqa: E402
from training.splits import assign_groups, split_groups  # noqa: E402
from training.step import contrastive_step, meta_step  # noqa: E402
from uscl_hub.media import UnreadableClip, find_clips, iter_frames  # noqa: E402
from uscl_hub.preprocess import normalise  # noqa: E402

SECTIONS = ("a", "b", "c", "d", "e", "f", "memory")
TEMPERATURE = 0.5
MIB = 2**20
UNTRAINED = {"method": "no training", "steps": 0, "metrics": {}, "sources": [], "manifest_sha256": ""}


@dataclass
class Settings:
    """Measure training, ingest, embedding and loading."""

    only: str = ",".join(SECTIONS)
    """Sections to run, by comma."""
    quick: bool = False
    """Tiny settings that only show that everything runs; the figures mean nothing."""
    out: str = "runs/benchmark.json"
    """Where the JSON goes."""
    data: str = ""
    """Folder of clips for d and e. '': $USCL_DATA/pretrain, else ../shared/data/pretrain beside the checkout; where
    there is none, simulated clips."""
    device: str = "auto"
    """'auto', 'cpu' or 'cuda', of a, b, c and e."""
    model: str = "meta_uscl_resnet18"
    """Of all sections; f needs one of ours."""
    sizes: tuple[int, ...] = (64, 112, 224)
    """Pixels, ascending: the first one serves c and the cosines."""
    batch: int = 32
    """Clips a step (pairs), and as many clean ones."""
    repeats: int = 7
    """Rounds of each comparison."""
    limit: float = 300.0
    """Seconds that the rounds of one comparison may take: fewer rounds, then none, beyond it."""
    clips: int = 100_000
    """Of the index of section memory."""
    steps: int = 500
    """Batches made in section memory."""


def main(settings):
    sections = settings.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        sys.exit(f"--only: {', '.join(sorted(unknown))} unknown; there are {', '.join(SECTIONS)}")
    if settings.quick:
        settings = Settings(
            **{
                **asdict(settings),
                "sizes": (32,),
                "batch": 4,
                "repeats": 2,
                "clips": 2000,
                "steps": 30,
            }
        )
    device = torch.device(
        "cuda"
        if settings.device == "auto" and torch.cuda.is_available()
        else "cpu"
        if settings.device == "auto"
        else settings.device
    )
    report = Report(settings, device)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if {"a", "b"} & set(sections):
            time_steps(report, [s for s in sections if s in "ab"])
        if "a" in sections:
            compare_gradients(report)
        if "b" in sections:
            compare_peaks(report)
        if "c" in sections:
            measure_loader(report, folder)
        if {"d", "e"} & set(sections):
            roots = clip_folder(report, folder)
            if "d" in sections:
                measure_ingest(report, roots, folder)
            if "e" in sections:
                measure_embed(report, roots, folder)
        if "f" in sections:
            measure_loading(report, folder)
        if "memory" in sections:
            measure_memory(report, folder)
    report.write()
    return report


class Report:
    """The rows of the table, with the machine and the settings they were measured on."""

    def __init__(self, settings, device):
        self.settings, self.device = settings, device
        self.rows, self.skipped = [], []
        self.machine = {
            "cpu": cpu_name(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "load_average": round(os.getloadavg()[0], 2),  # at the start: other work makes ratios noisy
        }

    def add(self, section, name, value, goal=None, at_least=False, px=None, **details):
        """One figure; `goal` is the largest value wanted (the smallest, if `at_least`)."""
        met = None if goal is None or self.settings.quick else value >= goal if at_least else value <= goal
        self.rows.append(
            {
                "section": section,
                "px": px,
                "name": name,
                "value": value,
                "goal": goal,
                "at_least": at_least,
                "met": met,
                **details,
            }
        )
        print(self.line(self.rows[-1]), flush=True)

    def skip(self, section, what, why):
        self.skipped.append({"section": section, "what": what, "why": why})
        print(f"{section:7}skipped: {what}: {why}", flush=True)

    @staticmethod
    def line(row):
        goal = "" if row["goal"] is None else f"{'>=' if row['at_least'] else '<='} {row['goal']:g}"
        met = {None: "", True: "met", False: "MISSED"}[row["met"]]
        details = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in row.items()
            if k not in ("section", "px", "name", "value", "goal", "at_least", "met")
        )
        return (
            f"{row['section']:7}{row['px'] or '':>4}  {row['name']:44} {row['value']:>9.4g}  {goal:9} {met:7}{details}"
        )

    def write(self):
        path = Path(self.settings.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(
                {
                    "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                    "machine": self.machine,
                    "settings": asdict(self.settings),
                    "rows": self.rows,
                    "skipped": self.skipped,
                },
                indent=1,
            )
            + "\n"
        )
        print(
            f"{self.machine['cpu']}, {self.machine['cores']} cores, device {self.machine['device']}, "
            f"torch {self.machine['torch']}; written to {path}"
        )


# Measuring ----------------------------------------------------------------------------------------------------


def take_turns(functions, settings, device=torch.device("cpu")):
    """Call every function once to warm up, then in rounds, A B C A B C ...

    Returns:
        Seconds by name, lists of one entry a round, or None if a single round would take more than the limit.
    """
    first = {name: clock(f, device) for name, f in functions.items()}
    rounds = min(settings.repeats, int(settings.limit / sum(first.values())))
    if rounds < 1:
        return None
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, f in functions.items():
            seconds[name].append(clock(f, device))
    return seconds


def clock(function, device):
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(seconds, a, b):
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b]))


def fresh_process(code):
    """Run Python code in a new process from the checkout; its last line of output is JSON, which is returned."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a measuring process failed ({done.returncode}): {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def process_memory():
    """MiB of this process by kind: 'peak' and 'resident', of it 'own' (not pages of mapped files)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)
        return {"peak": peak, "resident": math.nan, "own": math.nan}
    # not ru_maxrss: in a child that starts with what its parent held
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return {"peak": kib["VmHWM"] / 1024, "resident": kib["VmRSS"] / 1024, "own": kib["RssAnon"] / 1024}


def free_memory(device):
    """Bytes that a step may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return math.inf
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# (a), (b): steps ----------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """A training in its first steps (momentum buffers filled), and the batch to step on."""

    encoder: torch.nn.Module
    cmw: torch.nn.Module
    optimizer: torch.optim.Optimizer
    cmw_optimizer: torch.optim.Optimizer
    views: torch.Tensor
    clean: torch.Tensor

    @classmethod
    def build(cls, model, px, batch, device, memory_format=torch.channels_last):
        torch.manual_seed(0)
        kwargs = {"img_size": px} if timm.get_pretrained_cfg_value(model, "fixed_input_size") else {}
        encoder = Encoder(model, **kwargs).to(device, memory_format=memory_format).train()
        cmw = CMWNet(encoder.num_features).to(device)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        channels = next(encoder.parameters()).shape[1]
        batches = (torch.randn(2 * batch, channels, px, px).to(device, memory_format=memory_format) for _ in range(2))
        problem = cls(encoder, cmw, optimizer, torch.optim.Adam(cmw.parameters(), lr=6e-5), *batches)
        plain(problem)
        return problem

    def double(self):
        """A copy in float64."""
        other = copy.deepcopy(self)
        other.encoder.double(), other.cmw.double()
        for state in other.optimizer.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].double()
        other.views, other.clean = other.views.double(), other.clean.double()
        return other


def plain(p):
    contrastive_step(p.encoder, p.optimizer, p.views, TEMPERATURE)


def plain_torch(p):
    """What the shortest possible training loop would do: batch norm sees both views as one batch."""
    _, z = p.encoder(p.views)
    info_nce(z.unflatten(0, (2, -1)), None, TEMPERATURE).backward()
    p.optimizer.step()
    p.optimizer.zero_grad()


def meta(p, **options):
    meta_step(p.encoder, p.cmw, p.optimizer, p.cmw_optimizer, p.views, p.clean, TEMPERATURE, **options)


def bf16(step, p):
    with torch.autocast(p.views.device.type, torch.bfloat16):
        step(p)


def double_backward(p):
    """The same step with a second-order graph: plain modules, one view after the other, the SGD step unrolled."""
    params = dict(p.encoder.named_parameters())
    h, z = per_view(p.encoder, p.views, params)
    grads = torch.autograd.grad(info_nce(z, p.cmw(h), TEMPERATURE), list(params.values()), create_graph=True)
    group = p.optimizer.param_groups[0]
    ahead = {}
    for (name, param), grad in zip(params.items(), grads):
        momentum = group["momentum"] * p.optimizer.state[param]["momentum_buffer"]
        ahead[name] = param - group["lr"] * (momentum + grad + group["weight_decay"] * param)
    _, clean_z = per_view(p.encoder, p.clean, ahead)
    loss = info_nce(clean_z, None, TEMPERATURE)
    for param, grad in zip(p.cmw.parameters(), torch.autograd.grad(loss, list(p.cmw.parameters()))):
        param.grad = grad
    p.cmw_optimizer.step()
    del h, z, grads, grad, ahead, clean_z, loss  # the graph, before the next one is built
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
    return [torch.stack(o).float() if o[0].dtype == torch.bfloat16 else torch.stack(o) for o in zip(*outputs)]


STEPS = {
    "plain": plain,
    "plain, both views as one batch": plain_torch,
    "exact": meta,
    "delayed": partial(meta, delayed=True),
    "difference": partial(meta, direction="difference"),
    "plain bf16": partial(bf16, plain),
    "exact bf16": partial(bf16, meta),
    "double backward": double_backward,
}


def build(name, settings, px, device):
    # Second-order convolutions are slower in channels_last on the CPU: each side runs in its better layout.
    contiguous = name == "double backward" and device.type == "cpu"
    return Problem.build(
        settings.model, px, settings.batch, device, torch.contiguous_format if contiguous else torch.channels_last
    )


def time_steps(report, sections):
    settings, device = report.settings, report.device
    names = [n for n in STEPS if n in ("plain", "exact") or ("b" if n == "double backward" else "a") in sections]
    before = None  # pixels, seconds of a round and peak bytes of the size before
    for px in settings.sizes:
        if before:
            growth = (px / before[0]) ** 2
            if growth * before[1] > settings.limit:
                report.skip("ab", f"{px} px", f"a round would take about {growth * before[1]:.0f} s (--limit)")
                continue
        seconds = try_steps(report, names, px)
        if seconds is None:
            continue
        before = px, sum(map(statistics.median, seconds.values()))
        if "a" in sections:
            goal = 3.5 if device.type == "cuda" or px > 64 else 3.2
            for name in seconds:
                base = "plain bf16" if name == "exact bf16" else "plain"
                if name in ("plain", "double backward"):
                    continue
                wanted = goal if name == "exact" or (name == "exact bf16" and device.type == "cuda") else None
                report.add(
                    "a",
                    f"{name} / {base}",
                    ratio(seconds, name, base),
                    wanted,
                    px=px,
                    seconds=statistics.median(seconds[name]),
                    rounds=len(seconds[name]),
                )
        if "b" in sections and "double backward" in seconds:
            report.add(
                "b",
                "exact / double backward, time",
                ratio(seconds, "exact", "double backward"),
                0.35 if device.type == "cuda" else 0.58,
                px=px,
                seconds=statistics.median(seconds["double backward"]),
            )
            report.add("b", "double backward / plain", ratio(seconds, "double backward", "plain"), px=px)


def try_steps(report, names, px):
    """Seconds by name; steps too slow or too large here are left out, and said so."""
    settings, device = report.settings, report.device
    functions = {}
    for name in names:
        try:
            step = partial(STEPS[name], build(name, settings, px, device))
            spent = clock(step, device)
        except torch.OutOfMemoryError:
            report.skip("ab", f"{name}, {px} px", "out of device memory")
            continue
        # On a CPU without bf16 instructions autocast is many times slower than float32: no figure is worth that.
        if spent * settings.repeats > settings.limit / 2 and "bf16" in name:
            report.skip("a", f"{name}, {px} px", f"a step takes {spent:.0f} s here")
            continue
        functions[name] = step
    seconds = take_turns(functions, settings, device)
    if seconds is None:
        report.skip("ab", f"{px} px", "a round takes longer than --limit")
    return seconds


def compare_gradients(report):
    """Cosine of each kind of step's meta-gradient to the exact one in float64, on simulated clips.

    Near the start of a training few of float32's or bfloat16's digits survive in it; hence the two states.
    """
    settings, device = report.settings, report.device
    px = settings.sizes[0]
    problem = build("plain", settings, px, device)
    frames = simulated_frames(2 * settings.batch, 8, round(1.25 * px), 2 * settings.batch)
    channels = problem.views.shape[1]
    for attribute, k, clips in (("views", 3, slice(settings.batch)), ("clean", 1, slice(settings.batch, None))):
        cache = Frames(frames[clips])
        batch = data.make_batch(cache, np.arange(settings.batch), configs.Pairs(frames=k), (0, k))
        setattr(problem, attribute, batch.views(device, px, channels))

    def gradient(name, problem):
        problem = copy.deepcopy(problem)
        STEPS[name](problem)
        return torch.cat([p.grad.flatten() for p in problem.cmw.parameters()]).double()

    goals = {"exact": 0.9999, "difference": 0.999, "exact bf16": 0.99}
    for steps in (0, 3 if settings.quick else 40):
        for _ in range(steps):
            plain(problem)
        exact = gradient("exact", problem.double())
        for name in ("exact", "difference", "exact bf16", "double backward", "delayed"):
            cosine = torch.nn.functional.cosine_similarity(gradient(name, problem), exact, dim=0).item()
            report.add(
                "a",
                f"meta-gradient's cosine to float64: {name}",
                cosine,
                goals.get(name),
                at_least=True,
                px=px,
                after_steps=steps,
            )


def compare_peaks(report):
    settings, device = report.settings, report.device
    before = None
    for px in settings.sizes:
        peaks = {}
        for name in ("plain", "exact", "delayed", "double backward"):
            if before and before[1][name] * MIB * (px / before[0]) ** 2 > 0.9 * free_memory(device):
                report.skip("b", f"peak memory of {name}, {px} px", "would not fit into what is free")
                break
            call = f"step_peak({name!r}, {settings.model!r}, {px}, {settings.batch}, {str(device)!r})"
            peaks[name] = fresh_process(f"from training.benchmark import step_peak; print({call})")
        else:
            before = px, peaks
            report.add(
                "b",
                "exact / double backward, peak memory",
                peaks["exact"] / peaks["double backward"],
                None if device.type == "cuda" else 0.6,
                px=px,
                **{name.replace(" ", "_") + "_mib": round(peak) for name, peak in peaks.items()},
            )
            report.add("b", "exact / plain, peak memory", peaks["exact"] / peaks["plain"], px=px)


def step_peak(name, model, px, batch, device):
    """MiB, at its peak, beyond what the process has after its imports. Call it in a fresh process."""
    settings, device = Settings(model=model, batch=batch), torch.device(device)
    if device.type == "cuda":
        torch.zeros(1, device=device)
        base = torch.cuda.max_memory_allocated(device) / MIB
    else:
        base = process_memory()["peak"]
    problem = build(name, settings, px, device)
    for _ in range(2):
        STEPS[name](problem)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB - base
    return process_memory()["peak"] - base


# (c): loader --------------------------------------------------------------------------------------------------


def simulated_frames(clips, frames, size, scenes):
    """uint8 (clips, frames, size, size): `scenes` simulated clips, repeated with a shift in time."""
    movies = [simulate_clip(KINDS[i % len(KINDS)], frames, size, seed=i) for i in range(min(scenes, clips))]
    return np.stack([np.roll(movies[i % len(movies)], i, axis=0) for i in range(clips)])


class Frames:
    """A frame cache in memory."""

    def __init__(self, frames):
        self.frames = frames.reshape(-1, *frames.shape[2:])
        self.lengths = np.full(len(frames), frames.shape[1])
        self.offsets = np.arange(len(frames)) * frames.shape[1]


def write_cache(folder, size, clips, frames, content=None):
    """A frame cache as ingest writes it; without `content` its frames are a hole in the file (they read as 0)."""
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"size": size}))
    with open(folder / "index.jsonl", "w") as file:
        for i in range(clips):
            file.write(
                json.dumps(
                    {
                        "fps": 25.0,
                        "region": [0, size, 0, size],
                        "masked": False,
                        "height": size,
                        "width": size,
                        "text": False,
                        "sha256": f"{i:064x}",
                        "frames": frames,
                        "notes": [],
                        "offset": i * frames,
                        "id": f"simulated/patient_{i // 4:07d}/clip_{i:07d}.mp4",
                        "source": "simulated",
                        "stamp": [1, 1, i],
                    }
                )
                + "\n"
            )
    with open(folder / "frames.u8", "wb") as file:
        if content is None:
            file.truncate(clips * frames * size**2)
        else:
            file.write(content.tobytes())
    return FrameCache.open(folder)


def measure_loader(report, folder):
    settings, device, px = report.settings, report.device, report.settings.sizes[0]
    size, clips, length = round(1.25 * px), 16 * settings.batch, 24
    cache = write_cache(
        folder / "loader", size, clips, length, simulated_frames(clips, length, size, 4 if settings.quick else 20)
    )
    everything, pairs, clean = np.arange(clips), configs.Pairs(), configs.Pairs(frames=1)
    problem = build("exact", settings, px, device)
    counter, loops = iter(range(10**9)), 10
    channels = problem.views.shape[1]

    def load():
        step = next(counter)
        chosen = data.train_clips(everything, step, settings.batch, 0)
        held_out = data.meta_clips(everything, step, settings.batch, 0)
        return (
            data.make_batch(cache, chosen, pairs, (0, data.TRAIN, step)),
            data.make_batch(cache, held_out, clean, (0, data.META, step)),
        )

    batches = load()

    def views():
        for batch in batches:
            batch.views(device, px, channels)

    for name, step in (("simclr step", plain), ("meta_uscl step", meta)):
        seconds = take_turns(
            {
                "load": lambda: [load() for _ in range(loops)],
                "views": lambda: [views() for _ in range(loops)],
                "step": partial(step, problem),
            },
            settings,
            device,
        )
        # The last step's batch of two kinds is what a meta step wants; SimCLR wants half of it.
        share = 1 if step is meta else 0.5
        appetite = 2 * share * statistics.median(seconds["load"]) / loops
        images = 4 * settings.batch
        report.add(
            "c",
            f"loader's images/s over the appetite of a {name}",
            loops / (share * ratio(seconds, "load", "step")),
            px=px,
            images_per_s=images * loops / statistics.median(seconds["load"]),
        )
        report.add(
            "c", f"mixing and augmenting, share of a {name}", share * ratio(seconds, "views", "step") / loops, px=px
        )

    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(5 * loops):
        load()
    cpu, wall = (time.process_time() - cpu) / (5 * loops), (time.perf_counter() - wall) / (5 * loops)
    report.add(
        "c",
        "cores kept busy by the loader during meta_uscl",
        cpu / statistics.median(seconds["step"]),
        1.0,
        px=px,
        cpu_seconds=cpu,
        wall_seconds=wall,
    )
    wait_in_a_training(report, folder, px)


def wait_in_a_training(report, folder, px):
    """The share of training/run.py's time that passes in waiting for the next batch, from its own log."""
    settings = report.settings
    clips, frames, steps = (12, 6, 4) if settings.quick else (80, 24, 40)
    demo = write_demo(folder / "clips", clips=clips, frames=frames, size=round(1.5 * px), seed=0)
    out = folder / "run"
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "training/run.py"),
        "--data.roots",
        str(demo),
        "--out",
        str(out),
        "--model.name",
        settings.model,
        "--model.size",
        str(px),
        "--optim.batch",
        str(settings.batch),
        "--optim.steps",
        str(steps),
        "--data.meta_fraction",
        "0.2",
        "--data.val_fraction",
        "0.2",
        "--eval_epochs",
        "1000000",
        "--device",
        report.device.type,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"training/run.py failed: {done.stderr[-2000:]}")
    rows = [r for r in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "wait_share" in r][steps // 4 :]
    seconds = [2 * settings.batch / r["images_per_s"] for r in rows]
    waited = sum(r["wait_share"] * s for r, s in zip(rows, seconds)) / sum(seconds)
    report.add(
        "c",
        "share of a meta_uscl training that waits for data",
        waited,
        0.02 if report.device.type == "cuda" else 0.05,
        px=px,
        steps=len(rows),
    )


# (d), (e): clips ----------------------------------------------------------------------------------------------


def clip_folder(report, folder):
    """The folder of clips to measure on: as set, as found, or simulated."""
    settings = report.settings
    found = Path(os.environ.get("USCL_DATA", ROOT.parent / "shared" / "data")) / "pretrain"
    if settings.data and not Path(settings.data).is_dir():
        sys.exit(f"--data {settings.data}: no such folder")
    if settings.data or (found.is_dir() and not settings.quick):
        return Path(settings.data or found)
    clips, frames = (6, 8) if settings.quick else (120, 48)
    return write_demo(folder / "simulated", clips=clips, frames=frames, size=96 if settings.quick else 256, seed=1)


def decode_only(clip):
    """Bytes of the clip's grey frames. One frame at a time: the fastest that our decoder can be used."""
    try:
        return sum(frame.nbytes for frame, _ in iter_frames(clip))
    except UnreadableClip:
        return 0


def measure_ingest(report, roots, folder):
    settings, workers = report.settings, cores()
    clips, counter = find_clips([roots]), iter(range(10**9))
    mebibytes = sum(f.stat().st_size for c in clips for f in c.files) / MIB
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["uscl_hub.media", "uscl_hub.crop"])

    def decode_all():
        with ProcessPoolExecutor(workers, context) as pool:
            list(pool.map(decode_only, clips))

    def ingest_all():
        with quiet():
            ingest([roots], folder / f"ingest{next(counter)}", size=80, workers=workers, progress=False)

    seconds = take_turns({"decode": decode_all, "ingest": ingest_all}, settings)
    if seconds is None:
        return report.skip("d", str(roots.name), "a round takes longer than --limit")
    spent = statistics.median(seconds["ingest"])
    report.add(
        "d",
        "ingest's speed / plain decoding's",
        ratio(seconds, "decode", "ingest"),
        0.8,
        at_least=True,
        clips=len(clips),
        data="simulated" if folder in roots.parents else roots.name,
        workers=workers,
        mb_per_s=1.048576 * mebibytes / spent,
        clips_per_s=len(clips) / spent,
    )


@contextlib.contextmanager
def quiet():
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        yield


def measure_embed(report, roots, folder):
    from uscl_hub.embed import embed

    settings, device = report.settings, report.device
    clips = [c for c in find_clips([roots]) if len(c.files) == 1]
    chosen = [clips[i].files[0] for i in sorted({round(i) for i in np.linspace(0, len(clips) - 1, 40)})]
    counter = iter(range(10**9))
    for px in settings.sizes:
        torch.manual_seed(0)
        model = timm.create_model(settings.model, num_classes=0).to(device).eval()
        checkpoint = export(model, settings.model, px, folder / f"embed{px}", UNTRAINED)
        count = 0

        def embed_all():
            nonlocal count
            done = embed(
                chosen,
                folder / f"{next(counter)}.parquet",
                name=settings.model,
                checkpoint=checkpoint,
                batch_size=64,
                device=str(device),
                progress=False,
            )
            count = done["frames"]

        embed_all()
        images = normalise(np.random.default_rng(0).integers(0, 256, (64, px, px), dtype=np.uint8)).to(device)

        @torch.inference_mode()
        def forward_all():
            for i in range(0, count, 64):
                model(images[: min(64, count - i)]).cpu()

        seconds = take_turns({"forward": forward_all, "embed": embed_all}, settings, device)
        if seconds is None:
            report.skip("e", f"{px} px", "a round takes longer than --limit")
            continue
        report.add(
            "e",
            "embed's speed / the bare model's forward",
            ratio(seconds, "forward", "embed"),
            0.9,
            at_least=True,
            px=px,
            frames=count,
            frames_per_s=count / statistics.median(seconds["embed"]),
        )


# (f): loading -------------------------------------------------------------------------------------------------


def measure_loading(report, folder):
    """Import and load in a fresh process, from the same exported folder."""
    settings = report.settings
    torch.manual_seed(0)
    model = timm.create_model(settings.model, num_classes=0)
    path = export(model, settings.model, 64, folder / "loading", UNTRAINED)
    template = (
        "import json, time; start = time.perf_counter(); {imports}; imported = time.perf_counter(); {load}; "
        "end = time.perf_counter(); print(json.dumps([imported - start, end - imported]))"
    )
    codes = {
        "timm": template.format(
            imports="import timm", load=f"timm.create_model('local-dir:{path}', pretrained=True, num_classes=0).eval()"
        ),
        "ours": template.format(
            imports="import uscl_hub",
            load=f"uscl_hub.load_meta_uscl_backbone({settings.model!r}, checkpoint={str(path)!r})",
        ),
    }
    times = {name: [] for name in codes}
    for i in range(settings.repeats + 1):
        for name, code in codes.items():
            spent = fresh_process(code)
            if i:  # the first round brings the files into memory
                times[name].append(spent)
    both = {name: [sum(t) for t in spent] for name, spent in times.items()}
    imports, loads = ({name: statistics.median(t[k] for t in spent) for name, spent in times.items()} for k in (0, 1))
    report.add(
        "f",
        "import and load, over timm's",
        ratio(both, "ours", "timm"),
        1.15,
        timm_import_s=imports["timm"],
        ours_import_s=imports["ours"],
        timm_load_s=loads["timm"],
        ours_load_s=loads["ours"],
    )


# memory -------------------------------------------------------------------------------------------------------


def measure_memory(report, folder):
    settings = report.settings
    few = max(settings.clips // 100, 2 * settings.batch)
    results = {}
    for clips in (few, settings.clips):
        path = folder / f"index{clips}"
        write_cache(path, 80, clips, 100)
        call = f"batches_memory({str(path)!r}, {settings.steps}, {settings.batch})"
        results[clips] = fresh_process(
            f"import json; from training.benchmark import batches_memory; print(json.dumps({call}))"
        )
    small, large = results[few], results[settings.clips]
    report.add(
        "memory",
        "growth of own memory over the steps, MiB",
        large["own_end"] - large["own_start"],
        8,
        clips=settings.clips,
        steps=settings.steps,
        cache_gib=settings.clips * 100 * 80**2 / 2**30,
        mapped_pages_mib=large["resident_end"] - large["own_end"] - large["resident_start"] + large["own_start"],
    )
    report.add(
        "memory",
        "index and splits, KiB a clip",
        1024 * (large["own_start"] - small["own_start"]) / (settings.clips - few),
        peak_kib=1024 * (large["peak_start"] - small["peak_start"]) / (settings.clips - few),
        open_seconds=large["open_seconds"],
    )
    report.add(
        "memory",
        "a step's batch from the larger index / from the smaller",
        large["step_seconds"] / small["step_seconds"],
        clips=settings.clips,
        against=few,
        step_seconds=large["step_seconds"],
    )


def batches_memory(path, steps, batch):
    """Open a cache, split it, make batches; MiB before and after the steps. Call it in a fresh process."""
    start = time.perf_counter()
    cache = FrameCache.open(path)
    groups = assign_groups(cache.ids, r"(patient_\d+)")
    splits = np.array(split_groups(groups, {"train": 0.8, "meta": 0.1, "val": 0.1}, 0, cache.sources))
    train, held_out = np.flatnonzero(splits == "train"), np.flatnonzero(splits == "meta")
    opened = time.perf_counter() - start
    pairs, clean = configs.Pairs(), configs.Pairs(frames=1)

    def load(step):
        return (
            data.make_batch(cache, data.train_clips(train, step, batch, 0), pairs, (0, data.TRAIN, step)),
            data.make_batch(cache, data.meta_clips(held_out, step, batch, 0), clean, (0, data.META, step)),
        )

    warm_up = steps // 10
    for step in range(warm_up):
        load(step)
    before, start = process_memory(), time.perf_counter()
    for step in range(warm_up, warm_up + steps):
        load(step)
    spent, after = time.perf_counter() - start, process_memory()
    return {
        "open_seconds": opened,
        "step_seconds": spent / steps,
        **{f"{k}_start": v for k, v in before.items()},
        **{f"{k}_end": v for k, v in after.items()},
    }


if __name__ == "__main__":
    main(configs.cli(Settings, __doc__))
