"""From a finished training to a released checkpoint."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from training import release, run
from training.evaluation.backbones import find_leaks, load_backbone
from training.evaluation.datasets import Item, Task
from training.release import Release
from uscl_hub import checkpoints, registry
from uscl_hub.checkpoints import CheckpointError


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An empty weights folder in the place of the package's, and test_resnet as one of our architectures."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "registry.json").write_text("{}\n")
    monkeypatch.setattr(registry, "WEIGHTS", folder)
    monkeypatch.setattr(registry, "ARCHITECTURES", {"meta_uscl_tiny": registry.Architecture("test_resnet")})
    return folder


@pytest.fixture
def trained(tiny):
    config = tiny(data={"licences": {"clips": "CC0"}})
    run.main(config)
    return config.out


@pytest.fixture
def settings(trained):
    return Release(trained, "v1", "cc0-1.0", "simulated clips")


def test_weights_provenance_and_registry(settings, trained, weights):
    assert release.main(settings, weights) == "meta_uscl_tiny.v1"
    entry = json.loads((weights / "registry.json").read_text())["meta_uscl_tiny.v1"]
    file = weights / entry["file"]
    assert entry["sha256"] == checkpoints.sha256(file) and entry["px"] == 32 and entry["licence"] == "cc0-1.0"
    for path in (file, f"{trained}/export/model.safetensors", f"{trained}/export/config.json"):
        assert os.stat(path).st_mode == os.stat(weights / "registry.json").st_mode  # who may read one may read all
    before = checkpoints.load_tensors(f"{trained}/export/model.safetensors")
    after = checkpoints.load_tensors(file)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value.half() if value.is_floating_point() else value)
    known = registry.provenance("meta_uscl_tiny.v1")
    assert known["method"] == "meta_uscl" and known["seed"] == 0 and len(known["manifest"]) == 20
    assert {clip["licence"] for clip in known["manifest"]} == {"CC0"} and known["config"]["optim.steps"] == 4
    assert known["curves"]["training"][0]["step"] == 1 and known["curves"]["validation"][-1]["step"] == 4
    assert registry.provenance("meta_uscl_tiny.v2") is None

    assert "wheel" not in entry

    release.main(replace(settings, tag="v2", dtype="fp32", wheel=False), weights)
    assert registry.releases()["meta_uscl_tiny.v2"]["wheel"] is False
    release.main(replace(settings, tag="v3", default=True), weights)
    assert [name.split(".")[1] for name in registry.releases()] == ["v3", "v1", "v2"]
    full = checkpoints.load_tensors(weights / "meta_uscl_tiny.v2.safetensors")
    assert all(torch.equal(full[key], value) for key, value in before.items())


def test_figures_of_an_evaluation(settings, weights, tmp_path):
    def row(backbone, **changes):
        metrics = {"macro-F1": {"value": 0.61234}, "accuracy": {"value": 0.9}}
        usual = {"task": "busi", "protocol": "linear", "fraction": 1.0, "level": "image"}
        return {**usual, "backbone": backbone, "metrics": metrics, **changes}

    results = tmp_path / "results.json"
    content = {
        "backbones": {"ours": {"spec": "meta_uscl_tiny.v1"}, "other": {"spec": "random:resnet18"}},
        "results": [
            row("ours"),
            row("other"),
            row("ours", task="pocus", level="frame"),
            row("ours", fraction=0.1, protocol="knn"),
            row("ours", task="busi_seg", protocol="unet", metrics={"Dice": {"value": 0.5}}),
        ],
    }
    results.write_text(json.dumps(content))
    release.main(replace(settings, results=(str(results),)), weights)
    expected = {"busi macro-F1, linear probe": 0.6123, "busi_seg Dice, U-Net": 0.5}
    assert registry.releases()["meta_uscl_tiny.v1"]["metrics"] == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"licence": ""}, "--licence: is needed"),
        ({"tag": "a.b"}, "--tag: letters, digits and _ only, not 'a.b'"),
        ({"dtype": "int8"}, "--dtype: one of fp16, fp32"),
        ({"run": "/nowhere"}, "/nowhere/export"),
    ],
)
def test_mistakes_are_named(settings, weights, changes, message):
    with pytest.raises(CheckpointError, match=message):
        release.main(replace(settings, **changes), weights)
    assert [path.name for path in weights.iterdir()] == ["registry.json"]


@pytest.mark.parametrize(
    "content", [None, b"", b"[]", b"{}", b"\xff\xfe", b'{"backbones": {}, "results": [{}]}', b'{"backbones": [1]}']
)
def test_results_that_are_none_are_named_before_anything_is_written(settings, weights, tmp_path, content):
    results = tmp_path / "results.json"
    if content is not None:
        results.write_bytes(content)
    with pytest.raises(CheckpointError, match="results.json"):
        release.main(replace(settings, results=(str(results),)), weights)
    assert [path.name for path in weights.iterdir()] == ["registry.json"]


@pytest.mark.parametrize("harm", ["no provenance", "no manifest", "no log"])
def test_a_run_that_is_not_whole(settings, trained, weights, harm):
    run = Path(trained)
    if harm == "no provenance":
        config = json.loads((run / "export" / "config.json").read_text())
        del config["uscl_hub"]
        (run / "export" / "config.json").write_text(json.dumps(config))
    else:
        (run / {"no manifest": "manifest.json", "no log": "log.jsonl"}[harm]).unlink()
    with pytest.raises(CheckpointError, match=str(run)):
        release.main(settings, weights)
    assert [path.name for path in weights.iterdir()] == ["registry.json"]


def test_what_cannot_be_released(settings, trained, weights, tiny, tmp_path, monkeypatch):
    older = weights / f"meta_uscl_tiny.{settings.tag}.safetensors"
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="MB are too much for the wheel"):
        patch.setattr(release, "MAX_BYTES", 1000)
        release.main(replace(settings, tag="large", wheel=False), weights)  # in the repository only
        for file in weights.glob("*large*"):
            file.unlink()
        older.write_bytes(b"an older release")
        release.main(settings, weights)
    assert older.read_bytes() == b"an older release"
    older.unlink()
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="test_resnet is none of a"):
        patch.setattr(registry, "ARCHITECTURES", {"meta_uscl_a": registry.Architecture("a")})
        release.main(settings, weights)
    with open(f"{trained}/manifest.json", "a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError, match="manifest.json: is not that of the export"):
        release.main(settings, weights)
    bare = tiny(out=str(tmp_path / "bare"), method="simclr", optim={"steps": 1})
    run.main(bare)
    with pytest.raises(CheckpointError, match="no licence is stated for source 1"):
        release.main(replace(settings, run=bare.out), weights)
    assert [path.name for path in weights.iterdir()] == ["registry.json"]


@pytest.mark.parametrize("name", registry.releases())
def test_a_released_tag_is_refused_on_its_patients(name, tmp_path):
    """Found by the hash of the clip alone, or of its group."""
    backbone = load_backbone(name)
    assert backbone.provenance["method"] in ("meta_uscl", "distil") and backbone.spec == name
    clip = tmp_path / "a.mp4"
    clip.write_bytes(b"clip")
    item = Item("pocus_lung/a.mp4", clip, "video", "covid", "pocus_lung/patient_4")
    task = Task("pocus", "POCUS", ("covid",), [item])
    ours = name == "meta_uscl_resnet18.cc_by"  # patient 4 of POCUS lung is among its clips
    assert find_leaks(backbone, task) == (["pocus_lung/patient_4"] if ours else [])
    backbone.provenance["clips"] = [checkpoints.sha256(clip)]
    assert find_leaks(backbone, task) == ["pocus_lung/patient_4"]


def test_the_default_tag_has_its_provenance_too():
    name = next(iter(registry.releases()))
    assert load_backbone(name.split(".")[0]).provenance == registry.provenance(name)
    assert timm.get_pretrained_cfg(name).license == registry.releases()[name]["licence"]
