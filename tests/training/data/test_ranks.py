"""An ingest by several processes: each its share, the result that of one, whatever is killed on the way."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from training.data import index
from training.data.cache import CacheError, FrameCache
from training.data.ingest import ingest
from training.data.shard import Work
from training.data.simulate import simulate_clip, write_demo, write_video

SETTINGS = dict(size=32, workers=0, progress=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("data") / "demo", clips=14, frames=6, size=48, seed=0)


@pytest.fixture(scope="module")
def alone(demo, tmp_path_factory):
    return ingest([demo], tmp_path_factory.mktemp("alone"), **SETTINGS)


def start(tmp_path, ranks, root, out, body=""):
    """`torchrun` of an ingest; every rank writes what it got to rank_N.pickle."""
    path = tmp_path / "program.py"
    path.write_text(
        textwrap.dedent(f"""
        import os, pickle, signal, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from training import distributed
        from training.data import shard
        from training.data.ingest import ingest
        from training.messages import command
        from uscl_hub.clips import memory
        shard.FLUSH_SECONDS = 0.0

        def main():
            whole = memory.budget()
            distributed.setup("cpu")
            assert memory.budget() == whole // {ranks}, "the ranks of a machine share its memory"
            {body or "pass"}
            cache = ingest([{str(root)!r}], {[str(o) for o in out]!r}, size=32, workers=0, progress=False)
            with open({str(tmp_path / "rank_")!r} + f"{{distributed.rank()}}.pickle", "wb") as file:
                pickle.dump(cache, file)
            distributed.barrier()
            distributed.finished.set()

        if __name__ == "__main__":
            command(main)
    """)
    )
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    command = [sys.executable, *launch, "--rdzv-endpoint=127.0.0.1:0", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, code=0):
    said = process.communicate(timeout=300)[0]
    assert (process.returncode == 0) == (code == 0), said
    return said


def same(cache, other):
    assert cache.ids == other.ids and cache.sources == other.sources and cache.sha256 == other.sha256
    assert cache.lengths.tolist() == other.lengths.tolist() and cache.crc32.tolist() == other.crc32.tolist()
    np.testing.assert_array_equal(cache.fps, other.fps)
    clips, numbers = np.arange(len(cache)), np.zeros((len(cache), 2), int) + [0, 5]
    assert np.array_equal(cache.take(clips, numbers), other.take(clips, numbers))
    for i in clips:
        assert np.array_equal(cache.clip(i), other.clip(i))


def lines_of(folders):
    """The ids in the logs of all shards, with repetitions."""
    logs = [log for folder in folders for log in Path(folder).rglob("index.jsonl")]
    return sorted(json.loads(line)["id"] for log in logs for line in log.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("ranks, disks", [(2, 1), (2, 2), (4, 2)])
def test_by_ranks_as_by_one(demo, alone, tmp_path, ranks, disks):
    out = [tmp_path / f"disk{n}" for n in range(disks)]
    finish(start(tmp_path, ranks, demo, out))
    for rank in range(ranks):
        same(pickle.loads((tmp_path / f"rank_{rank}.pickle").read_bytes()), alone)
    same(FrameCache.open(out), alone)
    assert lines_of(out) == alone.ids  # nothing twice
    shards = [path.parent for folder in out for path in folder.rglob("frames.u8")]
    assert len(shards) == ranks and all((shard / "frames.u8").stat().st_size for shard in shards)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("frames.u8")}
    same(ingest([demo], out, **SETTINGS), alone)  # one process goes on with what many made
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("frames.u8")} == before


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_done_again_and_nothing_twice(demo, alone, tmp_path, victim):
    """SIGKILL of a rank that has done two clips of its share: the others end, and the next start does what is left."""
    body = f"""
            real, count = shard.Writer.flush, []
            def flush(self):
                real(self)
                count.append(1)
                if distributed.rank() == {victim} and len(count) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
            shard.Writer.flush = flush"""
    begun = time.monotonic()
    finish(start(tmp_path, 2, demo, [tmp_path / "out"], body.strip()), code=1)
    assert time.monotonic() - begun < 240
    kept = lines_of([tmp_path / "out"])
    assert 2 <= len(kept) < 14
    finish(start(tmp_path, 2, demo, [tmp_path / "out"]))
    same(FrameCache.open(tmp_path / "out"), alone)
    assert lines_of([tmp_path / "out"]) == alone.ids


# -------------------------------------------------------------------------------- several shards, one process


@pytest.fixture
def sharded(demo, alone, tmp_path, monkeypatch):
    """A cache as two ranks leave it: half of the clips in shard_001."""
    out, odd = tmp_path / "out", tmp_path / "odd" / "demo"
    files = sorted(path for path in demo.rglob("*.mp4"))
    for path in files[::2]:
        copy = odd / path.relative_to(demo)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)  # with its time: it counts as the same file
    with monkeypatch.context() as patch:
        patch.setattr(Work, "shard", property(lambda work: work.folders[0] / "shard_001"))
        patch.setattr("training.data.shard.nullcontext", lambda _: making(out / alone.path.name / "shard_001"))
        ingest([odd], out, **SETTINGS)
    cache = ingest([demo], out, **SETTINGS)
    assert [shard.name for shard in cache.shards] == [alone.path.name, "shard_001"]
    return out, cache


class making:
    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        return True

    def __exit__(self, *_):
        pass


def test_shards_are_one_cache(sharded, alone):
    out, cache = sharded
    assert lines_of([out]) == alone.ids
    for other in (cache, FrameCache.open(out), pickle.loads(pickle.dumps(cache))):
        same(other, alone)
    assert len(pickle.dumps(cache)) < 2000


def test_a_damaged_clip_of_a_further_shard_is_decoded_again(demo, sharded, alone):
    out, cache = sharded
    i = int(np.flatnonzero(cache.offsets >> index.SHARD == 1)[0])
    at = (int(cache.offsets[i]) & (1 << index.SHARD) - 1) * 32**2
    with open(cache.shards[1] / "frames.u8", "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CacheError, match=f"shard_001/frames.u8: the frames of {cache.ids[i]} do not match"):
        FrameCache.open(out).clip(i)
    assert (cache.shards[1] / "damaged.txt").exists()
    again = ingest([demo], out, **SETTINGS)
    same(again, alone)
    assert again.offsets[i] >> index.SHARD == 0 and not (cache.shards[1] / "damaged.txt").exists()
    same(FrameCache.open(out), alone)  # the newer line counts, whatever the order of the shards


def test_a_changed_clip_counts_once(demo, sharded, tmp_path):
    out, cache = sharded
    data = shutil.copytree(demo, tmp_path / "data" / "demo")
    i = int(np.flatnonzero(cache.offsets >> index.SHARD == 1)[0])
    changed = data / cache.ids[i].removeprefix("demo/")
    write_video(changed, simulate_clip("lung", 9, 48, seed=77))
    again = ingest([data], out, **SETTINGS)
    assert again.ids == cache.ids and again.lengths[i] == 9 and FrameCache.open(out).lengths[i] == 9


# ---------------------------------------------------------------------------------------------- the columns


@pytest.mark.parametrize("what", ["missing", "damaged", "older", "foreign", "no table"])
def test_columns_that_do_not_fit_are_made_again(demo, alone, tmp_path, what):
    cache = FrameCache.open(shutil.copytree(alone.path, tmp_path / alone.path.name))
    arrow = cache.path / "index.arrow"
    if what == "missing":
        arrow.unlink()
    elif what == "damaged":
        content = bytearray(arrow.read_bytes())
        content[len(content) // 2] ^= 1
        arrow.write_bytes(content)
    elif what == "no table":
        arrow.write_bytes(b"ARROW1\0\0" + bytes(50))
    else:
        about = json.loads((cache.path / "index.json").read_text())
        about["logs"][0][2 if what == "older" else 3] -= 1
        (cache.path / "index.json").write_text(json.dumps(about))
    same(FrameCache.open(cache.path), alone)
    same(ingest([demo], tmp_path, **SETTINGS), alone)


def test_a_cache_that_others_write_to_stays_what_it_was(demo, alone, tmp_path):
    """Another training may add clips after this one has begun: the log is read as far as it went then."""
    cache = FrameCache.open(shutil.copytree(alone.path, tmp_path / alone.path.name))
    begun = pickle.dumps(cache)
    extra = tmp_path / "extra"
    write_video(extra / "a.mp4", simulate_clip("lung", 4, 48, seed=5))
    assert ingest([extra], tmp_path, **SETTINGS).ids == ["extra/a.mp4"]
    same(pickle.loads(begun), alone)
    log = cache.path / "index.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"frames": 6', b'"frames": 5', 1))
    with pytest.raises(CacheError, match="index.jsonl: has changed since the training began"):
        pickle.loads(begun)


def test_an_empty_cache(tmp_path):
    (tmp_path / "nothing").mkdir()
    cache = ingest([tmp_path / "nothing"], tmp_path / "out", min_clips=0, **SETTINGS)
    assert len(cache) == 0 and cache.ids == cache.sources == cache.sha256 == [] and cache.source_names == []
    for other in (FrameCache.open(tmp_path / "out"), pickle.loads(pickle.dumps(cache))):
        assert len(other) == 0 and other.frames.shape == (0, 32, 32)


def test_folders_of_different_settings_are_no_cache(demo, tmp_path):
    ingest([demo], tmp_path / "a", **SETTINGS)
    ingest([demo], tmp_path / "b", crop="none", **SETTINGS)
    with pytest.raises(CacheError, match="different settings"):
        FrameCache.open([tmp_path / "a", tmp_path / "b"])
