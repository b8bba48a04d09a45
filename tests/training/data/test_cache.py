import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import index, workers
from training.data.cache import CacheError, FrameCache, note_damage, read_damage
from training.data.ingest import ingest, prepare
from training.data.simulate import simulate_clip, write_demo, write_video
from uscl_hub.clips import content_hash, find_clips
from uscl_hub.clips.crop import apply_region, detect_region
from uscl_hub.clips.decode import decode
from uscl_hub.errors import UserError
from uscl_hub.files import locked
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
        assert (cache.ids[i], cache.sources[i], cache.lengths[i]) == (clip.id, "demo", 6)
    lines = [json.loads(line) for line in (cache.path / "index.jsonl").read_text().splitlines()]
    assert {line["fps"] for line in lines} == {fps}
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


def test_a_cache_that_cannot_be_written_to_knows_what_could_not_be_read(demo, tmp_path, monkeypatch):
    data = shutil.copytree(demo, tmp_path / "demo")
    bad = data / "bad.mp4"
    bad.write_bytes(b"x" * 1000)
    settings = dict(size=32, workers=0, progress=False)
    cache = ingest([data], tmp_path / "out", **settings)
    monkeypatch.setattr("training.data.shard.os.access", lambda path, mode: False)
    assert ingest([data], tmp_path / "out", **settings).ids == cache.ids
    bad.write_bytes(b"y" * 1001)
    with pytest.raises(CacheError, match="is read-only and lacks 1 of 11 clips, such as demo/bad.mp4"):
        ingest([data], tmp_path / "out", **settings)
    monkeypatch.undo()
    shutil.copy(next(data.rglob("*clip01.mp4")), bad)  # mended: a copy of another one
    ingest([data], tmp_path / "out", **settings)
    assert json.loads((cache.path / "unreadable.json").read_text()) == {}
    assert report(cache)["unreadable"] == [] and len(report(cache)["duplicates"]) == 1
    (cache.path / "unreadable.json").write_text("[]")
    with pytest.raises(CacheError, match="unreadable.json is damaged: delete it"):
        ingest([data], tmp_path / "out", **settings)


def test_frames_in_another_order_or_replaced_are_decoded_again(tmp_path):
    """Also where number, bytes and the latest change of the files stay as they are."""
    frames = simulate_clip("lung", 6, 48, seed=1)
    (tmp_path / "f").mkdir()
    files = [tmp_path / "f" / f"f_{i}.bmp" for i in range(6)]
    for i, (path, frame) in enumerate(zip(files, frames)):
        Image.fromarray(frame).save(path)
        os.utime(path, (1000 + i, 1000 + i))
    settings = dict(size=48, crop="none", workers=0, progress=False, frames="clip")
    assert np.array_equal(ingest([tmp_path / "f"], tmp_path / "out", **settings).clip(0), frames)
    for path in files:
        path.rename(path.with_suffix(".moved"))
    for i, path in enumerate(files):
        path.with_suffix(".moved").rename(files[5 - i])
    assert np.array_equal(ingest([tmp_path / "f"], tmp_path / "out", **settings).clip(0), frames[::-1])
    Image.fromarray(frames[0]).save(files[1])
    os.utime(files[1], (900, 900))
    want = np.stack([frames[5], frames[0], *frames[3::-1]])
    assert np.array_equal(ingest([tmp_path / "f"], tmp_path / "out", **settings).clip(0), want)


def test_what_a_report_says_of_lengths(demo, tmp_path, capsys):
    Image.fromarray(simulate_clip("lung", 1, 48, seed=1)[0]).save(tmp_path / "one.png")
    said = report(ingest([demo, tmp_path / "one.png"], tmp_path / "out", size=32, workers=0, max_frames=6))
    assert len(said["of_one_frame"]) == 1 and len(said["of_max_frames"]) == 10
    printed = capsys.readouterr().err
    assert "1 have one frame: only the augmentation" in printed and "10 have as many frames as are kept" in printed


