"""hubconf.py through torch.hub, in fresh interpreters, from another directory, with and without the
package installed."""

import os
import shutil

import fresh
import pytest
from helpers import ROOT

ENTRYPOINTS = [
    *("meta_uscl_backbone", "meta_uscl_efficientnet_lite0"),
    *("meta_uscl_resnet18", "meta_uscl_resnet34", "meta_uscl_resnet50"),
]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    import timm

    from uscl_hub import checkpoints, models

    folder = tmp_path_factory.mktemp("export") / "out"
    model = timm.create_model("resnet18", num_classes=0)
    checkpoints.save_folder(
        folder,
        model.state_dict(),
        {"architecture": "resnet18", "num_classes": 0, "pretrained_cfg": models.make_cfg(72)},
        "# card",
    )
    return folder


def python(code, cwd, path=""):
    result = fresh.run(code, cwd=cwd, env={**os.environ, "PYTHONPATH": str(path)}, timm=True)
    assert result.returncode == 0, result.stderr
    return result


LOAD = """
import os, sys, torch
model = torch.hub.load({repo!r}, 'meta_uscl_resnet18', source='local', checkpoint={export!r})
assert not model.training and model(torch.zeros(2, 3, 64, 64)).shape == (2, 512)
os.chdir('/')
model, transform = torch.hub.load({root!r}, 'meta_uscl_backbone', source='local',
                                  checkpoint={export!r}, in_chans=1)
assert model(transform(torch.zeros(30, 40))[None]).shape == (1, 512)
assert transform(torch.zeros(3, 30, 40)).shape == (1, 72, 72)
assert {root!r} not in sys.path
import uscl_hub, uscl_hub.cli, uscl_hub.convert, uscl_hub.clips.decode  # later lazy imports
print(uscl_hub.__file__)
"""


@pytest.mark.parametrize("relative", [False, True])
def test_load_from_another_directory_without_the_package(tmp_path, export, relative):
    repo = os.path.relpath(ROOT, tmp_path) if relative else str(ROOT)
    result = python(LOAD.format(repo=repo, root=str(ROOT), export=str(export)), tmp_path)
    assert result.stdout.strip() == str(ROOT / "uscl_hub/__init__.py") and "UserWarning" not in result.stderr


@pytest.mark.parametrize("version", ["0.1.0", "9.9.9"])
def test_load_with_the_package_installed_and_imported(tmp_path, export, version):
    shutil.copytree(ROOT / "uscl_hub", tmp_path / "site/uscl_hub", ignore=shutil.ignore_patterns("__pycache__"))
    init = tmp_path / "site/uscl_hub/__init__.py"
    from uscl_hub import __version__

    init.write_text(init.read_text().replace(__version__, __version__ if version == "0.1.0" else version))
    code = LOAD.format(repo=str(ROOT), root=str(ROOT), export=str(export))
    first = python("import uscl_hub" + code, tmp_path, tmp_path / "site")  # what is imported stays
    assert first.stdout.strip() == str(init)
    assert ("9.9.9" in first.stderr) == (version == "9.9.9")
    later = python(code, tmp_path, tmp_path / "site")  # else the checkout's is taken
    assert later.stdout.strip() == str(ROOT / "uscl_hub/__init__.py") and "9.9.9" not in later.stderr


def test_listed_entrypoints_and_their_help(tmp_path):
    result = python(
        f"""
import torch.hub, inspect, sys
from torch.hub import _import_module
sys.modules.pop("uscl_hub", None)
m = _import_module("hubconf", {str(ROOT / "hubconf.py")!r})
assert "uscl_hub" not in sys.modules  # nothing is imported before the dependency check
names = [f for f in dir(m) if callable(getattr(m, f)) and not f.startswith("_")]
assert sorted(names) == {ENTRYPOINTS!r}, names
for n in names:
    assert len(getattr(m, n).__doc__) > 80
torch.hub._check_dependencies(m)
""",
        tmp_path,
    )
    assert result.returncode == 0


def test_no_release_is_said(tmp_path):
    result = python(
        f"""
import torch
try: torch.hub.load({str(ROOT)!r}, "meta_uscl_resnet34", source="local")
except RuntimeError as e: assert "pretrained=False" in str(e)
else: raise SystemExit("random weights")
assert torch.hub.load({str(ROOT)!r}, "meta_uscl_resnet34", source="local", pretrained=False) is not None
""",
        tmp_path,
    )
    assert result.returncode == 0
