"""Ours beside what one would take instead: lightly's SimCLR, in the loop of its tutorial, and lightly-train.

    pip install -e '.[eval]' lightly lightly-train        # in an environment of its own
    python training/benchmarks/others.py --data CLIPS --labels DATA/classification --out runs/others

ResNet-18 from random weights, on the same frames, with the same pixels, batch, temperature and steps; once more with as
many steps as fit into the time of our SimCLR. Each training is a process of its own, one after the other. Prints a
table and writes it as JSON; kNN is what evaluate.py finds. lightly-train keeps its own optimizer and learning rate.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from training import config as configs  # noqa: E402
from training.benchmarks.inference import UNTRAINED  # noqa: E402
from training.benchmarks.measure import ROOT, cpu_name, json_of, memory_use  # noqa: E402
from training.data.cache import FrameCache  # noqa: E402
from training.engine.export import export  # noqa: E402
from training.messages import command  # noqa: E402
from uscl_hub.files import write_json  # noqa: E402
from uscl_hub.preprocess import MEAN, STD  # noqa: E402

MODEL, LR, TEMPERATURE, WORKERS = "meta_uscl_resnet18", 0.03, 0.5, 2
WARM = 10  # first steps, whose time does not count
NORMALISE = {"mean": [MEAN] * 3, "std": [STD] * 3}


@dataclass
class Settings:
    """What is compared, and on what."""

    data: str = "data/pretrain/covid_blues"
    """Folder of clips."""
    group: str = r"(patient_\d+)"
    """Their patients, as data.group of training/run.py."""
    labels: str = "data/classification"
    """Folder of the tasks."""
    tasks: tuple[str, ...] = ("ovary", "busi")
    """What kNN is asked."""
    px: int = 64
    """Pixels of the input."""
    batch: int = 32
    """Clips, or pictures, a step."""
    steps: int = 250
    """Of each training."""
    device: str = "cpu"
    """'cpu' or 'cuda'."""
    out: str = "runs/others"
    """Trainings, table.json and kNN."""


def ours(out: Path, steps: int, settings: Settings, method: str) -> dict:
    """training/run.py, timed by its log."""
    arguments = f"""training/run.py --method {method} --out {out / "run"} --model.name {MODEL}
        --model.size {settings.px} --optim.batch {settings.batch} --optim.lr {LR} --optim.steps {steps} --data.stride 4
        --optim.temperature {TEMPERATURE} --data.roots {settings.data} --data.cache {settings.out}/cache
        --eval_epochs 1000000 --device {settings.device}"""
    subprocess.run(
        [sys.executable, *arguments.split(), "--data.group", settings.group],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (out / "run" / "export").rename(out / "export")
    lines = map(json.loads, (out / "run" / "log.jsonl").read_text().splitlines())
    log = [line for line in lines if "wait_share" in line]
    seconds = [2 * settings.batch / line["images_per_s"] for line in log]
    return facts(seconds, [line["wait_share"] * s for line, s in zip(log, seconds)])


def lightly(out: Path, steps: int, settings: Settings) -> dict:
    """As in its tutorial: a DataLoader that augments, the projection head, NTXentLoss, SGD."""
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(input_size=settings.px, normalize=NORMALISE)
    pictures = LightlyDataset(str(Path(settings.out) / "frames"), transform)
    loader = torch.utils.data.DataLoader(pictures, settings.batch, True, drop_last=True, num_workers=WORKERS)
    backbone = timm.create_model(MODEL, num_classes=0).to(settings.device)
    head = SimCLRProjectionHead(512, 512, 128).to(settings.device)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss_of, seconds, waited, batches = NTXentLoss(TEMPERATURE), [], [], iter(())
    while len(seconds) < steps:
        start = time.perf_counter()
        if (batch := next(batches, None)) is None:
            batches = iter(loader)
            batch = next(batches)
        waited.append(time.perf_counter() - start)
        one, two = (head(backbone(view.to(settings.device))) for view in batch[0])
        loss = loss_of(one, two)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss.item()
        seconds.append(time.perf_counter() - start)
    export(backbone.cpu(), MODEL, settings.px, out / "export", UNTRAINED)
    return facts(seconds, waited)


def lightly_train(out: Path, steps: int, settings: Settings) -> dict:
    """Its own loop. A step's time is what more steps cost; it does not say what it waits for."""
    import lightly_train as theirs

    def run(name: str, steps: int) -> float:
        start = time.perf_counter()
        theirs.pretrain(
            out=out / name,
            data=Path(settings.out) / "frames",
            model=backbone,
            method="simclr",
            method_args={"temperature": TEMPERATURE},
            batch_size=settings.batch,
            num_workers=WORKERS,
            accelerator="gpu" if settings.device == "cuda" else "cpu",
            trainer_args={"max_steps": steps, "max_epochs": -1},
            transform_args={
                "image_size": (settings.px, settings.px),
                "normalize": {k: tuple(v) for k, v in NORMALISE.items()},
            },
        )
        return time.perf_counter() - start

    backbone = timm.create_model("resnet18", num_classes=0)
    run("imports", 2)
    first = run("first", WARM)
    backbone = timm.create_model("resnet18", num_classes=0)
    total = run("all", steps)
    backbone.load_state_dict(torch.load(out / "all" / "exported_models" / "exported_last.pt", weights_only=True))
    export(backbone, MODEL, settings.px, out / "export", UNTRAINED)
    return {"seconds": (total - first) / (steps - WARM), "waited": None}


