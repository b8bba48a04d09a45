"""The exported folder: three ways to load the same features, nothing private in it, nothing half written."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fresh
import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import ROOT
from safetensors.torch import load_file

import uscl_hub
from training.config import Config, Model
from training.data.provenance import DataSource, Provenance
from training.engine import export as exporting
from training.engine import sources, train
from uscl_hub import checkpoints, registry
from uscl_hub.errors import CheckpointError
from uscl_hub.models import size_arguments

PROVENANCE = Provenance(
    method="meta_uscl",
    steps=7,
    sources=[DataSource("lung", clips=3, frames=40, licence="CC BY 4.0")],
    metrics={"val_loss": 1.23456, "knn": None, "effective_rank": 3.0},
    manifest_sha256="ab" * 32,
)


def trained(name="meta_uscl_resnet18", size=32):
    torch.manual_seed(1)
    kwargs = size_arguments(name, size)
    backbone = timm.create_model(name, num_classes=0, **kwargs)
    with torch.no_grad():
        for tensor in [*backbone.parameters(), *(b for b in backbone.buffers() if b.is_floating_point())]:
            tensor += 0.02 * torch.rand_like(tensor)
    return backbone.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    backbone = trained()
    return exporting.export(backbone, "meta_uscl_resnet18", 32, tmp_path_factory.mktemp("e") / "out", PROVENANCE)


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_three_ways_give_equal_features(folder, images):
    expected = trained()(images)
    assert expected.std() > 0.01
    ways = {
        "timm": timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval(),
        "torch.hub": torch.hub.load(str(ROOT), "meta_uscl_resnet18", source="local", checkpoint=str(folder)),
        "uscl_hub": uscl_hub.load_meta_uscl_backbone("meta_uscl_resnet18", checkpoint=folder),
    }
    for name, model in ways.items():
        assert not model.training
        assert (model(images) - expected).abs().max() == 0, name


def test_timm_alone_loads_it(folder, images, tmp_path):
    """In a process that cannot import this package."""
    np.save(tmp_path / "x.npy", images)
    code = f"""
import numpy, sys, timm, torch
sys.modules["uscl_hub"] = None
model = timm.create_model("local-dir:{folder}", pretrained=True, num_classes=0).eval()
cfg = timm.data.resolve_model_data_config(model)
with torch.no_grad():
    numpy.save("y.npy", model(torch.from_numpy(numpy.load("x.npy"))))
print(cfg)
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = fresh.run(code, cwd=tmp_path, env=env, timm=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        difference = np.abs(np.load(tmp_path / "y.npy") - trained()(images).numpy()).max()
    assert difference < 1e-5  # its number of threads may be another
    assert "[0.18, 0.18, 0.18]" in done.stdout and "[3, 32, 32]" in done.stdout


def test_config_of_the_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "resnet18" and config["num_features"] == 512 and config["num_classes"] == 0
    cfg = config["pretrained_cfg"]
    assert cfg["mean"] == [0.18] * 3 and cfg["std"] == [0.24] * 3 and cfg["input_size"] == [3, 32, 32]
    assert cfg["first_conv"] == "conv1" and cfg["classifier"] == "fc" and cfg["interpolation"] == "bilinear"
    provenance = config["uscl_hub"]
    assert PROVENANCE.as_dict().items() <= provenance.items()
    assert provenance["code"]["version"] == uscl_hub.__version__ and provenance["created"].endswith("+00:00")
    assert provenance["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert load_file(folder / "model.safetensors").keys() == trained().state_dict().keys()
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_the_card_names_what_the_weights_were_made_from(tmp_path):
    released = registry.provenance("meta_uscl_resnet18.cc_by_128")
    parents = [{"role": "init", "name": "older", "parents": released["parents"]}]
    known = replace(PROVENANCE, method="distil", parents=parents)
    card = (exporting.export(trained(), "meta_uscl_resnet18", 32, tmp_path / "out", known) / "README.md").read_text()
    assert "pretrained on ultrasound by distillation" in card and "2212.04097" not in card
    made = card.partition("Made from (licences: ")[2]
    assert "- older: licence not stated\n  - ImageNet" in made and "natural pictures" in made
    assert "apache-2.0" in made.partition(")")[0]


def test_weights_that_timm_has_loaded_are_a_parent(tmp_path):
    for name in ("meta_uscl_resnet18", "meta_uscl_resnet18.nc"):
        backbone = timm.create_model(name, pretrained=True)
        state = SimpleNamespace(encoder=SimpleNamespace(backbone=backbone), parents=[])
        config = Config(method="simclr", model=Model(name=name, pretrained=True))
        assert train.start(state, config, None, torch.device("cpu")) is None
        (parent,) = state.parents
        tag = name if "." in name else "meta_uscl_resnet18.cc_by_128"
        assert parent["name"] == tag and parent["sha256"] == registry.releases()[tag]["sha256"]
        assert parent["groups"] == registry.provenance(tag)["groups"] and parent["licence"]
    about = sources.about_pretrained(timm.create_model("test_resnet"))
    assert about["name"].startswith("timm test_resnet") and about["licence"] == "apache-2.0"


def test_model_card(folder):
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "timm" and front["license"] == "other"
    assert "| lung | 3 | 40 | CC BY 4.0 |" in card and "| val_loss | 1.235 |" in card
    assert "knn" not in card  # was not measured
    assert PROVENANCE.manifest_sha256 in card


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "resnet18.a1_in1k"])
def test_other_timm_models(tmp_path, images, name):
    backbone = trained(name)
    path = exporting.export(backbone, name, 32, tmp_path / "out", PROVENANCE)
    reloaded = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()
    assert (reloaded(images) - backbone(images)).abs().max() == 0
    ours = uscl_hub.load_meta_uscl_backbone(name.split(".")[0], checkpoint=path)
    assert (ours(images) - backbone(images)).abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("name", registry.ARCHITECTURES)
def test_all_of_our_architectures(tmp_path, images, name):
    backbone = trained(name)
    path = exporting.export(backbone, name, 32, tmp_path / "out", PROVENANCE)
    assert json.loads((path / "config.json").read_text())["architecture"] == registry.ARCHITECTURES[name].timm
    for reloaded in (
        timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval(),
        uscl_hub.load_meta_uscl_backbone(name, checkpoint=path),
    ):
        assert torch.equal(reloaded(images), backbone(images))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, bad):
    backbone = trained("test_resnet")
    backbone.layer1[0].conv1.weight.data[0, 0, 0, 0] = bad
    with pytest.raises(CheckpointError, match="layer1.0.conv1.weight: nothing is written"):
        exporting.export(backbone, "test_resnet", 32, tmp_path / "out", PROVENANCE)
    assert list((tmp_path / "out").glob("*")) == []
    backbone = trained("test_resnet")
    next(b for n, b in backbone.named_buffers() if n.endswith("running_var"))[0] = bad
    with pytest.raises(CheckpointError, match="running_var"):
        exporting.export(backbone, "test_resnet", 32, tmp_path / "out", PROVENANCE)


def test_a_failed_write_leaves_the_old_export(tmp_path, monkeypatch):
    backbone = trained("test_resnet")
    path = exporting.export(backbone, "test_resnet", 32, tmp_path / "out", PROVENANCE)
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    def full(state, file):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_tensors", full)
    with pytest.raises(OSError, match="No space"):
        exporting.export(backbone, "test_resnet", 32, path, PROVENANCE)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