def test_a_damage_list_that_was_cut_off(tmp_path):
    note_damage(tmp_path, "a")
    with open(tmp_path / "damaged.txt", "a") as file:
        file.write('"b')
    note_damage(tmp_path, "c")
    assert read_damage(tmp_path) == {"a", "c"}


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
        from training.data import shard as module
        from training.data.ingest import ingest, prepare
        {body}
        if __name__ == '__main__':
            print(len(ingest([{str(demo)!r}], {str(out)!r}, size=32, workers=2, progress=False)))
    """)
    )
    return [sys.executable, str(path)]


def test_an_ingest_waits_for_another_one_into_the_same_cache(demo, tmp_path):
    first, held, free = (
        ingest([demo], tmp_path, size=32, workers=0, progress=False),
        threading.Event(),
        threading.Event(),
    )

    def hold():
        with locked(first.path):
            held.set()
            time.sleep(0.5)
            free.set()

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    again = ingest([demo], tmp_path, size=32, workers=0, progress=False)
    assert free.is_set() and again.ids == first.ids
    thread.join()


@pytest.mark.slow
def test_killed_at_any_time_and_resumed_from_a_script(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.shard.PATIENCE", 0.0)
    whole = ingest([demo], tmp_path / "whole", size=32, workers=0, progress=False)
    slow = (
        "module.FLUSH_SECONDS = 0.0; line = module.Writer.line; import time\n"
        "        module.Writer.line = lambda self, x: (time.sleep(0.15), line(self, x))"
    )
    command = script(tmp_path, demo, tmp_path / "out", slow)
    process = subprocess.Popen(command, start_new_session=True)
    index = tmp_path / "out" / whole.path.name / "index.jsonl"
    deadline = time.monotonic() + 600
    while not (index.exists() and index.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(CacheError, match="another process is writing"):
        ingest([demo], tmp_path / "out", size=32, workers=0, progress=False)
    process.kill()
    process.wait()
    assert 0 < len(FrameCache.open(tmp_path / "out")) < 10
    again = ingest([demo], tmp_path / "out", size=32, workers=0, progress=False)
    assert (again.path / "frames.u8").read_bytes() == (whole.path / "frames.u8").read_bytes()
    deadline = time.monotonic() + 120  # its workers end with it
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


class Crashing(workers.Pool):
    """A pool in which some items end their process. wanted: says of a clip's id whether it does."""

    wanted = staticmethod(lambda name: name.endswith("lung/subj00_clip01.mp4"))

    def submit(self, clip):
        return self._executor.submit(os._exit, 1) if self.wanted(clip.id) else super().submit(clip)


def test_a_crashing_decoder_costs_one_clip(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "Pool", Crashing)
    cache = ingest([demo], tmp_path, size=32, workers=2, progress=False)
    assert len(cache) == 9
    assert report(cache)["unreadable"] == [
        {"id": "demo/lung/subj00_clip01.mp4", "reason": "the decoder crashed, or took more than 600 s"}
    ]


def test_when_all_crash_it_is_not_the_clips_fault(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "Pool", Crashing)
    monkeypatch.setattr(Crashing, "wanted", staticmethod(lambda name: True))
    with pytest.raises(UserError, match="the first 8 clips all ended the process .* not theirs. .*memory"):
        ingest([demo], tmp_path, size=32, workers=2, progress=False)


CALL = "from training.data.ingest import ingest; print(len(ingest([{!r}], {!r}, size=32, workers=2, progress=False)))"


