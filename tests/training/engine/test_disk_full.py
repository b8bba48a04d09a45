"""A disk that is really full, a small tmpfs: the message says so, what was complete stays, no half file has a name."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from training.data.cache import CacheError, FrameCache
from training.data.ingest import ingest
from training.data.provenance import Provenance
from training.data.simulate import write_demo
from training.engine import export
from uscl_hub import checkpoints, models
from uscl_hub.cli import main

ROOT = Path(__file__).parents[3]


def small_disk(command, folder):
    """Run a command in a mount namespace of its own, in which `folder` is a tmpfs of 1 MB."""
    script = f'mount -t tmpfs -o size=1m none {folder} && exec "$@"'
    return subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_cache_embed_and_exports(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("unshare") or small_disk(["true"], disk).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    write_demo(tmp_path / "demo", clips=12, frames=20, size=64, seed=0)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0)
    config = {"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": models.make_cfg(32, first_conv=None)}
    checkpoints.save_folder(tmp_path / "model", model.state_dict(), config, "# card\n")
    command = [sys.executable, __file__, tmp_path, disk]
    result = small_disk(list(map(str, command)), disk)
    assert result.returncode == 0, result.stderr


def fill(disk, free):
    """Leave `free` bytes."""
    (disk / "filler").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - free)))


def names(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"filler"}


def on_the_disk(given, disk):
    # ingest: some clips fit, the others do not; they follow when there is space
    fill(disk, 200_000)
    settings = dict(size=32, workers=1, progress=False)
    with pytest.raises(OSError, match="frames.u8.*|No space left") as error:
        ingest([given / "demo"], disk / "cache", **settings)
    assert "No space left" in str(error.value) and "free some space and run it again" in str(error.value)
    kept = FrameCache.open(disk / "cache")
    assert 0 < len(kept) < 12
    whole = ingest([given / "demo"], given / "whole", **settings)
    for i, name in enumerate(kept.ids):
        assert (kept.clip(i) == whole.clip(whole.ids.index(name))).all()
    (disk / "filler").unlink()
    again = ingest([given / "demo"], disk / "cache", **settings)
    assert again.ids == whole.ids and again.frames.tobytes() == whole.frames.tobytes()
    shutil.rmtree(disk / "cache")

    # a feature table
    command = [
        "embed",
        given / "demo",
        "-o",
        disk / "f.parquet",
        "--checkpoint",
        given / "model",
        "--name",
        "test_resnet",
    ]
    fill(disk, 50_000)
    assert main(list(map(str, command)) + ["--json"]) == 1
    assert not [name for name in names(disk) if not name.startswith("f.parquet.partial/")]
    (disk / "filler").unlink()
    assert main(list(map(str, command)) + ["--json"]) == 0
    assert names(disk) == {"f.parquet", "f.parquet.report.json"}
    for name in names(disk):
        (disk / name).unlink()

    # exports: nothing where nothing was, and what was there stays
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    fill(disk, 300_000)
    # safetensors' own writer and Python's say it in another order
    with pytest.raises(OSError, match="model.safetensors.*No space left|No space left.*disk/out"):
        checkpoints.save_folder(disk / "out", state, {}, "")
    assert names(disk) == set()
    (disk / "filler").unlink()
    small = torch.nn.Linear(200, 200)
    small.num_features = 200
    provenance = Provenance(method="test", steps=1, sources=[], manifest_sha256="", metrics={})
    export.export(small, "resnet18", 32, disk / "out", provenance)
    before = {name: (disk / name).read_bytes() for name in names(disk)}
    fill(disk, 60_000)
    with pytest.raises(OSError, match="No space left"):
        export.export(small, "resnet18", 32, disk / "out", replace(provenance, steps=2))
    assert {name: (disk / name).read_bytes() for name in names(disk)} == before
    assert json.loads(before["out/config.json"])["uscl_hub"]["steps"] == 1
    (disk / "filler").unlink()

    # and where not even the settings of a cache fit
    fill(disk, 0)
    with pytest.raises((OSError, CacheError), match="No space left"):
        ingest([given / "demo"], disk / "cache", **settings)


if __name__ == "__main__":
    on_the_disk(Path(sys.argv[1]), Path(sys.argv[2]))
