"""The timm models and the package as installed: every idiom of timm, releases, import cost, metadata."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import fresh
import numpy as np
import pytest
import timm
import torch
from helpers import ROOT
from PIL import Image
from safetensors.torch import save_file

import uscl_hub
from uscl_hub import checkpoints, deploy, models

NAMES = ["meta_uscl_efficientnet_lite0", "meta_uscl_resnet18", "meta_uscl_resnet34", "meta_uscl_resnet50"]
NAME = "meta_uscl_resnet18"


def python(code, cwd, path=ROOT, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", **env},
    )


def quick(code, cwd, path=ROOT, **env):
    return fresh.run(code, cwd=cwd, env={**os.environ, "PYTHONPATH": str(path), **env})


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A copy of the package with one fp16 release added, as a later version will have."""
    root = tmp_path_factory.mktemp("released")
    shutil.copytree(ROOT / "uscl_hub", root / "uscl_hub", ignore=shutil.ignore_patterns("__pycache__", "meta_uscl_*"))
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
    model = timm.create_model(NAME)
    cfg = model.pretrained_cfg
    assert cfg["mean"] == (0.18,) * 3 and cfg["std"] == (0.24,) * 3 and cfg["crop_mode"] == "squash"
    assert {"license", "origin_url", "first_conv", "classifier", "interpolation", "input_size"} <= cfg.keys()
    data = timm.data.resolve_model_data_config(model)
    assert data["mean"] == (0.18,) * 3 and data["crop_pct"] == 1.0 and data["interpolation"] == "bilinear"


def test_heads_channels_and_feature_maps():
    x = torch.randn(2, 3, 64, 64)
    assert timm.create_model(NAME)(x).shape == (2, 512)
    assert timm.create_model(NAME, num_classes=4)(x).shape == (2, 4)
    assert timm.create_model(NAME, num_classes=0, global_pool="")(x).shape == (2, 512, 2, 2)
    assert timm.create_model(NAME, in_chans=1)(x[:, :1]).shape == (2, 512)
    for options in ({}, {"pretrained": True}, {"pretrained": True, "num_classes": 3}):
        model = timm.create_model(NAME, features_only=True, **options)
        assert [f.shape[1] for f in model(x)] == [64, 64, 128, 256, 512]


