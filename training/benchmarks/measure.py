"""What all measurements share: settings, rows, taking turns, memory, fresh processes."""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from training.data.simulate import write_demo
from uscl_hub.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Settings:
    """What is measured, and on what."""

    only: tuple[str, ...] = (
        "step",
        "memory",
        "meta",
        "accuracy",
        "loader",
        "ingest",
        "embed",
        "load",
        "use",
        "index",
        "ranks",
    )
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
    return json_of([sys.executable, "-W", "ignore", "-c", code], **environment)


def json_of(command, **environment):
    """Run a command from the checkout; the last line that it prints is JSON: its value."""
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a measuring process failed ({done.returncode}): {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_use():
    """MiB of this process: 'peak' and 'now', and 'own', what is not pages of mapped files. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return {"peak": kib["VmHWM"] / 1024, "now": kib["VmRSS"] / 1024, "own": kib["RssAnon"] / 1024}


def free_memory():
    """Bytes. Linux only."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def cpu_name():
    return _cpu_line("model name") or platform.processor() or platform.machine()


def cpu_has_bf16():
    """Whether it multiplies bfloat16 itself (AVX512-BF16, AMX). Linux on x86 only."""
    return bool({"avx512_bf16", "amx_bf16"} & set(_cpu_line("flags").split()))


def _cpu_line(name):
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(name):
                return line.split(":", 1)[1].strip()
    return ""


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def clip_folder(settings, folder):
    if not settings.data:
        few = settings.quick
        if not (folder / "simulated").exists():
            write_demo(folder / "simulated", 6 if few else 120, 6 if few else 48, 64 if few else 256, seed=1)
        return folder / "simulated"
    if not Path(settings.data).is_dir():
        raise UserError(f"--data {settings.data}: no such folder")
    return Path(settings.data)


def quietly(function, *args, **kwargs):
    """Without what it writes to stderr."""
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        return function(*args, **kwargs)
