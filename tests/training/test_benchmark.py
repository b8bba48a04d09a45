"""The benchmark's own command, on settings so small that its figures mean nothing."""

import json

import fresh
import pytest


def benchmark(*args):
    return fresh.script("training/benchmark.py", "--quick", "True", "--device", "cpu", *args)


@pytest.mark.slow
def test_prints_a_table_and_writes_it_as_json(tmp_path):
    done = benchmark("--only", "step", "ingest", "embed", "index", "--out", str(tmp_path / "b.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "b.json").read_text())
    assert {row["section"] for row in report["rows"]} == {"step", "ingest", "embed", "index"}
    assert all(
        row["value"] is not None and f"| {row['section']} | {row['figure']} |" in done.stdout for row in report["rows"]
    )
    assert report["machine"]["cpu"] and report["settings"]["quick"] is True


def test_an_unknown_section_is_named(tmp_path):
    done = benchmark("--only", "speed", "--out", str(tmp_path / "b.json"))
    assert done.returncode == 1 and "--only: speed unknown; there are step, memory" in done.stderr
    assert not (tmp_path / "b.json").exists()