def test_no_release_is_an_error_not_random_weights(tmp_path):
    shutil.copytree(
        ROOT / "uscl_hub", tmp_path / "uscl_hub", ignore=shutil.ignore_patterns("__pycache__", "meta_uscl_*")
    )
    (tmp_path / "uscl_hub/weights/registry.json").write_text("{}")
    code = """
import timm, uscl_hub
for load in (lambda: timm.create_model("meta_uscl_resnet18", pretrained=True), uscl_hub.load_meta_uscl_backbone):
    try: load()
    except RuntimeError as e: assert "no pretrained weights" in str(e) and "pretrained=False" in str(e), e
    else: raise SystemExit("random weights")
"""
    result = quick(code, tmp_path, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", models.releases())
def test_every_release_is_whole(name):
    """What is shipped: the file of the hash, at most 25 MB, its provenance complete, usable without network."""
    entry, known = models.releases()[name], models.provenance(name)
    file = models.WEIGHTS / entry["file"]
    assert checkpoints.sha256(file) == entry["sha256"] and file.stat().st_size <= 25e6
    assert entry["licence"] and entry["data"] and entry["metrics"]
    assert {"method", "steps", "seed", "config", "sources", "code", "curves"} <= known.keys()
    assert len(known["manifest"]) == sum(source["clips"] for source in known["sources"]) == len(known["clips"])
    assert {clip["sha256"] for clip in known["manifest"]} == set(known["clips"])
    assert {clip["group"] for clip in known["manifest"]} == set(known["groups"])
    assert "not stated" not in {clip["licence"] for clip in known["manifest"]} and known["code"]["commit"]
    model = timm.create_model(name, pretrained=True).eval()
    assert model.pretrained_cfg["input_size"] == (3, entry["px"], entry["px"])
    features = model(uscl_hub.create_transform(model)(torch.rand(300, 400))[None])
    assert features.shape == (1, model.num_features) and features.isfinite().all() and features.std() > 0


def test_the_default_may_be_used_by_everybody():
    first = next(iter(models.releases()))
    assert models.releases()[first]["licence"] == "cc-by-4.0"
    assert timm.create_model("meta_uscl_resnet18", pretrained=True).pretrained_cfg["tag"] == first.split(".")[1]
    commercial = {"CC0 1.0", "CC BY 4.0", "CC BY 2.0", "Apache-2.0", "BSD-3-Clause", "MIT", "simulated"}
    sources = models.provenance(first)["sources"]
    assert {licence for source in sources for licence in source["licence"].split(", ")} <= commercial


def test_every_idiom_with_a_release(released, tmp_path):
    result = quick(
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


def test_damaged_release_is_refused(released, tmp_path):
    shutil.copytree(released / "uscl_hub", tmp_path / "uscl_hub")
    code = """
import pathlib, timm, uscl_hub
file = pathlib.Path("uscl_hub/weights/meta_uscl_resnet18.fake.safetensors")
whole = file.read_bytes()
for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-100], None):
    file.unlink() if damaged is None else file.write_bytes(damaged)
    try:
        timm.create_model("meta_uscl_resnet18", pretrained=True)
    except uscl_hub.checkpoints.CheckpointError as error:
        assert file.name in str(error) and "nstall" in str(error), error  # and what to do
    else:
        raise SystemExit("taken")
"""
    result = quick(code, tmp_path, tmp_path)
    assert result.returncode == 0, result.stderr


def test_weights_that_are_not_in_the_wheel_are_asked_for(released, tmp_path):
    shutil.copytree(released / "uscl_hub", tmp_path / "uscl_hub")
    registry = tmp_path / "uscl_hub/weights/registry.json"
    entries = json.loads(registry.read_text())
    entries["meta_uscl_resnet18.fake"]["wheel"] = False
    registry.write_text(json.dumps(entries))
    file = tmp_path / "uscl_hub/weights/meta_uscl_resnet18.fake.safetensors"
    elsewhere = file.rename(tmp_path / file.name)
    code = """
import timm, uscl_hub
from uscl_hub.cli import main
try:
    timm.create_model("meta_uscl_resnet18.fake", pretrained=True)
except uscl_hub.checkpoints.CheckpointError as error:
    assert "not in the wheel" in str(error) and "uscl_hub/weights/meta_uscl_resnet18.fake." in str(error), error
else:
    raise SystemExit("taken")
uscl_hub.load_meta_uscl_backbone(checkpoint=r"%s")
main(["list", "--json"])
"""
    result = quick(code % elsewhere, tmp_path, tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[0]["packaged"] is False


def test_the_wheel_leaves_out_what_the_registry_says():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    left_out = settings["options.exclude_package_data"]["uscl_hub"].replace("weights/", "").split(", ")
    outside = [entry["file"] for entry in models.releases().values() if not entry.get("wheel", True)]
    assert sorted(left_out) == sorted(outside)


def test_import_costs_little_beyond_timm(tmp_path):
    def seconds():
        code = (
            "import timm, time; t = time.process_time(); import uscl_hub; t = time.process_time() - t\n"
            'import sys; print(t, *[m for m in sys.modules if m.split(".")[0] in '
            '("av", "pydicom", "pyarrow", "onnx", "matplotlib", "sklearn", "scipy")])'
        )
        first, *heavy = python(code, tmp_path).stdout.split()
        assert not heavy
        return float(first)

    assert any(seconds() <= 0.1 for _ in range(5))  # the machine may be busy


@pytest.mark.slow
def test_wheel_in_a_fresh_environment(tmp_path):
    """Build the wheel from a clean copy, install it alone, use it from another folder."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("uscl_hub", "training"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))

    def run(*command, cwd=tmp_path):
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        result = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 95e6
    assert wheel.name == f"uscl_hub-{uscl_hub.__version__}-py3-none-any.whl"
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    run(*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    (site,) = (tmp_path / "venv/lib").glob("*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # torch, timm, ...: not once more
    code = "import uscl_hub, importlib.util as u; print(uscl_hub.__file__, u.find_spec('training'))\n"
    code += "import timm; print(timm.create_model('meta_uscl_resnet18', pretrained=True).pretrained_cfg['file'])\n"
    code += "from uscl_hub.cli import main; main(['list', '--json'])"
    where, weights, listing = run(python, "-c", code).splitlines()
    assert where == f"{site / 'uscl_hub/__init__.py'} None"
    assert [entry["name"] for entry in json.loads(listing)] == list(models.releases())
    assert (site / "uscl_hub/py.typed").is_file()
    assert weights == str(site / "uscl_hub/weights" / next(iter(models.releases().values()))["file"])
    shipped = {"registry.json"} | {f"{name}.json" for name in models.releases()}
    shipped |= {entry["file"] for entry in models.releases().values() if entry.get("wheel", True)}
    assert shipped == {path.name for path in (site / "uscl_hub/weights").iterdir()}
    assert run(tmp_path / "venv/bin/uscl-hub", "--version") == f"uscl-hub {uscl_hub.__version__}"


@pytest.mark.slow
def test_what_the_plain_installation_can_do(tmp_path):
    """Without the extras: images as a dataset, a file for deployment; what needs an extra says which one."""
    for i, label in enumerate(("normal", "benign") * 2):
        (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (40, 50), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / label / f"patient{i}.png")
    (tmp_path / "clip.mp4").write_bytes(b"x")
    (tmp_path / "scan.dcm").write_bytes(b"x")
    (tmp_path / "table.csv").write_text("path,label\nimages/normal/patient0.png,a\nscan.dcm,b\n")
    code = """
import sys
extras = "av pydicom pyarrow onnx onnxscript onnxruntime tyro matplotlib sklearn training".split()
sys.modules.update(dict.fromkeys(extras))  # importing them fails
import timm, uscl_hub
from uscl_hub.cli import main
model = timm.create_model("meta_uscl_resnet18", pretrained=True).eval()
images = uscl_hub.UltrasoundDataset("images", uscl_hub.create_transform(model))
assert len(images) == 4 and model(images[0][0][None]).shape == (1, 512)
try: uscl_hub.UltrasoundDataset("table.csv", task="classification")[1]
except Exception as error: assert "uscl-hub[media]" in str(error), error
else: raise SystemExit("read DICOM without pydicom")
assert main("export nc -o x.pt2 --format torch-export --frames images".split()) == 0
assert main(["list"]) == main(["info", "nc"]) == main(["verify", "nc"]) == 0
wants = {
    "embed images -o f.parquet": "embed",
    "search clip.mp4 f.parquet": "embed",
    "export nc -o x.onnx --format onnx": "export",
    "export nc -o y.pt2 --format torch-export --frames clip.mp4": "media",
    "export nc -o y.pt2 --format torch-export --frames scan.dcm": "media",
}
for words, extra in wants.items():
    print(extra, file=sys.stderr)
    assert main(words.split()) == 1
"""
    result = fresh.run(code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timm=True)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "Warning" not in line and line[:1] != " "]
    assert len(lines) == 10
    for extra, line in zip(lines[::2], lines[1::2]):
        assert line.startswith("uscl-hub: ") and f"uscl-hub[{extra}]" in line


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_file_for_deployment_names_no_folder_of_this_machine(tmp_path, tiny_export, format):
    out = tmp_path / "model"
    deploy.export(str(tiny_export), out, format=format, name="test_resnet")
    content = [out.read_bytes()]
    if format == "torch-export":
        with zipfile.ZipFile(out) as archive:
            content = [archive.read(name) for name in archive.namelist()]
    folders = [str(ROOT), str(tmp_path), sysconfig.get_path("purelib"), str(Path.home()) + os.sep]
    assert not [folder for folder in folders for part in content if folder.encode() in part]


def test_unknown_attribute():
    assert "load_meta_uscl_backbone" in dir(uscl_hub)
    with pytest.raises(AttributeError, match="nothing"):
        uscl_hub.nothing
