"""The benchmark's own command, on settings so small that its figures mean nothing."""

import json
import os
import subprocess
import sys

import fresh
import pytest
from helpers import ROOT


def benchmark(*args):
    return fresh.script("training/benchmark.py", "--quick", "True", "--device", "cpu", *args)


@pytest.mark.slow
def test_prints_a_table_and_writes_it_as_json(tmp_path):
    sections = "step", "meta", "ingest", "embed", "use", "index", "ranks"
    done = benchmark("--only", *sections, "--out", str(tmp_path / "b.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "b.json").read_text())
    assert {row["section"] for row in report["rows"]} == set(sections)
    assert all(
        row["value"] is not None and f"| {row['section']} | {row['figure']} |" in done.stdout for row in report["rows"]
    )
    assert report["machine"]["cpu"] and report["settings"]["quick"] is True


def test_an_unknown_section_is_named(tmp_path):
    done = benchmark("--only", "speed", "--out", str(tmp_path / "b.json"))
    assert done.returncode == 1 and "--only: speed unknown; there are step, memory" in done.stderr
    assert not (tmp_path / "b.json").exists()


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_the_cpu(tmp_path):
    command = ["bash", "training/benchmarks/gpu.sh", str(tmp_path), "--quick", "True", "--only", "step"]
    env = {**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0 and "ended with" not in done.stdout, done.stdout + done.stderr
    assert {path.stem for path in tmp_path.glob("*.json")} == {"step_32", "step_256", "step_32_float32", "embed"}
    assert json.loads((tmp_path / "embed.json").read_text(encoding="utf-8"))["settings"]["quick"] is True