def facts(seconds: list[float], waited: list[float]) -> dict:
    return {"seconds": statistics.median(seconds[WARM:]), "waited": sum(waited[WARM:]) / sum(seconds[WARM:])}


ARMS = {
    "ours, SimCLR": lambda *a: ours(*a, "simclr"),
    "ours, Meta-USCL": lambda *a: ours(*a, "meta_uscl"),
    "lightly, SimCLR": lightly,
    "lightly-train, simclr": lightly_train,
}


def write_frames(settings: Settings):
    """The pictures of our SimCLR's training clips as files, for those who read files."""
    run, folder = Path(settings.out) / "0" / "run", Path(settings.out) / "frames"
    cache = FrameCache.open(Path(settings.out) / "cache")
    splits = {row["sha256"]: row["split"] for row in json.loads((run / "manifest.json").read_text())}
    for i, digest in enumerate(cache.sha256):
        if splits[digest] == "train":
            clip = folder / f"{i:04d}"
            clip.mkdir(parents=True, exist_ok=True)
            for number, frame in enumerate(cache.clip(i)):
                Image.fromarray(np.repeat(frame[..., None], 3, axis=2)).save(clip / f"{number:04d}.png")


def train(name: str, steps: int, out: Path, settings: Settings) -> dict:
    """One arm in a process of its own; what it reached comes from `knn`."""
    out.mkdir(parents=True)
    return json_of([sys.executable, __file__, name, str(steps), str(out), json.dumps(vars(settings))])


def knn(rows: list[dict], settings: Settings):
    """Adds macro-F1 in %, with its interval, of every training's export."""
    named = [f"{row['folder']}={Path(settings.out) / row['folder'] / 'export'}" for row in rows]
    out = Path(settings.out) / "knn"
    evaluate = [
        sys.executable,
        "training/evaluate.py",
        "--protocols",
        "knn",
        "--out",
        str(out),
        "--data",
        settings.labels,
    ]
    evaluate += ["--cache", str(Path(settings.out) / "evaluate_cache"), "--tasks", *settings.tasks]
    subprocess.run([*evaluate, "--backbones", *named], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for found in json.loads((out / "results.json").read_text())["results"]:
        if found["level"] != "frame":
            row = next(row for row in rows if row["folder"] == found["backbone"])
            row[found["task"]] = [round(100 * found["metrics"]["macro-F1"][key], 1) for key in ("value", "low", "high")]


def main(settings: Settings):
    out = Path(settings.out).resolve()
    settings.out = str(out)
    settings.data, settings.labels = (str(Path(given).resolve()) for given in (settings.data, settings.labels))
    rows: list[dict] = []

    def add(name: str, steps: int):
        folder = str(len(rows))
        rows.append({"arm": name, "steps": steps, "folder": folder, **train(name, steps, out / folder, settings)})
        print(rows[-1], flush=True)

    for name in ARMS:
        add(name, settings.steps)
        if len(rows) == 1:
            write_frames(settings)
    given = settings.steps * rows[0]["seconds"]
    for row in rows[1 : len(ARMS)]:
        add(row["arm"], max(2 * WARM, round(given / row["seconds"])))
    knn(rows, settings)
    write_json(out / "table.json", {"machine": cpu_name(), "settings": vars(settings), "rows": rows}, indent=1)
    head = ["training", "steps", "steps/s", "waits", "peak MiB", *(f"kNN {task}" for task in settings.tasks)]
    print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
    for row in rows:
        waited = "" if row["waited"] is None else f"{100 * row['waited']:.1f} %"
        reached = " | ".join("{} [{}, {}]".format(*row[task]) for task in settings.tasks)
        print(
            f"| {row['arm']} | {row['steps']} | {1 / row['seconds']:.2f} | {waited} | {row['peak']:.0f} | {reached} |"
        )


def work(name: str, steps: str, out: str, settings: str):
    """The process of `train`."""
    torch.manual_seed(0)
    found = ARMS[name](Path(out), int(steps), Settings(**json.loads(settings)))
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # MiB on Linux
    print("\n" + json.dumps({**found, "peak": max(children, memory_use()["peak"])}))


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] in ARMS:
        work(*sys.argv[1:])
    else:
        command(lambda: main(configs.cli(Settings, __doc__)))
