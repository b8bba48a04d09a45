"""The authors' .pth files, imitated with torchvision: converted features are the original's, anything
odd is refused."""

import json
import zipfile

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

import uscl_hub
from uscl_hub.checkpoints import CheckpointError
from uscl_hub.cli import main
from uscl_hub.convert import convert


class Official(nn.Module):
    """The layout of the authors' encoders: a torchvision ResNet without its fc, and heads."""

    def __init__(self, name="resnet18", older=False):
        super().__init__()
        resnet = getattr(torchvision.models, name)(weights=None)
        width = resnet.fc.in_features
        self.features = nn.Sequential(*list(resnet.children())[:-1])
        if older:
            self.linear, self.fc = nn.Linear(width, 256), nn.Linear(256, 12)
        else:
            self.l1, self.l2 = nn.Linear(width, width), nn.Linear(width, 256)


def official(path, wrap=True, **kwargs):
    torch.manual_seed(0)
    model = Official(**kwargs)
    for m in model.modules():  # make BatchNorm's statistics matter
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 2)
    torch.save({"state_dict": model.state_dict(), "epoch": 300} if wrap else model.state_dict(), path)
    return model.eval()


@pytest.mark.parametrize(
    "name, older, wrap",
    [
        ("resnet18", False, True),
        ("resnet18", True, False),
        ("resnet34", False, False),
        ("resnet50", True, True),
    ],
)
def test_features_are_the_originals(tmp_path, name, older, wrap):
    original = official(tmp_path / "o.pth", wrap, name=name, older=older)
    config = convert(tmp_path / "o.pth", tmp_path / "out")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = original.features(x).flatten(1)
        plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        loaded = uscl_hub.load_meta_uscl_backbone(f"meta_uscl_{name}", checkpoint=tmp_path / "out")
        assert torch.equal(plain(x), loaded(x))
        torch.testing.assert_close(loaded(x), want, atol=1e-5, rtol=1e-5)
    assert config["architecture"] == name and config["uscl_hub"]["method"] == ("uscl" if older else "meta_uscl")
    mean, std = (0.5, 0.25) if older else (0.18, 0.24)
    white = uscl_hub.create_transform(loaded)(torch.ones(10, 10))
    assert white.shape == (3, 224, 224) and torch.allclose(white, torch.tensor((1 - mean) / std))


def test_data_parallel_names_and_chosen_normalisation(tmp_path):
    model = official(tmp_path / "o.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "dp.pth")
    config = convert(tmp_path / "dp.pth", tmp_path / "out", normalisation="uscl", px=96)
    assert config["pretrained_cfg"]["mean"] == (0.5,) * 3 and config["pretrained_cfg"]["input_size"] == (
        3,
        96,
        96,
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("features.6.1.bn2.running_var"), r"lacks layer3\.1\.bn2\.running_var"),
        (lambda s: s.pop("features.0.weight"), r"lacks conv1\.weight"),
        (lambda s: s.update({"features.9.weight": torch.zeros(1)}), r"unknown keys features\.9\.weight"),
        (lambda s: s.update({"encoder.x": torch.zeros(1)}), r"unknown keys encoder\.x"),
        (
            lambda s: s.update({"features.4.5.conv1.weight": torch.zeros(1)}),
            r"unknown layer1\.5\.conv1\.weight",
        ),
        (
            lambda s: s.update({"features.0.weight": torch.zeros(64, 1, 7, 7)}),
            r"conv1\.weight \(64, 1, 7, 7\)",
        ),
        (lambda s: s["features.1.weight"].fill_(float("nan")), r"NaN"),
    ],
)
def test_unknown_and_missing_keys_are_refused_by_name(tmp_path, change, message, capsys):
    official(tmp_path / "o.pth")
    content = torch.load(tmp_path / "o.pth", weights_only=True)
    change(content["state_dict"])
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=message) as error:
        convert(tmp_path / "bad.pth", tmp_path / "out")
    assert "bad.pth" in str(error.value) and not (tmp_path / "out").exists()
    assert main(["convert", str(tmp_path / "bad.pth"), str(tmp_path / "out")]) == 1
    assert "bad.pth" in capsys.readouterr().err


def test_files_that_cannot_be_read_safely(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "best": np.float64(0.9)}, tmp_path / "numpy.pth")
    with pytest.raises(CheckpointError, match="numpy scalars.*weights_only=False"):
        convert(tmp_path / "numpy.pth", tmp_path / "out")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("text", "empty", "list", "missing"):
        with pytest.raises(CheckpointError, match=f"{name}.pth"):
            convert(tmp_path / f"{name}.pth", tmp_path / "out")
    data = official(tmp_path / "o.pth") and (tmp_path / "o.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cut.pth"):
        convert(tmp_path / "cut.pth", tmp_path / "out")


def test_archives_that_lie(tmp_path):
    """torch.load looks at no checksum, and unpacks whatever it is told to."""
    official(tmp_path / "o.pth")
    data = bytearray((tmp_path / "o.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flip.pth").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    for name, message in (("flip", "damaged.*CRC"), ("bomb", "more than its size")):
        with pytest.raises(CheckpointError, match=f"{name}.pth: is {message}|{name}.pth: .*{message}"):
            convert(tmp_path / f"{name}.pth", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_command(tmp_path, capsys):
    official(tmp_path / "o.pth")
    assert main(["convert", str(tmp_path / "o.pth"), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "resnet18"
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["convert", str(tmp_path / "o.pth"), str(tmp_path / "out")]) == 1  # never overwritten
    assert "not empty" in capsys.readouterr().err
