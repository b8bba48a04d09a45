"""The timm models and the package as installed: every idiom of timm, releases, import cost, metadata."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import uscl_hub
from uscl_hub import checkpoints, models

ROOT = Path(__file__).parent.parent
NAMES = ["meta_uscl_resnet18", "meta_uscl_resnet34", "meta_uscl_resnet50"]


def python(code, cwd, path=ROOT, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", **env},
    )


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A copy of the package with one fp16 release added, as a later version will have."""
    root = tmp_path_factory.mktemp("released")
    shutil.copytree(ROOT / "uscl_hub", root / "uscl_hub", ignore=shutil.ignore_patterns("__pycache__"))
    torch.manual_seed(1)
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
        root / "uscl_hub/weights/meta_uscl_resnet18.fake.safetensors",
    )
    entry = {
        "file": "meta_uscl_resnet18.fake.safetensors",
        "px": 96,
        "licence": "cc-by-4.0",
        "data": "noise",
        "sha256": checkpoints.sha256(root / "uscl_hub/weights/meta_uscl_resnet18.fake.safetensors"),
        "metrics": {"knn": 0.5},
        "hub_id": None,
    }
    (root / "uscl_hub/weights/registry.json").write_text(json.dumps({"meta_uscl_resnet18.fake": entry}))
    save_file(
        {k: v.half().float() if v.is_floating_point() else v for k, v in state.items()},
        root / "truth.safetensors",
    )
    return root


@pytest.mark.parametrize("name", NAMES)
def test_same_network_as_timms(name):
    ours, theirs = timm.create_model(name), timm.create_model(models.ARCHITECTURES[name], num_classes=0)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_registered_with_a_real_cfg():
    assert timm.list_models("meta_uscl*") == NAMES
    model = timm.create_model(NAMES[0])
    cfg = model.pretrained_cfg
    assert cfg["mean"] == (0.18,) * 3 and cfg["std"] == (0.24,) * 3 and cfg["crop_mode"] == "squash"
    assert {"license", "origin_url", "first_conv", "classifier", "interpolation", "input_size"} <= cfg.keys()
    data = timm.data.resolve_model_data_config(model)
    assert data["mean"] == (0.18,) * 3 and data["crop_pct"] == 1.0 and data["interpolation"] == "bilinear"


def test_heads_channels_and_feature_maps():
    x = torch.randn(2, 3, 64, 64)
    assert timm.create_model(NAMES[0])(x).shape == (2, 512)
    assert timm.create_model(NAMES[0], num_classes=4)(x).shape == (2, 4)
    assert timm.create_model(NAMES[0], num_classes=0, global_pool="")(x).shape == (2, 512, 2, 2)
    assert timm.create_model(NAMES[0], in_chans=1)(x[:, :1]).shape == (2, 512)
    assert [f.shape[1] for f in timm.create_model(NAMES[0], features_only=True)(x)] == [64, 64, 128, 256, 512]


@pytest.mark.skipif(bool(models.releases()), reason="there are released weights")
@pytest.mark.parametrize(
    "door", [lambda: timm.create_model(NAMES[0], pretrained=True), lambda: uscl_hub.load_meta_uscl_backbone()]
)
def test_no_release_is_an_error_not_random_weights(door):
    with pytest.raises(checkpoints.CheckpointError, match="no pretrained weights have been released.*pretrained=False"):
        door()