@pytest.mark.slow
@pytest.mark.parametrize("how, temporary", [("standard input", ""), ("no guard", ""), ("no guard", "x" * 90)])
def test_a_script_whose_workers_cannot_start_is_told_once(demo, tmp_path, how, temporary):
    code = CALL.format(str(demo), str(tmp_path / "out"))
    (tmp_path / "script.py").write_text(code)
    (tmp_path / temporary).mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(REPO), "TMPDIR": str(tmp_path / temporary)}
    command, given = ([sys.executable, "-"], code) if how == "standard input" else ([sys.executable, "script.py"], "")
    done = subprocess.run(command, input=given, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "the processes that decode cannot start" in last and "__main__" in last and "standard input" in last
    assert done.stderr.count("Error: ") <= 3 and "crashed" not in done.stderr


@pytest.mark.slow
def test_a_long_temporary_folder_is_no_obstacle(demo, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    command = script(tmp_path, demo, tmp_path / "out")
    env = {**os.environ, "TMPDIR": str(long)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "10", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_ingest_at_once_and_keeps_what_is_done(demo, tmp_path, number):
    """While a decoder hangs: the workers do not keep the program from ending."""
    hang = (
        "import os, time, functools; prepare = module.prepare\n"
        "        def hang(clip, **k): return time.sleep(99) if 'lung' in clip.id else prepare(clip, **k)\n"
        "        module.prepare = hang"
    )
    path = tmp_path / "interrupted.py"
    path.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(REPO)!r})
        from training.data import ingest as module
        from training.data import shard
        from training.messages import command
        {hang}
        shard.FLUSH_SECONDS = 0.0
        if __name__ == '__main__':
            settings = dict(size=32, workers=2, progress=False)
            command(lambda: module.ingest([{str(demo)!r}], {str(tmp_path / "out")!r}, **settings))
    """)
    )
    process = subprocess.Popen([sys.executable, str(path)], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 600
        while not (list(tmp_path.glob("out/*/index.jsonl")) and FrameCache.open(tmp_path / "out").ids):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(process.pid, number)  # as a terminal does: to the workers, too
        start = time.monotonic()
        said = process.communicate(timeout=90)[1]
        assert time.monotonic() - start < 60 and process.returncode == 128 + number
        said = said.splitlines()  # at a SIGHUP also of Python's own resource tracker
        assert "interrupted; start it again to go on" in said and (number == signal.SIGHUP or len(said) == 1)
        deadline = time.monotonic() + 120
        while _members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not _members(process.pid)
    finally:
        process.kill()
    assert 0 < len(FrameCache.open(tmp_path / "out")) < 10
    assert len(ingest([demo], tmp_path / "out", size=32, workers=0, progress=False)) == 10


@pytest.mark.parametrize("flush", [0, 3600])  # seconds: a line at once, or all at the end
def test_disk_full_keeps_what_is_complete(demo, tmp_path, monkeypatch, flush):
    import training.data.shard as module

    real = module.Writer.frames
    monkeypatch.setattr(module, "FLUSH_SECONDS", flush)

    def full(self, frames):
        if self.end >= 24:
            self.data.write(b"half")
            with self.disk("frames.u8"):
                raise OSError(28, "No space left on device")
        return real(self, frames)

    monkeypatch.setattr(module.Writer, "frames", full)
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
    for same in (cache, FrameCache.open(tmp_path), pickle.loads(pickle.dumps(cache))):
        assert set(same.fps) == {15 / 2}  # of the frames that are kept, of 15 a second
    assert cache.lengths.tolist() == [2] * 10
    assert (cache.path / "sheets" / "000.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="cut"):
        ingest([demo], tmp_path, size=32, crop="cut")
    with pytest.raises(ValueError, match="at least 1"):
        ingest([demo], tmp_path, size=0)


def test_sheets_are_numbered_on_and_kept_when_interrupted(demo, tmp_path, capsys, monkeypatch):
    data = shutil.copytree(demo, tmp_path / "demo")
    settings = dict(size=32, workers=0, sheets=True)
    videos = sorted(data.rglob("*.mp4"))
    for path in videos[6:]:
        path.rename(path.with_suffix(".later"))
    cache = ingest([data], tmp_path, **settings)
    for path in videos[6:]:
        path.with_suffix(".later").rename(path)

    def interrupted(clip, **settings):
        if clip.files[0] == videos[8]:
            raise KeyboardInterrupt
        return prepare(clip, **settings)

    with monkeypatch.context() as patch:
        patch.setattr("training.data.ingest.prepare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ingest([data], tmp_path, **settings)
    assert "no sheets" not in capsys.readouterr().err
    ingest([data], tmp_path, **settings)
    ingest([data], tmp_path, **settings)
    assert "no sheets: all clips are in" in capsys.readouterr().err
    sizes = [Image.open(path).size for path in sorted((cache.path / "sheets").iterdir())]
    assert sizes == [(4 * 326, 2 * 175), (2 * 326, 175), (2 * 326, 175)]  # of 6, 2 and 2 clips


def test_a_hundred_thousand_clips_stay_small(tmp_path):
    records = [
        {"id": f"r/p{i:06d}.mp4", "source": "r", "sha256": f"{i:064x}", "frames": 40, "offset": 40 * i, "fps": None}
        for i in range(100_000)
    ]
    start = time.perf_counter()
    cache = FrameCache([tmp_path], 64, index.columns(records))
    blob = pickle.dumps(cache)
    assert len(cache) == 100_000 and cache.offsets[-1] == 40 * 99_999
    assert time.perf_counter() - start < 30 and len(blob) < 20e6


# ------------------------------------------------------------------------------------- checksums and changes


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 16]))


def damage(cache, i):
    flip(cache.path / "frames.u8", int(cache.offsets[i]) * cache.size**2 + 100)


@pytest.mark.parametrize("use", ["clip", "take", "pickled", "ingest"])
def test_a_flipped_bit_is_named_and_the_clip_decoded_again(demo, tmp_path, use):
    settings = dict(size=32, workers=0, progress=False)
    good = ingest([demo], tmp_path, **settings)
    frames = good.frames.copy()
    damage(good, 3)
    cache = pickle.loads(pickle.dumps(FrameCache.open(tmp_path)))
    with pytest.raises(CacheError, match=f"frames.u8: the frames of {good.ids[3]} do not match their checksum"):
        if use == "ingest":
            ingest([demo], tmp_path, **settings)
        elif use == "take":
            cache.take(np.array([2, 3]), np.array([[0, 1], [2, 3]]))
        else:
            cache.clip(3)
    assert cache.clip(2).shape == (6, 32, 32)  # the others can be used
    again = ingest([demo], tmp_path, **settings)
    assert again.ids == good.ids and not (again.path / "damaged.txt").exists()
    for i in range(10):
        assert np.array_equal(again.clip(i), frames[good.offsets[i] : good.offsets[i] + 6])
    assert FrameCache.open(tmp_path).offsets.tolist() == again.offsets.tolist()


def test_a_clip_is_compared_once(demo, tmp_path):
    cache = ingest([demo], tmp_path, size=32, workers=0, progress=False)
    cache.clip(3)
    damage(cache, 3)
    assert cache.clip(3).shape == (6, 32, 32)  # in this run it was right
    with pytest.raises(CacheError, match="checksum"):
        FrameCache.open(tmp_path).clip(3)


def test_copies_of_a_damaged_clip_are_decoded_again_too(demo, tmp_path):
    data = shutil.copytree(demo, tmp_path / "demo")
    first = find_clips([data])[0].files[0]
    shutil.copy(first, data / "a_copy.mp4")
    settings = dict(size=32, workers=0, progress=False)
    cache = ingest([data], tmp_path / "out", **settings)
    assert cache.ids[0] == "demo/a_copy.mp4"
    good = cache.clip(0).copy()
    damage(cache, 0)
    with pytest.raises(CacheError, match="a_copy.mp4"):
        ingest([data], tmp_path / "out", **settings)
    assert np.array_equal(ingest([data], tmp_path / "out", **settings).clip(0), good)


def test_caches_without_checksums_are_still_read(demo, tmp_path):
    cache = ingest([demo], tmp_path, size=32, workers=0, progress=False)
    rows = [json.loads(line) for line in (cache.path / "index.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.pop("crc32") >= 0
    (cache.path / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    old = ingest([demo], tmp_path, size=32, workers=0, progress=False)
    assert old.ids == cache.ids and (old.crc32 == -1).all() and np.array_equal(old.clip(2), cache.clip(2))


@pytest.mark.parametrize(
    "change",
    [
        {"offset": -1},
        {"offset": "a"},
        {"frames": 0},
        {"frames": 2.5},
        {"frames": True},
        {"id": None},
        {"sha256": 5},
        {"crc32": "x"},
        [],
    ],
)
def test_an_index_that_makes_no_sense_is_refused(demo, tmp_path, change):
    cache = ingest([demo], tmp_path, size=32, workers=0, progress=False)
    path = cache.path / "index.jsonl"
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(first), **change} if change else change) + "\n" + rest)
    for use in (lambda: FrameCache.open(tmp_path), lambda: ingest([demo], tmp_path, size=32, progress=False)):
        with pytest.raises(CacheError, match="index.jsonl, line 1 is damaged: delete"):
            use()


@pytest.mark.parametrize("times", [1, 99])
def test_a_file_that_changes_between_hash_and_decode(tmp_path, monkeypatch, times):
    """Changed once it is read again; changed each time it is named. Frames never go with another content's hash."""
    import training.data.ingest as module

    path, changes, read = tmp_path / "data" / "a.mp4", [], module.read_clip
    write_video(path, simulate_clip("lung", 3, 48, seed=1))
    write_video(tmp_path / "data" / "b.mp4", simulate_clip("cyst", 3, 48, seed=1))

    def racing(clip, *args, **kwargs):
        if clip.id.endswith("a.mp4") and len(changes) < times:
            changes.append(clip)
            write_video(path, simulate_clip("lung", 3, 48, seed=1 + len(changes)))
        return read(clip, *args, **kwargs)

    monkeypatch.setattr(module, "read_clip", racing)
    cache = ingest([tmp_path / "data"], tmp_path / "out", size=32, workers=0, progress=False)
    if times == 1:
        assert cache.sha256[0] == content_hash(find_clips([path])[0])
        whole = ingest([path], tmp_path / "whole", size=32, workers=0, progress=False)
        assert np.array_equal(cache.clip(0), whole.clip(0))
    else:
        assert cache.ids == ["data/b.mp4"]
        assert report(cache)["unreadable"] == [{"id": "data/a.mp4", "reason": "the file changes while it is read"}]


def test_results_below_the_roots_are_no_clips(demo, tmp_path):
    data = shutil.copytree(demo, tmp_path / "demo")
    settings = dict(size=32, workers=0, progress=False, sheets=True)
    first = ingest([data], data / "run" / "cache", **settings)
    run = data / "run"
    (run / "figures").mkdir()
    for name in ("config.yaml", "log.jsonl"):
        (run / name).write_text("")
    shutil.copy(first.path / "sheets" / "000.png", run / "figures" / "loss.png")
    (data / "other").mkdir()
    shutil.copy(first.path / "sheets" / "000.png", data / "other" / "mine.png")
    again = ingest([data], data / "run" / "cache", **settings)
    assert set(again.ids) - set(first.ids) == {"demo/other/mine.png"}
    assert report(again)["own_results_left_out"] == 2
    (run / "linked").symlink_to(demo)
    assert len(ingest([run / "linked"], tmp_path / "linked", size=32, workers=0, progress=False)) == 10
    named = ingest([run / "figures" / "loss.png"], tmp_path / "named", size=32, workers=0, progress=False)
    assert named.ids == ["figures/loss.png"]  # what is asked for by name is meant
