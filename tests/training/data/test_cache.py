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

from training.data.cache import CacheError, FrameCache, ingest
from training.data.simulate import simulate_clip, write_demo, write_video
from uscl_hub.clips.crop import apply_region, detect_region
from uscl_hub.clips.media import decode, find_clips
from uscl_hub.preprocess import resize

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("data") / "demo", clips=10, frames=6, size=48, seed=0)


def report(cache):
    return json.loads((cache.path / "report.json").read_text())


def test_frames_are_the_shared_preprocessing_of_the_cropped_clip(demo, tmp_path):
    cache = ingest([demo], tmp_path, size=32, workers=2, progress=False)
    clips = find_clips([demo])
    assert cache.ids == [clip.id for clip in clips] and len(cache) == 10
    for i, clip in enumerate(clips):
        frames, fps = decode(clip)
        cropped = apply_region(frames, detect_region(frames))
        assert np.array_equal(cache.clip(i), np.stack([resize(np.ascontiguousarray(f), 32) for f in cropped]))
        record = cache.clips[i]
        assert (record.id, record.source, record.frames, record.fps) == (clip.id, "demo", 6, fps)
    assert cache.frames.shape == (60, 32, 32) and not cache.clip(0).flags.owndata
    assert report(cache)["unreadable"] == []


def test_same_bytes_whatever_the_workers(demo, tmp_path):
    caches = [ingest([demo], tmp_path / str(n), size=32, workers=n, progress=False) for n in (0, 1, 2)]
    assert len({(c.path / "frames.u8").read_bytes() for c in caches}) == 1


def test_reopened_pickled_and_not_decoded_again(demo, tmp_path):
    cache = ingest([demo], tmp_path, size=32, workers=0, progress=False)
    before = (cache.path / "frames.u8").stat().st_mtime_ns, (cache.path / "index.jsonl").read_bytes()
    again = ingest([demo], tmp_path, size=32, workers=0, progress=False)
    assert ((again.path / "frames.u8").stat().st_mtime_ns, (again.path / "index.jsonl").read_bytes()) == before
    for other in (again, FrameCache.open(tmp_path), FrameCache.open(cache.path), pickle.loads(pickle.dumps(cache))):
        assert other.ids == cache.ids and np.array_equal(other.clip(3), cache.clip(3))
    assert len(pickle.dumps(cache)) < 10_000  # no frames inside
    ingest([demo], tmp_path, size=32, crop="none", workers=0, progress=False)
    with pytest.raises(CacheError, match="2 caches with different settings"):
        FrameCache.open(tmp_path)


def test_changed_new_and_removed_files(demo, tmp_path):
    data = shutil.copytree(demo, tmp_path / "demo")
    cache = ingest([data], tmp_path / "out", size=32, workers=0, progress=False)
    old = cache.clip(0).copy()
    first, second = (clip.files[0] for clip in find_clips([data])[:2])
    write_video(first, simulate_clip("lung", 9, 48, seed=77))
    write_video(data / "new.mp4", simulate_clip("lung", 4, 48, seed=78))
    second.unlink()
    cache = ingest([data], tmp_path / "out", size=32, workers=0, progress=False)
    assert len(cache) == 10 and cache.lengths[0] == 9 and not np.array_equal(cache.clip(0)[:6], old)
    assert "demo/new.mp4" in cache.ids and not any(second.name in i and "cyst" in i for i in cache.ids)


def test_identical_content_counts_once(demo, tmp_path):
    data = shutil.copytree(demo, tmp_path / "demo")
    original = find_clips([data])[0].files[0]
    shutil.copy(original, data / "zz_copy.mp4")
    for _ in range(2):
        cache = ingest([data], tmp_path / "out", size=32, workers=2, progress=False)
        assert len(cache) == 10 and "demo/zz_copy.mp4" not in cache.ids
        assert report(cache)["duplicates"] == [{"id": "demo/zz_copy.mp4", "same_as": cache.ids[0]}]
    original.unlink()  # then the copy is the clip, without decoding it again
    size = (cache.path / "frames.u8").stat().st_size
    cache = ingest([data], tmp_path / "out", size=32, workers=0, progress=False)
    assert "demo/zz_copy.mp4" in cache.ids and (cache.path / "frames.u8").stat().st_size == size


