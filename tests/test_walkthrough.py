"""docs/walkthrough.py, run at a very small size."""

import re
from pathlib import Path

import pytest

from training.data.simulate import write_demo

SOURCE = Path(__file__).parents[1] / "docs" / "walkthrough.py"


@pytest.mark.slow
def test_walkthrough(tmp_path, monkeypatch, capsys):
    write_demo(tmp_path / "walkthrough" / "clips", clips=80, frames=3, size=32, seed=0)
    monkeypatch.chdir(tmp_path)
    source = SOURCE.read_text()
    small = 'MODEL, PX, STEPS = "test_resnet", 32, 4'
    assert source.count("\nMODEL, PX, STEPS = ") == 1
    source = re.sub(r"\nMODEL, PX, STEPS = .*", "\n" + small, source)
    cells = [cell for cell in re.split(r"^# %%", source, flags=re.M)[1:] if not cell.startswith(" [markdown]")]
    assert len(cells) == 7
    namespace = {"__name__": "__main__", "__file__": str(SOURCE)}
    for cell in cells:  # each on its own, as in a notebook
        exec(compile(cell, str(SOURCE), "exec"), namespace)
    out = capsys.readouterr().out
    for word in ("FrameCache(", "exported to", "linear, balanced accuracy", "fine-tuned, balanced accuracy", "onnx"):
        assert word in out
    assert (tmp_path / "walkthrough/run/nearest.png").exists() and (tmp_path / "walkthrough/run/backbone.onnx").exists()
