"""training/run.py end to end on small real files, and what it says to a user's mistakes."""

import json
import math
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import DATA, ROOT, dicom
from PIL import Image
from pydicom.uid import RLELossless

import uscl_hub
from training import config as configs
from training import run
from training.data import batches, dataset
from training.data.simulate import KINDS, simulate_clip, write_video
from training.engine import train as loop

SECRET = "MUELLER"  # in the folder names and DICOM tags; no export may have it


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two sources of ten patients: mp4, gif, DICOM (plain and compressed), numbered frames, images; one file broken."""
    root = tmp_path_factory.mktemp("scans")
    for i in range(10):
        for source in ("siteA", "siteB"):
            folder = root / source / "deep" / f"{SECRET}_{i}"
            folder.mkdir(parents=True)
            movie = simulate_clip(KINDS[i % 5], 5, 40, seed=i + 10 * (source == "siteB"))
            pictures = [Image.fromarray(frame) for frame in movie]
            if source == "siteB":
                write_video(folder / "other.mp4", movie)
            elif i % 5 == 0:
                write_video(folder / "clip.mp4", movie)
            elif i % 5 == 1:
                pictures[0].save(folder / "clip.gif", save_all=True, append_images=pictures[1:], duration=50)
            elif i % 5 == 2:
                dicom(folder / "clip.dcm", movie, PatientName=SECRET, compress=None if i < 5 else RLELossless)
            elif i % 5 == 3:
                for number, picture in enumerate(pictures, 8):
                    picture.save(folder / f"frame{number}.png")
            else:
                pictures[0].save(folder / "still.png")
    (root / "siteA" / "broken.mp4").write_bytes(b"not a film" * 99)
    return root


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.slow
def test_end_to_end_on_real_files(scans, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    config = tiny(
        data={
            "roots": (str(scans / "siteA"), str(scans / "siteB")),
            "cache": (),
            "group": rf"/({SECRET}_\d+)/",
            "licences": {"siteA": "CC BY 4.0"},
            "sheets": True,
            "workers": 1,
        },
        model={"name": "meta_uscl_resnet18"},
        optim={"steps": 7},
        save_every=2,
    )
    run.main(config)
    said = capsys.readouterr().out
    assert "20 clips of 10 groups: 12 train, 4 meta, 4 val" in said
    assert "largest difference of the features: 0\n" in said
    assert "kNN probe (2 labels of held-out groups), balanced accuracy: trained" in said

    # Data: the broken file is reported, patients are kept together, the manifest has neither names nor paths.
    (cache,) = (out / "cache").iterdir()
    report = json.loads((cache / "report.json").read_text())
    assert [r["id"] for r in report["unreadable"]] == ["siteA/broken.mp4"] and report["unreadable"][0]["reason"]
    assert list((cache / "sheets").glob("*.png"))
    manifest = json.loads((out / "manifest.json").read_text())
    splits = {}
    for clip in manifest:
        splits.setdefault(clip["group"], set()).add(clip["split"])
    assert len(manifest) == 20 and len(splits) == 10 and all(len(s) == 1 for s in splits.values())
    assert set.union(*splits.values()) == {"train", "meta", "val"}

    # Settings and log.
    assert configs.load(configs.Config, out / "config.yaml") == config
    log = read(out / "log.jsonl")
    steps, checks = [r for r in log if "loss" in r], [r for r in log if "val_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 8)) and [r["step"] for r in checks] == [3, 6, 7]
    for row in steps:
        assert row["lr"] == loop.learning_rate(row["step"] - 1, 7, 0, 0.05)
        assert len(row["weights"]) == len(row["clips"]) == 4 and all(0 < w < 1 for w in row["weights"])
        assert row["images_per_s"] > 0 and math.isfinite(row["meta_loss"])
    assert sorted(c for r in steps[:3] for c in r["clips"]) == sorted(c for r in steps[3:6] for c in r["clips"])
    assert all(1 <= r["effective_rank"] and 0 <= r["knn"] <= 1 for r in checks)
    assert list((out / "tensorboard").glob("events*"))
    for name in ("loss", "weights", "similarity_and_weight"):
        assert min(Image.open(out / "figures" / f"{name}.png").size) > 300

    # Export: the trained weights, loaded in three ways.
    path, checkpoint = out / "export", torch.load(out / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 7
    backbone = timm.create_model("resnet18", num_classes=0).eval()
    prefix = "backbone."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["encoder"].items() if k.startswith(prefix)}
    backbone.load_state_dict(weights)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        for model in (
            timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval(),
            torch.hub.load(str(ROOT), "meta_uscl_resnet18", source="local", checkpoint=str(path)),
            uscl_hub.load_meta_uscl_backbone("meta_uscl_resnet18", checkpoint=path),
        ):
            assert (model(images) - backbone(images)).abs().max() == 0

    provenance = json.loads((path / "config.json").read_text())["uscl_hub"]
    licences = {source["name"]: source["licence"] for source in provenance["sources"]}
    assert licences == {"siteA": "CC BY 4.0", "source 2": "not stated"}  # no folder is named without its licence
    assert provenance["steps"] == 7 and provenance["config"]["optim.steps"] == 7
    assert provenance["metrics"] == {k: checks[-1][k] for k in ("val_loss", "knn", "effective_rank")}
    assert len(provenance["groups"]) == 10 and len(provenance["clips"]) == len(provenance["frame_hashes"]) == 20
    assert provenance["frame_hashes_of"]["crop"] == config.data.crop
    leaks = (SECRET, "siteB", str(scans), str(tmp_path), "deep", "clip.", "other.mp4", "still")
    for file in [*path.iterdir(), out / "manifest.json"]:
        content = file.read_bytes().decode("latin1")
        assert not [leak for leak in leaks if leak in content], file


@pytest.mark.parametrize("method", ["simclr", "uscl"])
def test_methods_without_weights(tiny, tmp_path, monkeypatch, method):
    seen, make_batch = [], batches.make_batch

    def spy(cache, clips, config, key, *rest):
        seen.append((key[1], config.frames))
        return make_batch(cache, clips, config, key, *rest)

    monkeypatch.setattr(batches, "make_batch", spy)
    run.main(tiny(method=method, pairs={"frames": 4}))
    frames = 1 if method == "simclr" else 4  # in validation as in training
    assert set(seen) == {(batches.TRAIN, frames), (batches.VAL, frames)}
    log = read(tmp_path / "run" / "log.jsonl")
    assert len(log) == 6 and not any("weights" in r or "meta_loss" in r for r in log)
    assert "cmw" not in torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert not (tmp_path / "run" / "figures" / "weights.png").exists()


@pytest.mark.parametrize("tangent, precision", [("difference", "fp32"), ("exact", "bf16")])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_any_timm_backbone(tiny, tmp_path, capsys, name, tangent, precision):
    meta = {"every": 2, "batch": 6, "delayed": True, "tangent": tangent}
    pairs = {"mode": "inner", "augment_first": True}
    run.main(tiny(model={"name": name}, pairs=pairs, meta=meta, precision=precision))
    assert "largest difference of the features: 0\n" in capsys.readouterr().out
    log = [r for r in read(tmp_path / "run" / "log.jsonl") if "loss" in r]
    assert ["meta_loss" in r for r in log] == [True, False, True, False] and all("weights" in r for r in log)
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True, num_classes=0)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, model.num_features)


def test_decay_may_spare_norms_and_biases(tiny, monkeypatch):
    clips = dataset.prepare(tiny(), Path("unused"))
    all_of_them = loop.build(tiny(), clips, torch.device("cpu"))
    (group,) = all_of_them.optimizer.param_groups
    assert group["weight_decay"] == 1e-4 and len(group["params"]) == len(list(all_of_them.encoder.parameters()))
    spared = loop.build(tiny(optim={"decay_norm_and_bias": False}), clips, torch.device("cpu"))
    weights, rest = spared.optimizer.param_groups
    assert weights["weight_decay"] == 1e-4 and rest["weight_decay"] == 0
    assert {id(p) for p in rest["params"]} == {id(p) for p in spared.encoder.parameters() if p.ndim == 1}
    for p, q in zip(all_of_them.encoder.parameters(), spared.encoder.parameters()):
        assert torch.equal(p, q)  # the seed fixes the start


def test_learning_rate():
    rates = [loop.learning_rate(step, 100, 10, 0.4) for step in range(101)]
    np.testing.assert_allclose(rates[:10], 0.04 * np.arange(1, 11))
    assert rates[10] == pytest.approx(0.4) and rates[55] == pytest.approx(0.2) and rates[100] == pytest.approx(0)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert loop.learning_rate(0, 1, 0, 0.4) == 0.4


def test_the_seed_fixes_everything(tiny, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run.main(tiny(out=str(tmp_path / out), seed=seed, optim={"steps": 2}))
    a, b, c = ([(r.get("loss"), r.get("clips")) for r in read(tmp_path / n / "log.jsonl")] for n in "abc")
    assert a == b and a != c


def test_the_demo_needs_no_data(tiny, tmp_path, monkeypatch, capsys):
    """`python training/run.py` alone, with a smaller simulation: the demo's settings, group and label patterns."""
    small = dict(clips=60, frames=2, size=32)
    write_demo = dataset.write_demo
    monkeypatch.setattr(dataset, "write_demo", lambda out, seed, **_: write_demo(out, seed=seed, **small))
    demo = configs.cli(configs.Config, args=[], fallback=run.DEMO)
    changes = {"model": tiny().model, "optim": replace(demo.optim, steps=2, batch=8)}
    run.main(replace(demo, out=str(tmp_path / "demo"), device="cpu", **changes))
    said = capsys.readouterr().out
    assert "simulating" in said and "60 clips of 3 groups" in said and "labels of held-out groups" in said
    provenance = json.loads((tmp_path / "demo" / "export" / "config.json").read_text())["uscl_hub"]
    assert {s["licence"] for s in provenance["sources"]} == {"simulated"}


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data")
def test_real_clips(tiny, tmp_path, capsys):
    films = sorted(
        (DATA / "pretrain" / "covid_blues" / "lus_videos").glob("*.mp4"), key=lambda path: path.stat().st_size
    )
    scans = sorted((DATA / "pretrain" / "ocular_itkpocus").glob("*.dcm"))
    roots = tuple(str(path) for path in films[:10] + scans)
    preset = configs.load(configs.Config, run.DEMO.with_name("open_data.yaml")).data
    settings = {"roots": roots, "group": preset.group, "cache": (str(tmp_path / "cache"),), "max_frames": 8}
    run.main(tiny(data=settings, optim={"steps": 2, "batch": 2}))
    assert "12 clips of" in capsys.readouterr().out
    report = json.loads(next((tmp_path / "cache").glob("*/report.json")).read_text())
    assert report["unreadable"] == [] and report["frames"] > 12