def test_unreadable_files_are_reported_and_too_few_fail(demo, tmp_path):
    data = shutil.copytree(demo, tmp_path / "demo")
    (data / "empty.mp4").write_bytes(b"")
    (data / "text.avi").write_text("not a video")
    cache = ingest([data], tmp_path / "out", size=32, workers=2, progress=False)
    assert len(cache) == 10
    assert {entry["id"] for entry in report(cache)["unreadable"]} == {"demo/empty.mp4", "demo/text.avi"}
    assert all(entry["reason"] for entry in report(cache)["unreadable"])
    with pytest.raises(CacheError, match="10 readable clips .* at least 11 needed"):
        ingest([data], tmp_path / "out", size=32, workers=0, progress=False, min_clips=11)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CacheError, match="0 readable clips"):
        ingest([tmp_path / "nothing"], tmp_path / "out", size=32, progress=False)


def test_whatever_a_killed_writer_leaves_is_cut_off(demo, tmp_path):
    whole = ingest([demo], tmp_path / "whole", size=32, workers=0, progress=False)
    index, data = ((whole.path / name).read_bytes() for name in ("index.jsonl", "frames.u8"))
    rows = index.splitlines(keepends=True)
    rng = np.random.default_rng(0)
    for trial in range(12):
        out = tmp_path / str(trial) / whole.path.name
        out.mkdir(parents=True)
        done = int(rng.integers(0, 10))
        torn = rows[done][: int(rng.integers(0, len(rows[done])))]
        used = sum(json.loads(row)["frames"] for row in rows[:done]) * 32 * 32
        (out / "settings.json").write_bytes((whole.path / "settings.json").read_bytes())
        (out / "index.jsonl").write_bytes(b"".join(rows[:done]) + torn)
        (out / "frames.u8").write_bytes(data[:used] + bytes(int(rng.integers(0, 9000))))
        assert len(FrameCache.open(out)) == done  # a reader leaves the tail aside
        again = ingest([demo], tmp_path / str(trial), size=32, workers=0, progress=False)
        assert (again.path / "frames.u8").read_bytes() == data and again.ids == whole.ids


def test_damage_is_refused(demo, tmp_path):
    cache = ingest([demo], tmp_path, size=32, workers=0, progress=False)
    os.truncate(cache.path / "frames.u8", 1000)
    with pytest.raises(CacheError, match="delete"):
        FrameCache.open(tmp_path)
    (cache.path / "index.jsonl").write_bytes(b'{"id": 1}\n')
    with pytest.raises(CacheError, match="line 1 is damaged"):
        ingest([demo], tmp_path, size=32, workers=0, progress=False)
    with pytest.raises(CacheError, match="holds no frame cache"):
        FrameCache.open(demo)