def test_every_idiom_with_a_release(released, tmp_path):
    result = python(
        """
import timm, torch, uscl_hub, sys
from safetensors.torch import load_file
truth = load_file(sys.argv[1]) if len(sys.argv) > 1 else load_file(r"%s")
x = torch.randn(2, 3, 96, 96)
reference = timm.create_model("resnet18", num_classes=0); reference.load_state_dict(truth); reference.eval()
y = reference(x)
assert timm.list_pretrained("meta_uscl*") == ["meta_uscl_resnet18.fake"], timm.list_pretrained("meta_uscl*")
assert timm.models.is_model_pretrained("meta_uscl_resnet18")
for name in ("meta_uscl_resnet18", "meta_uscl_resnet18.fake"):
    m = timm.create_model(name, pretrained=True).eval()
    assert torch.equal(m(x), y)
    assert m.pretrained_cfg["tag"] == "fake" and m.pretrained_cfg["input_size"] == (3, 96, 96)
    assert m.pretrained_cfg["license"] == "cc-by-4.0" and m.conv1.weight.dtype == torch.float32
assert torch.equal(timm.create_model(name, pretrained=True, num_classes=0).eval()(x), y)
m = timm.create_model(name, pretrained=True, num_classes=5).eval()
assert m(x).shape == (2, 5) and torch.equal(m.forward_head(m.forward_features(x), pre_logits=True), y)
m = timm.create_model(name, pretrained=True, in_chans=1).eval()
assert torch.equal(m.conv1.weight, truth["conv1.weight"].sum(1, keepdim=True))
torch.testing.assert_close(m(x[:, :1]), reference(x[:, :1].expand(2, 3, 96, 96)), atol=1e-5, rtol=1e-5)
m = timm.create_model(name, pretrained=True, features_only=True).eval()
assert torch.equal(m(x)[-1].mean((2, 3)), y) or torch.allclose(m(x)[-1].mean((2, 3)), y, atol=1e-6)
m = timm.create_model(name, pretrained=True, num_classes=0, global_pool="max").eval()
assert torch.equal(m(x), reference.forward_features(x).amax((2, 3)))
m = timm.create_model("meta_uscl_resnet18", checkpoint_path=r"%s").eval()
assert torch.equal(m(x), y)
for tag in (None, "fake", "meta_uscl_resnet18.fake"):
    m = uscl_hub.load_meta_uscl_backbone(checkpoint=tag)
    assert not m.training and torch.equal(m(x), y)
assert uscl_hub.create_transform(m)(torch.zeros(40, 50)).shape == (3, 96, 96)
try: timm.create_model("meta_uscl_resnet34", pretrained=True)
except RuntimeError as e: assert "meta_uscl_resnet18.fake" in str(e), e
else: raise SystemExit("random weights")
try: timm.create_model("meta_uscl_resnet18.nope", pretrained=True)
except RuntimeError as e: assert "nope" in str(e), e
else: raise SystemExit("unknown tag taken")
"""
        % ((released / "truth.safetensors",) * 2),
        tmp_path,
        released,
        HF_HUB_OFFLINE="1",
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_damaged_release_is_refused(released, tmp_path, harm):
    shutil.copytree(released / "uscl_hub", tmp_path / "uscl_hub")
    file = tmp_path / "uscl_hub/weights/meta_uscl_resnet18.fake.safetensors"
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif harm == "truncate":
        file.write_bytes(data[:-100])
    else:
        file.unlink()
    result = python(
        'import timm, uscl_hub; timm.create_model("meta_uscl_resnet18", pretrained=True)', tmp_path, tmp_path
    )
    assert result.returncode == 1 and file.name in result.stderr and "CheckpointError" in result.stderr
    assert "nstall" in result.stderr.splitlines()[-1]  # what to do


def test_import_costs_little_beyond_timm(tmp_path):
    def seconds():
        code = (
            "import timm, time; t = time.perf_counter(); import uscl_hub; t = time.perf_counter() - t\n"
            'import sys; print(t, *[m for m in sys.modules if m.split(".")[0] in '
            '("av", "pydicom", "pyarrow", "onnx", "matplotlib", "sklearn", "scipy")])'
        )
        first, *heavy = python(code, tmp_path).stdout.split()
        assert not heavy
        return float(first)

    assert statistics.median(seconds() for _ in range(3)) < 0.1 * 3  # 3: the machine may be busy


def test_version_and_package_data_from_one_place(tmp_path):
    """Build the wheel's file list from a clean copy with setuptools itself."""
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("README.md", "LICENSE"):
        (tmp_path / name).write_text("x")
    shutil.copytree(ROOT / "uscl_hub", tmp_path / "uscl_hub", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "uscl_hub/weights/x.safetensors").write_bytes(b"x")
    (tmp_path / "training").mkdir()
    (tmp_path / "training/__init__.py").write_text("")
    result = subprocess.run(
        [sys.executable, "-c", "from setuptools import setup; setup()", "-q", "build"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    built = {p.relative_to(tmp_path / "build/lib").as_posix() for p in (tmp_path / "build/lib").rglob("*")}
    assert {"uscl_hub/weights/registry.json", "uscl_hub/weights/x.safetensors", "uscl_hub/cli.py"} <= built
    assert not any(p.startswith("training") for p in built)
    version = subprocess.run(
        [sys.executable, "-c", "from setuptools import setup; setup()", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    ).stdout.split()[-1]
    assert version == uscl_hub.__version__


def test_unknown_attribute():
    assert "load_meta_uscl_backbone" in dir(uscl_hub)
    with pytest.raises(AttributeError, match="nothing"):
        uscl_hub.nothing
