"""embed, search and export on real files, through the command."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from helpers import DATA, ROOT
from PIL import Image

import uscl_hub
from uscl_hub import checkpoints, models
from uscl_hub.cli import main
from uscl_hub.clips import find_clips
from uscl_hub.clips.read import read_clip
from uscl_hub.files import locked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=0)
    return checkpoints.save_folder(
        tmp_path_factory.mktemp("model") / "out",
        model.state_dict(),
        {
            "architecture": "resnet18",
            "num_classes": 0,
            "pretrained_cfg": models.make_cfg(64),
            "uscl_hub": {"method": "test"},
        },
        "# card",
    )


@pytest.fixture
def scans(tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "scans"
    (root / "frames").mkdir(parents=True)
    clip = [Image.fromarray(rng.integers(0, 200, (60, 80), dtype=np.uint8)) for _ in range(7)]
    clip[0].save(root / "a.gif", save_all=True, append_images=clip[1:], duration=100)
    still = rng.integers(0, 80, (50, 50))
    for i in range(9, 12):  # frames of one clip look alike
        Image.fromarray((still + rng.integers(0, 10, (50, 50))).astype(np.uint8)).save(root / f"frames/f{i}.png")
    clip[3].convert("RGB").save(root / "still.png")
    (root / "broken.mp4").write_bytes(b"nothing")
    return root


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, (json.loads(out) if "--json" in arguments and out else out), err


def embed(capsys, folder, inputs, out, *more):
    return run(capsys, "embed", *inputs, "-o", out, "--checkpoint", folder, "--json", *more)


def test_embed_then_search(capsys, folder, scans, tmp_path):
    out = tmp_path / "features.parquet"
    code, report, _ = embed(capsys, folder, [scans], out, "--batch-size", 4)
    assert code == 0 and report["clips"] == 3 and report["frames"] == 7 + 3 + 1
    (failed,) = report["failed"]
    assert "broken.mp4" in failed["path"] and failed["reason"]
    assert json.loads((tmp_path / "features.parquet.report.json").read_text()) == report
    table = pq.read_table(out).to_pylist()
    pooled = {r["clip"]: r for r in table if r["level"] == "clip"}
    assert set(pooled) == {"scans/a.gif", "scans/frames/f#.png", "scans/still.png"}
    frames = [r for r in table if r["level"] == "frame" and r["clip"] == "scans/a.gif"]
    assert [r["frame"] for r in frames] == list(range(7)) and frames[3]["time"] == pytest.approx(0.3)
    # the same features as by hand, with the public functions
    model = uscl_hub.load_meta_uscl_backbone(checkpoint=folder)
    transform = uscl_hub.create_transform(model)
    clip = next(c for c in find_clips([scans]) if c.id == "scans/a.gif")
    with torch.inference_mode():
        want = model(torch.stack([transform(f) for f in read_clip(clip, 64).images])).numpy()
    np.testing.assert_allclose([r["feature"] for r in frames], want, atol=1e-5)
    np.testing.assert_allclose(pooled["scans/a.gif"]["feature"], want.mean(0), atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "features.parquet",
        "features.parquet.report.json",
        "scans",
    ]

    code, rows, _ = run(capsys, "search", scans / "still.png", out, "-k", 2, "--sheet", tmp_path / "s.png", "--json")
    assert code == 0 and rows[0]["clip"] == "scans/still.png" and rows[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert len(rows) == 2 and Image.open(tmp_path / "s.png").size == (3 * 195, 207)
    code, rows, _ = run(capsys, "search", "scans/still.png", out, "--json")
    assert code == 0 and [r["clip"] for r in rows] != [] and "scans/still.png" not in {r["clip"] for r in rows}


def test_stride_resume_and_added_clips(capsys, folder, scans, tmp_path, monkeypatch):
    from uscl_hub.features import embed as module

    out = tmp_path / "f.parquet"
    monkeypatch.setattr(module, "PART_SECONDS", 0)  # a part a clip
    real = module.merge
    monkeypatch.setattr(module, "merge", lambda *a: (_ for _ in ()).throw(OSError("killed")))
    assert embed(capsys, folder, [scans], out, "--stride", 3)[0] == 1
    assert not out.exists() and (tmp_path / "f.parquet.partial").is_dir()
    (tmp_path / "f.parquet.partial" / ".00.abc.tmp.parquet").write_bytes(b"")  # killed while it wrote a part
    monkeypatch.setattr(module, "merge", real)
    code, report, _ = embed(capsys, folder, [scans], out, "--stride", 3)
    assert code == 0 and report["clips"] == 3 and report["computed"] == 0 and report["frames"] == 3 + 1 + 1
    rows = [r for r in pq.read_table(out).to_pylist() if r["clip"] == "scans/a.gif" and r["level"] == "frame"]
    assert [r["frame"] for r in rows] == [0, 3, 6]
    Image.new("L", (40, 40), 90).save(scans / "new.png")
    Image.new("L", (40, 40), 20).save(scans / "still.png")  # new content under an old name
    code, report, _ = embed(capsys, folder, [scans], out, "--stride", 3)
    assert code == 0 and report["clips"] == 4 and report["computed"] == 2
    ids = [r["clip"] for r in pq.read_table(out).to_pylist() if r["level"] == "clip"]
    assert len(ids) == len(set(ids)) == 4
    before = out.read_bytes()
    code, report, _ = embed(capsys, folder, [scans], out, "--stride", 2)
    assert code == 1 and "stride 3 is now 2" in report["error"] and out.read_bytes() == before


def test_nothing_usable_leaves_nothing(capsys, folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no")
    (tmp_path / "note.txt").write_text("no")
    for inputs, word in (
        ([tmp_path / "bad.png"], "bad.png"),
        ([tmp_path / "note.txt"], "note.txt"),
        ([tmp_path / "missing"], "missing"),
    ):
        code, report, _ = embed(capsys, folder, inputs, tmp_path / "f.parquet")
        assert code == 1 and word in report["error"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.png", "note.txt"]
    (tmp_path / "f.parquet").write_text("not parquet")
    code, _, err = run(capsys, "search", tmp_path / "bad.png", tmp_path / "f.parquet")
    assert code == 1 and "f.parquet" in err


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_export_agrees_with_eager(capsys, folder, scans, tmp_path, format):
    out = tmp_path / "model.bin"
    code, result, err = run(
        capsys, "export", folder, "-o", out, "--format", format, "--frames", scans / "a.gif", "--json"
    )
    assert code == 0, err
    assert result["source"] == "real" and result["max_difference"] < 1e-3 and out.stat().st_size > 40_000_000
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["model.bin"]


def test_two_runs_on_one_table(capsys, tiny_export, scans, tmp_path):
    (tmp_path / "f.parquet.partial").mkdir()
    with locked(tmp_path / "f.parquet.partial"):
        code, report, _ = embed(capsys, tiny_export, [scans], tmp_path / "f.parquet", "--name", "test_resnet")
    assert code == 1 and "f.parquet.partial: another process is writing here" in report["error"]
    assert embed(capsys, tiny_export, [scans], tmp_path / "f.parquet", "--name", "test_resnet")[0] == 0


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data")
def test_real_files_of_every_kind(capsys, tiny_export, tmp_path):
    """DICOM of a real scanner, video and still image; a clip is nearest to itself, then to its kind."""
    inputs = [*(DATA / "pretrain" / "ocular_itkpocus").glob("*.dcm")]
    inputs += sorted((DATA / "pretrain" / "covid_blues").rglob("*.mp4"))[:3]
    inputs += sorted((DATA / "classification" / "busi" / "benign" / "images").iterdir())[:3]
    out = tmp_path / "f.parquet"
    code, report, _ = embed(capsys, tiny_export, inputs, out, "--name", "test_resnet", "--stride", 20)
    assert code == 0 and report["clips"] == len(inputs) == 8 and report["failed"] == []
    code, rows, _ = run(capsys, "search", inputs[0], out, "--sheet", tmp_path / "s.png", "--json")
    assert code == 0 and inputs[0].name in rows[0]["clip"] and rows[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert inputs[1].name in rows[1]["clip"] and (tmp_path / "s.png").stat().st_size > 10_000


def test_device_that_is_not_there(capsys, folder, scans, tmp_path):
    code, report, _ = embed(capsys, folder, [scans], tmp_path / "f.parquet", "--device", "nonsense")
    assert code == 1 and "nonsense" in report["error"] and not (tmp_path / "f.parquet").exists()


KILLS = int(os.environ.get("USCL_KILLS", 2))
PROGRAM = """
import sys
from uscl_hub.features import embed as module
module.PART_SECONDS = 0  # a part a batch
module.embed([sys.argv[1]], sys.argv[2], name="test_resnet", checkpoint=sys.argv[3], batch_size=1, progress=False)
"""


@pytest.mark.slow
def test_killed_and_resumed(tiny_export, tmp_path):
    """SIGKILL when some clips are finished: they are kept, and in the end nothing is missing and nothing twice."""
    rng, root, count = np.random.default_rng(0), tmp_path / "scans", 30
    root.mkdir()
    for name in range(count):
        clip = [Image.fromarray(rng.integers(0, 200, (60, 80), dtype=np.uint8)) for _ in range(8)]
        clip[0].save(root / f"{'abcdefghij'[name % 10] * (1 + name // 10)}.gif", save_all=True, append_images=clip[1:])

    def start(out):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(root), str(out), str(tiny_export)], env=env)

    def rows(out):
        table = pq.read_table(out).to_pylist()
        return {(r["clip"], r["level"], r["frame"]): r["feature"] for r in table}, len(table)

    whole, again = tmp_path / "whole.parquet", 0
    assert start(whole).wait(300) == 0
    wanted, length = rows(whole)
    assert length == len(wanted) == 9 * count
    for kill in range(KILLS):
        out, parts = tmp_path / f"{kill}.parquet", random.Random(kill).randint(1, count - 5)
        process = start(out)
        while (
            len(list((tmp_path / f"{kill}.parquet.partial").glob("[0-9]*.parquet"))) < parts and process.poll() is None
        ):
            time.sleep(0.001)
        process.kill()
        killed = process.wait() != 0
        assert not (killed and out.exists())
        assert start(out).wait(300) == 0
        found, length = rows(out)
        assert length == len(found) and found.keys() == wanted.keys()
        for key, feature in found.items():
            np.testing.assert_allclose(feature, wanted[key], atol=1e-5)
        computed = json.loads((tmp_path / f"{kill}.parquet.report.json").read_text())["computed"]
        assert not killed or computed <= count - parts
        again += computed
        assert not (tmp_path / f"{kill}.parquet.partial").exists()
    print(f"{KILLS} kills, {KILLS * count - again} of {KILLS * count} clips were kept")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_keeps_what_is_finished(tiny_export, tmp_path, number):
    """Within seconds, with a line that says how to go on; the clips computed by then are not computed again."""
    rng, root, out = np.random.default_rng(0), tmp_path / "scans", tmp_path / "f.parquet"
    for name in "abcdefghijklmnopqrstuvwxyz":
        clip = [Image.fromarray(rng.integers(0, 200, (200, 300), dtype=np.uint8)) for _ in range(60)]
        for patient in ("one", "two", "three"):
            (root / patient).mkdir(parents=True, exist_ok=True)
            clip[0].save(root / patient / f"{name}.gif", save_all=True, append_images=clip[1:])
    command = ["-m", "uscl_hub.cli", "embed", root, "-o", out, "--name", "test_resnet", "--checkpoint", tiny_export]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *map(str, command)], env=env, stderr=subprocess.PIPE)
    said = b""
    while not re.search(rb"\b[23]\d/78", said):  # of the progress bar
        said += process.stderr.read1()
        assert process.poll() is None, said
    process.send_signal(number)
    start = time.monotonic()
    rest = process.communicate(timeout=120)[1].decode()
    assert time.monotonic() - start < 60 and process.returncode == 128 + number
    assert "uscl-hub: interrupted; what was finished is kept: start it again to go on" in rest
    assert "Traceback" not in rest and not out.exists()
    done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, timeout=300)
    assert done.returncode == 0 and 0 < json.loads((tmp_path / "f.parquet.report.json").read_text())["computed"] < 78
