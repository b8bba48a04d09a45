import csv
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a real hub
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they would wait for each other's threads
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_interrupts():
    """A shell's background job ignores SIGINT, and so would the programs that the tests interrupt."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder of 20 simulated clips of 5 subjects, and the folder of their frame cache."""
    from training.data.ingest import ingest
    from training.data.simulate import write_demo

    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder / "clips", clips=20, frames=6, size=32, seed=0)
    ingest([folder / "clips"], folder / "cache", size=40, crop="crop", max_frames=400, workers=0, progress=False)
    return folder


@pytest.fixture
def tiny(demo, tmp_path):
    """Makes the settings of a training of seconds: `tiny(method='uscl', optim={'steps': 3})`.

    All trainings share the frame cache of `demo`: one with frames of another size names a cache of its own.
    """
    from training.config import Config, Data, Model, Optim

    base = Config(
        out=str(tmp_path / "run"),
        device="cpu",
        data=Data(
            roots=(str(demo / "clips"),),
            cache=(str(demo / "cache"),),
            group=r"/(\w+/subj\d+)_",
            meta_fraction=0.2,
            val_fraction=0.2,
        ),
        model=Model(name="test_resnet", size=32, dim=16),
        optim=Optim(batch=4, steps=4, lr=0.05),
    )

    def make(**changes):
        groups = {k: replace(getattr(base, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
        return replace(base, **groups)

    yield make
    assert [path.name[:5] for path in (demo / "cache").iterdir()] == ["40px-"], "other frames in the shared cache"


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory):
    """Folder of a very small network (timm's test_resnet, 32 px): quick to load and to run."""
    import timm
    import torch

    from uscl_hub import checkpoints, models

    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    cfg = models.make_cfg(32, first_conv="conv1.0")
    config = {"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": cfg, "uscl_hub": {"method": "test"}}
    return checkpoints.save_folder(tmp_path_factory.mktemp("tiny") / "export", state, config, "# card\n")


@pytest.fixture(scope="session")
def downstream(tmp_path_factory):
    """Simulated data sets in the layout of the real ones: pocus_lung, busi and covid_blues in one folder.

    Videos are simulated clips, a kind a class; breast images are speckle with a dark ellipse, whose mask is known.
    """
    from training.data.simulate import simulate_clip, write_video

    root = tmp_path_factory.mktemp("downstream")
    rows = []
    for label, kind in (("covid", "lesion"), ("pneumonia", "cyst"), ("regular", "lung"), ("viral", "vessel")):
        for patient in range(1 if label == "viral" else 6):
            path = root / "pocus_lung" / "videos" / "convex" / label / f"{label}{patient}.mp4"
            write_video(path, simulate_clip(kind, 8, 48, seed=patient), fps=6)
            rows.append(
                [f"cc_licensed/videos/convex/{label}/{path.name}", label, "CC BY 4.0", f"{label}{patient}", "1"]
            )
    path = root / "pocus_lung" / "images" / "convex" / "covid" / "still.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(simulate_clip("lesion", 1, 48, seed=99)[0]).save(path)
    rows.append(["cc_licensed/images/convex/covid/still.png", "covid", "CC BY 4.0", "", "77"])
    with open(root / "pocus_lung" / "file_index.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "licence", "patient_id", "source_id"], *rows])

    scores = [["video_file", "Severity Score"]]
    for patient in range(8):
        for side in "LR":
            name, kind = f"patient_{patient}_{side}1", "lung" if patient % 2 else "lesion"
            movie = simulate_clip(kind, 8, 48, seed=patient, subject=patient + 100 * (side == "L"))
            write_video(root / "covid_blues" / "lus_videos" / f"{name}.mp4", movie, fps=6)
            scores.append([name, "0.0" if patient % 2 else "2.0"])
    with open(root / "covid_blues" / "severity.csv", "w", newline="") as file:
        csv.writer(file).writerows(scores)

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :64]
    for label, centre, size in (("benign", 22, 0.35), ("malignant", 42, 0.55), ("normal", 32, 0.0)):
        for folder in ("images", "mask"):
            (root / "busi" / label / folder).mkdir(parents=True)
        for i in range(32):
            radius = size * rng.uniform(22, 28)
            inside = np.hypot(x - centre - rng.uniform(-6, 6), 1.5 * (y - rng.uniform(20, 28))) < radius
            speckle = rng.rayleigh(1, (48, 64)) * np.where(inside, 12, 60)
            Image.fromarray(speckle.clip(0, 255).astype(np.uint8)).save(
                root / "busi" / label / "images" / f"{label} ({i}).png"
            )
            Image.fromarray(inside).save(root / "busi" / label / "mask" / f"{label} ({i})_mask.png")
    return root
