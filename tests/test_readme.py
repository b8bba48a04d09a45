"""The README's Python examples, run in order; the commands it names exist."""

import re
import shlex
from pathlib import Path

import timm
import torch
from PIL import Image

from training.engine.export import export
from uscl_hub.cli import parser

ROOT = Path(__file__).parents[1]


def test_python_examples_run(tmp_path, monkeypatch):
    torch.manual_seed(0)
    backbone = timm.create_model("resnet18", num_classes=0)
    export(
        backbone,
        "meta_uscl_resnet18",
        64,
        tmp_path / "runs/demo/export",
        {"method": "meta_uscl", "steps": 1, "sources": [], "manifest_sha256": "", "metrics": {}},
    )
    for i, label in enumerate(("benign", "malignant", "normal") * 2):
        (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 200), (40 * i,) * 3).save(tmp_path / "images" / label / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["loss"].isfinite() and namespace["model"].num_classes == 3
    assert namespace["features"].shape == (6, 512)
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(namespace["grey"](x), backbone.eval()(x.expand(-1, 3, -1, -1)))
        assert namespace["segmenter"](torch.rand(2, 3, 64, 48)).shape == (2, 1, 64, 48)
        assert set(namespace["detector"].eval()([torch.rand(3, 64, 64)])[0]) == {"boxes", "labels", "scores", "masks"}


def test_the_commands_are_ones_and_it_is_short():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 250
    lines = re.findall(r"^uscl-hub (.+)$", readme, flags=re.M) + re.findall(r"`uscl-hub (\w+ [^`]+)`", readme)
    assert {parser().parse_args(shlex.split(line)).command for line in lines} >= {"embed", "search", "push"}
    (commands,) = (action.choices for action in parser()._actions if action.choices)
    for name in re.findall(r"`(\w+)`", re.search(r"lists the rest:(.*)", readme)[1]):
        assert name in commands, name


def test_the_test_command_is_what_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    assert "pip install -e '.[test]' && pytest" in readme
    assert "pip install -q -e '.[test]'\n" in ci and ci.endswith('\npytest -m "slow or not slow"\n')
    for check in ("ruff check", "ruff format --check", "mypy"):
        assert f"\n{check}\n" in ci


def test_files_and_settings_named_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", readme) + re.findall(r"training/configs/\w+\.yaml", readme):
        assert (ROOT / path).exists(), path
    source = (ROOT / "training/config.py").read_text() + (ROOT / "training/run.py").read_text()
    for name in re.findall(r"--((?:data|optim|meta|pairs|model)\.\w+)", readme):
        assert re.search(rf"^    {name.partition('.')[2]}:", source, flags=re.M), name