def script(tmp_path, demo, out, body=""):
    path = tmp_path / "run_ingest.py"
    path.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(REPO)!r})
        from training.data import cache
        {body}
        if __name__ == '__main__':
            print(len(cache.ingest([{str(demo)!r}], {str(out)!r}, size=32, workers=2, progress=False)))
    """)
    )
    return [sys.executable, str(path)]


def test_killed_at_any_time_and_resumed_from_a_script(demo, tmp_path):
    whole = ingest([demo], tmp_path / "whole", size=32, workers=0, progress=False)
    slow = (
        "cache._FLUSH_SECONDS = 0.0; line = cache._Writer.line; import time\n"
        "        cache._Writer.line = lambda self, x: (time.sleep(0.15), line(self, x))"
    )
    command = script(tmp_path, demo, tmp_path / "out", slow)
    process = subprocess.Popen(command, start_new_session=True)
    index = tmp_path / "out" / whole.path.name / "index.jsonl"
    deadline = time.monotonic() + 60
    while not (index.exists() and index.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(CacheError, match="another process is writing"):
        ingest([demo], tmp_path / "out", size=32, workers=0, progress=False)
    process.kill()
    process.wait()
    assert 0 < len(FrameCache.open(tmp_path / "out")) < 10
    again = ingest([demo], tmp_path / "out", size=32, workers=0, progress=False)
    assert (again.path / "frames.u8").read_bytes() == (whole.path / "frames.u8").read_bytes()
    deadline = time.monotonic() + 10  # its workers end with it
    while _members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _members(process.pid)


def _members(group):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def test_a_crashing_decoder_costs_one_clip(demo, tmp_path, monkeypatch):
    import training.data.cache as module

    real = module._pool

    class Crashing:  # submits a suicide in place of one clip
        def __init__(self, pool):
            self.pool = pool

        def submit(self, function, clip, *args):
            if clip.id.endswith("lung/subj00_clip01.mp4"):
                return self.pool.submit(os._exit, 1)
            return self.pool.submit(function, clip, *args)

        def shutdown(self, **kwargs):
            self.pool.shutdown(**kwargs)

    monkeypatch.setattr(module, "_pool", lambda count: Crashing(real(count)))
    cache = ingest([demo], tmp_path, size=32, workers=2, progress=False)
    assert len(cache) == 9
    assert report(cache)["unreadable"] == [
        {"id": "demo/lung/subj00_clip01.mp4", "reason": "the decoder crashed, or took more than 600 s"}
    ]


def test_disk_full_keeps_what_is_complete(demo, tmp_path, monkeypatch):
    import training.data.cache as module

    real = module._Writer.frames

    def full(self, frames):
        if self.end >= 24:
            self.data.write(b"half")
            with self._disk("frames.u8"):
                raise OSError(28, "No space left on device")
        return real(self, frames)

    monkeypatch.setattr(module._Writer, "frames", full)
    with pytest.raises(OSError, match="No space left on device.*free some space"):
        ingest([demo], tmp_path, size=32, workers=0, progress=False)
    monkeypatch.undo()
    assert len(FrameCache.open(tmp_path)) == 4
    assert len(ingest([demo], tmp_path, size=32, workers=0, progress=False)) == 10


def test_long_clips_are_not_held_in_memory(demo, tmp_path, monkeypatch):
    import uscl_hub.clips.read as module

    write_video(tmp_path / "data" / "long.mp4", simulate_clip("lung", 80, 48, seed=1))
    plain = ingest([tmp_path / "data"], tmp_path / "a", size=32, workers=0, progress=False)
    monkeypatch.setattr(module, "KEEP_BYTES", 50 * 48 * 48)
    twice = ingest([tmp_path / "data"], tmp_path / "b", size=32, workers=0, progress=False)
    assert np.array_equal(plain.clip(0), twice.clip(0)) and len(plain.clip(0)) == 80


def test_stride_max_frames_sheets_and_bad_arguments(demo, tmp_path):
    cache = ingest([demo], tmp_path, size=32, workers=0, progress=False, stride=2, max_frames=2, sheets=True)
    assert cache.lengths.tolist() == [2] * 10
    assert (cache.path / "sheets" / "000.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="cut"):
        ingest([demo], tmp_path, size=32, crop="cut")
    with pytest.raises(ValueError, match="at least 1"):
        ingest([demo], tmp_path, size=0)


def test_a_hundred_thousand_clips_stay_small(tmp_path):
    records = [
        {"id": f"r/p{i:06d}.mp4", "source": "r", "sha256": f"{i:064x}", "frames": 40, "offset": 40 * i, "fps": None}
        for i in range(100_000)
    ]
    start = time.perf_counter()
    cache = FrameCache(tmp_path, 64, records)
    blob = pickle.dumps(cache)
    assert len(cache) == 100_000 and cache.offsets[-1] == 40 * 99_999
    assert time.perf_counter() - start < 3 and len(blob) < 20e6
