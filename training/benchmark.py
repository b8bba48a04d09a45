"""Speed and memory: `python training/benchmark.py [--only step memory ...] [--device cuda]`.

step     a Meta-USCL step, exact and with its cheaper options, over a plain SimCLR step and over double backward
memory   peak memory of those steps, each in a process of its own
meta     cost and direction of CMW-Net's cheaper gradients: depth, delayed, fewer clean pairs, every k steps
accuracy cosines of the cheaper meta-gradients to the exact float32 one, in a training on clips
loader   batches loaded / batches consumed; the share of a real training that waits for data
ingest   ingest into the frame cache over plain decoding in as many processes
embed    `uscl-hub embed` over the bare model's forward
load     import and load of a pretrained model over timm's own
use      images a second of every release, beside EfficientNet-Lite0 and ResNet-18 at 224 px
index    a cache of 100,000 clips (--clips): opening, splitting, memory over the steps
ranks    ingest and embed by two processes over one

Every figure is a ratio within one run: what is compared takes turns (A B A B ...), and the median over the rounds of
the ratio within each round counts. Prints a table and writes it as JSON. The machine should have nothing else to do.
"""

import datetime
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm  # noqa: E402
import torch  # noqa: E402

from training import config as configs  # noqa: E402
from training import distributed  # noqa: E402
from training.benchmarks import data, inference, meta, scale, steps  # noqa: E402
from training.benchmarks.measure import Settings, cores, cpu_name  # noqa: E402
from training.messages import command  # noqa: E402
from uscl_hub.errors import UserError  # noqa: E402

SECTIONS = {
    "step": steps.steps,
    "memory": steps.peaks_of_steps,
    "meta": meta.costs,
    "accuracy": meta.accuracy,
    "loader": data.loader,
    "ingest": data.ingesting,
    "embed": inference.embedding,
    "load": inference.loading,
    "use": inference.using,
    "index": scale.opening,
    "ranks": scale.ranks,
}


def main(settings):
    if unknown := set(settings.only) - set(SECTIONS):
        raise UserError(f"--only: {', '.join(sorted(unknown))} unknown; there are {', '.join(SECTIONS)}")
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


if __name__ == "__main__":
    command(lambda: main(configs.cli(Settings, __doc__)))
