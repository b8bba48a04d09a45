"""`uscl-hub embed` by several processes: the table of one, whatever is killed on the way."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import ROOT
from PIL import Image

from uscl_hub.features.embed import embed

COUNT = 11
PROGRAM = """
import os, signal, sys
from uscl_hub import ranks
from uscl_hub.features import embed as module
module.PART_SECONDS = 0  # a part a batch
save, count = module.save_part, []
def counted(*arguments):
    save(*arguments)
    count.append(1)
    if ranks.rank() == int(sys.argv[4]) and len(count) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
module.save_part = counted
module.embed([sys.argv[1]], sys.argv[2], name="test_resnet", checkpoint=sys.argv[3], batch_size=1)
"""


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "scans"
    root.mkdir()
    for i in range(COUNT):
        clip = [Image.fromarray(rng.integers(0, 200, (60, 80), dtype=np.uint8)) for _ in range(3)]
        clip[0].save(root / f"{'abcdefghijk'[i]}.gif", save_all=True, append_images=clip[1:])
    (root / "broken.png").write_bytes(b"no picture")
    return root


def torchrun(*command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=127.0.0.1:0", *map(str, command)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(launch, env=env, capture_output=True, text=True, timeout=300)


def table_of(out):
    rows = pq.read_table(out).to_pylist()
    return {(row["clip"], row["level"], row["frame"]): (row["sha256"], row["feature"]) for row in rows}, len(rows)


def same(out, other):
    (found, count), (wanted, _) = table_of(out), table_of(other)
    assert found.keys() == wanted.keys() and count == len(found)
    for key, (digest, feature) in wanted.items():
        assert found[key][0] == digest
        np.testing.assert_allclose(found[key][1], feature, atol=1e-5)


@pytest.mark.slow
def test_by_two_processes_as_by_one(tiny_export, scans, tmp_path):
    alone = embed([scans], tmp_path / "alone.parquet", name="test_resnet", checkpoint=tiny_export, progress=False)
    command = ["embed", scans, "-o", tmp_path / "two.parquet", "--name", "test_resnet", "--checkpoint", tiny_export]
    done = torchrun("-m", "uscl_hub.cli", *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"two.parquet: {COUNT} clips, {3 * COUNT} frames") == 1  # one of them says it
    same(tmp_path / "two.parquet", tmp_path / "alone.parquet")
    report = json.loads((tmp_path / "two.parquet.report.json").read_text())
    assert report["computed"] == COUNT and report["failed"] == alone["failed"] != []
    assert not (tmp_path / "two.parquet.partial").exists()
    nothing = torchrun("-m", "uscl_hub.cli", *["embed", tmp_path / "none", *command[2:]])
    assert (
        nothing.returncode == 1 and 'Traceback (most recent call last):\n  File "<frozen runpy>' not in nothing.stdout
    )
    assert f"uscl-hub: {tmp_path / 'none'}" in nothing.stderr


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_done_again_and_nothing_twice(tiny_export, scans, tmp_path, victim):
    program, out = tmp_path / "program.py", tmp_path / "f.parquet"
    program.write_text(PROGRAM)
    killed = torchrun(program, scans, out, tiny_export, victim)
    assert killed.returncode != 0 and not out.exists()
    kept = len(list((tmp_path / "f.parquet.partial").glob("[0-9]*.parquet")))
    assert kept >= 2
    done = torchrun(program, scans, out, tiny_export, -1)
    assert done.returncode == 0, done.stderr
    embed([scans], tmp_path / "alone.parquet", name="test_resnet", checkpoint=tiny_export, progress=False)
    same(out, tmp_path / "alone.parquet")
    assert json.loads((tmp_path / "f.parquet.report.json").read_text())["computed"] == COUNT - kept