def test_single_images_of_one_source(tiny, tmp_path, capsys):
    for i in range(12):
        (tmp_path / "stills" / f"p{i}").mkdir(parents=True)
        Image.fromarray(simulate_clip("cyst", 1, 40, seed=i)[0]).save(tmp_path / "stills" / f"p{i}" / "image.png")
    settings = {"roots": (str(tmp_path / "stills"),), "cache": (str(tmp_path / "cache"),), "group": "", "workers": 1}
    run.main(tiny(data=settings, method="simclr"))
    assert "no kNN probe" in capsys.readouterr().out
    assert "knn" not in (tmp_path / "run" / "export" / "README.md").read_text()


# ------------------------------------------------------------------------------------------------- mistakes


def refusal(config):
    """The one line that a run with these settings ends with."""
    with pytest.raises(SystemExit) as error:
        run.main(config)
    assert isinstance(error.value.code, str)  # so that the status is 1
    return error.value.code


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(method="byol"), "method: one of simclr, uscl, meta_uscl, distil, not 'byol'"),
        (dict(precision="fp16"), "precision: one of fp32, bf16"),
        (dict(device="tpu"), "device: 'auto', 'cpu' or 'cuda', not 'tpu'"),
        (dict(save_every=0), "save_every must be at least 1 and at most 1000000000, got 0"),
        (dict(eval_epochs=0), "eval_epochs must be at least 1"),
        (dict(pairs={"mode": "outer"}), "pairs.mode: one of standard, inner"),
        (dict(pairs={"frames": 0}), "pairs.frames must be at least 1"),
        (dict(pairs={"alpha": 0.0}), "pairs.alpha must be at least"),
        (dict(pairs={"jitter": 1.5}), "pairs.jitter must be at least 0 and at most 1, got 1.5"),
        (dict(pairs={"crop_scale": (0.9, 0.5)}), "pairs.crop_scale: the smallest, then the largest"),
        (dict(pairs={"crop_scale": (0.5, 1.5)}), "and at most 1; got 0.5 1.5"),
        (dict(pairs={"crop_ratio": (0.0, 1.0)}), "pairs.crop_ratio"),
        (dict(meta={"tangent": "rough"}), "meta.tangent: one of exact, difference"),
        (dict(meta={"tangent": "difference"}, precision="bf16"), "bf16 rounds its small steps away"),
        (dict(method="distil", optim={"lr": 0.1}), "optim.lr 0.1 is too much for AdamW"),
        (dict(model={"init": "imagenet", "pretrained": True}), "model.init and model.pretrained both name weights"),
        (dict(model={"init": "foo=weights.safetensors"}), "foo=weights.safetensors: unknown model 'foo'"),
        (dict(meta={"every": 0}), "meta.every must be at least 1"),
        (dict(meta={"batch": 1}), "meta.batch must be at least 2"),
        (dict(meta={"depth": -1}), "meta.depth must be at least 0"),
        (dict(meta={"shuffle": True, "every": 2}), "meta.shuffle: a control of the exact step"),
        (dict(optim={"batch": 1}), "optim.batch must be at least 2"),
        (dict(optim={"lr": float("nan")}), "optim.lr must be at least 0 and at most 1000000, got nan"),
        (dict(optim={"temperature": 0.0}), "optim.temperature must be at least"),
        (dict(optim={"batch": 64}), "12 training clips do not fill a batch of optim.batch = 64"),
        (dict(data={"roots": ("/nowhere/at/all",)}), "data.roots: no such folder: /nowhere/at/all"),
        (dict(data={"crop": "cut"}), "data.crop: one of crop, blank, none"),
        (dict(data={"min_clips": 21}), "20 readable clips below .* at least 21 needed"),
        (dict(data={"group": "(subj"}), r"data.group '\(subj' is not a regular expression"),
        (dict(data={"group": "subj"}), "data.group 'subj' has 0 groups; it needs one"),
        (dict(data={"group": r"(patient\d)"}), "data.group .* finds nothing for 20 of 20 clips"),
        (dict(data={"group": "(clips)"}), "1 groups cannot fill the 3 splits"),
        (dict(data={"label": "(a)(b)"}), r"data.label '\(a\)\(b\)' has 2 groups"),
        (dict(data={"label": "(x"}), "data.label .* is not a regular expression"),
        (dict(data={"label": "(nothing)"}), "data.label .* finds nothing for 20 of 20 clips"),
        (dict(data={"group": "", "groups_csv": "/nowhere.csv"}), "/nowhere.csv: No such file or directory"),
        (dict(data={"groups_csv": "/nowhere.csv"}), "not both"),
        (dict(data={"meta_fraction": 0.6, "val_fraction": 0.5}), "fraction above 0"),
        (dict(data={"meta_fraction": 0.0}), "data.meta_fraction must be"),
        (dict(model={"name": "resnet81"}), "model.name: timm has no 'resnet81'; near it: .*resnet18"),
        (dict(model={"name": "nonsense" * 9}), "model.name: timm has no"),
        (dict(model={"name": "resnet18.nope"}), "Invalid pretrained tag"),
        (dict(model={"name": "hf-hub:org/name"}), "model.name: timm has no"),
        (
            dict(model={"name": "resnet18", "pretrained": True}),
            "cannot make resnet18 with pretrained True: .*connection",
        ),
        (dict(model={"pretrained": True, "name": "meta_uscl_resnet34"}), "no pretrained weights have been released"),
        (dict(model={"name": "test_vit", "size": 9}), "test_vit does not take images of model.size = 9: "),
    ],
)
def test_a_users_mistake_is_one_line(tiny, tmp_path, changes, message):
    if "size" in changes.get("model", {}):  # other frames, which need another cache
        changes = {**changes, "data": {"cache": (str(tmp_path / "cache"),)}}
    said = refusal(tiny(**changes))
    assert re.search(message, said), said
    assert "\n" not in said and "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(tiny):
    assert "GPU" in refusal(tiny(device="cuda"))


def test_too_few_readable_clips_name_the_reasons(tiny, tmp_path):
    (tmp_path / "clips").mkdir()
    for i in range(3):
        (tmp_path / "clips" / f"{i}.mp4").write_bytes(b"not a film" * (9 + i))
    settings = {"roots": (str(tmp_path / "clips"),), "cache": (str(tmp_path / "cache"),), "workers": 1}
    said = refusal(tiny(data=settings))
    assert said.startswith("data: 0 readable clips") and "clips/0.mp4: " in said and "report.json" in said


def test_out_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file' / 'run'} cannot be made a folder" in refusal(tiny(out=str(tmp_path / "file" / "run")))


def test_two_runs_in_one_folder_are_refused(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    with run.locked(tmp_path / "run"):
        assert "another process is writing here" in refusal(tiny())
    run.main(tiny(optim={"steps": 1}))  # the lock is gone with its holder
    assert "holds a training already: --resume goes on" in refusal(tiny(optim={"steps": 1}))


def test_divergence_ends_with_a_line(tiny, tmp_path):
    said = refusal(tiny(optim={"lr": 1e6, "momentum": 1.0, "steps": 200}, method="uscl", eval_epochs=99))
    assert re.search("(loss is (nan|inf)|not finite any more); lower optim.lr .*no checkpoint was written", said)
    assert not (tmp_path / "run" / "export").exists()


def script(args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training/run.py", *args])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "training" / "run.py"), run_name="__main__")
    return error.value.code


def test_the_script_refuses_bad_settings(tmp_path, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text("optim: {steps: abc}")
    assert "optim.steps must be int, got 'abc'" in script(["--config", str(tmp_path / "c.yaml")], monkeypatch)
    assert script(["--optim.speed", "3"], monkeypatch) == 2
    assert "--optim.speed" in capsys.readouterr().err
    assert script(["--help"], monkeypatch) == 0
    assert "Train Meta-USCL" in capsys.readouterr().out
    (tmp_path / "out").mkdir()
    for roots in (["--data.roots", "/nowhere"], ["--data.roots=/nowhere"]):  # then the demo's settings are not meant
        assert "no such folder: /nowhere" in script([*roots, "--out", str(tmp_path / "out")], monkeypatch)
