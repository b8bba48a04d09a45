"""What a backbone has seen is recognised: by content, as one of a series, through parents, and when it was altered."""

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
from helpers import DATA
from PIL import Image

from training import config as configs
from training.data.cache import FrameCache
from training.data.ingest import ingest
from training.data.perceptual import bits, frame_hashes
from training.data.provenance import Provenance, chain, contents
from training.data.simulate import simulate_clip
from training.engine.export import export
from training.evaluation import leaks
from training.evaluation.backbones import load_backbone
from training.evaluation.datasets import EvaluationError, Item, Task, load_task
from uscl_hub.clips.read import read_clip
from uscl_hub.preprocess import resize


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A run on a series of 4 numbered frames and on 5 single images: its folder, and its backbone's provenance."""
    root = tmp_path_factory.mktemp("seen")
    for name, kind, length, seed in [("series", "cyst", 4, 0), *((f"s{'abcde'[i]}", "lung", 1, i) for i in range(5))]:
        (root / "clips" / name).mkdir(parents=True)
        for i, frame in enumerate(simulate_clip(kind, length, 96, seed=seed)):
            Image.fromarray(frame).save(root / "clips" / name / f"img{i}.png")
    ingest(
        [root / "clips"], root / "run" / "cache", size=80, crop="none", max_frames=400, frames="clip", progress=False
    )
    configs.dump(configs.Config(), root / "run" / "config.yaml")
    return root, contents(FrameCache.open(root / "run" / "cache"))


def backbone(provenance):
    return SimpleNamespace(name="ours", provenance=provenance)


def task(folder):
    files = sorted(folder.iterdir())
    items = [Item(f"test/{f.name}", f, "image", "a", f"test/{f.stem}") for f in files]
    return Task("t", "Test", ("a",), items)


def test_contents_name_no_path_and_say_how_the_frames_were_read(seen):
    root, known = seen
    assert len(known["clips"]) == len(known["frame_hashes"]) == 6 and len(known["files"]) == 4
    assert sorted(map(len, known["frame_hashes"]))[:5] == [1] * 5
    assert known["frame_hashes_of"] == {"crop": "none", "stride": 1, "max_frames": 400}
    assert "series" not in json.dumps(known) and str(root) not in json.dumps(known)


def test_a_frame_of_a_series_is_known_by_its_own_content(seen, tmp_path):
    root, known = seen
    shutil.copy(root / "clips" / "series" / "img2.png", tmp_path / "elsewhere.png")
    Image.fromarray(simulate_clip("vessel", 1, 96, seed=7)[0]).save(tmp_path / "new.png")
    assert leaks.find_leaks(backbone(known), task(tmp_path)) == ["test/elsewhere"]
    with pytest.raises(leaks.LeakError, match="ours was pretrained on 1 of the 2 groups"):
        leaks.refuse_leaks(backbone(known), task(tmp_path))


def test_a_whole_series_is_known_without_its_files(seen, tmp_path):
    """Exports of before have a joint hash of a series only."""
    root, known = seen
    old = {"clips": known["clips"]}
    for i in range(4):
        shutil.copy(root / "clips" / "series" / f"img{i}.png", tmp_path / f"x{8 + i}.png")  # x10 follows x9
    assert len(leaks.find_leaks(backbone(old), task(tmp_path))) == 4
    (tmp_path / "x9.png").unlink()
    assert leaks.find_leaks(backbone(old), task(tmp_path)) == []


def test_what_parents_have_seen_counts(seen, tmp_path):
    root, known = seen
    shutil.copy(root / "clips" / "sa" / "img0.png", tmp_path / "b.png")
    child = {"clips": ["0" * 64], "parents": ["no dict", {"parents": [known]}]}
    assert leaks.find_leaks(backbone(child), task(tmp_path)) == ["test/b"]
    assert [pair.bits <= 6 for pair in leaks.find_near(backbone(child), task(tmp_path), tmp_path / "cache")] == [True]
    assert len(list(chain(child))) == 3 and list(chain(None)) == []
    assert leaks.names_clips({"parents": [known]}) and not leaks.names_clips({"method": "x"})
    assert leaks.brief(child) == {"parents": [{"parents": [{}]}]}


def test_altered_copies_are_near_and_shown_beside_what_was_seen(seen, tmp_path):
    root, known = seen
    folder = tmp_path / "images"
    folder.mkdir()
    with Image.open(root / "clips" / "sb" / "img0.png") as image:
        image.resize((70, 60)).save(folder / "small.jpg", quality=60)
    Image.fromarray(simulate_clip("vessel", 1, 96, seed=7)[0]).save(folder / "new.png")
    (folder / "broken.png").write_bytes(b"no picture")
    assert leaks.find_leaks(backbone(known), task(folder)) == []
    (pair,) = leaks.find_near(backbone(known), task(folder), tmp_path / "cache")
    assert pair.item == "test/small.jpg" and pair.clip in known["clips"] and pair.bits <= 20
    assert leaks.picture([pair], root / "run" / "export", tmp_path / "with.png")
    assert not leaks.picture([pair], tmp_path, tmp_path / "without.png")
    shown, empty = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("with", "without"))
    left, right = shown[:128, :128], shown[:128, 131:259]
    assert shown.shape == (131, 262, 3) and np.corrcoef(left.ravel(), right.ravel())[0, 1] > 0.9
    assert np.array_equal(empty, shown[:, :131])


def test_no_hashes_no_pairs_and_damaged_ones_are_named(seen, tmp_path):
    root, known = seen
    images = task(root / "clips" / "sa")
    assert leaks.find_near(backbone({"clips": known["clips"]}), images, tmp_path) == []
    for damage in ([["00"]] * 6, [[1]] * 6, [["0" * 64]]):
        with pytest.raises(EvaluationError, match="ours: the provenance's frame_hashes are damaged"):
            leaks.find_near(backbone({**known, "frame_hashes": damage}), images, tmp_path)


def test_an_export_carries_them(seen, tmp_path):
    known = Provenance("uscl", 1, [], "", {}, **seen[1])
    folder = export(timm.create_model("test_resnet", num_classes=0), "test_resnet", 32, tmp_path / "e", known)
    images = task(seen[0] / "clips" / "sc")
    assert leaks.find_leaks(load_backbone(str(folder)), images) == ["test/img0"]


def distances(one, other):
    return (one.shape[1] - one @ other.T) / 2


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data")
def test_alarms_on_the_real_data():
    """Smaller and re-encoded images are found; between data sets there is no alarm. Prints the figures."""
    hashes, groups = {}, {}
    for name in ("busi3", "bus_uc", "ovary"):
        real = load_task(name, DATA / "classification", DATA)
        groups[name], originals, copies = real.groups, [], []
        for item in real.items:
            (frame,) = read_clip(item.clip, 64, crop="none").images
            originals += frame_hashes(frame[None])
            file = io.BytesIO()
            with Image.open(item.path) as image:
                grey = image.convert("L")
            grey.resize([int(0.6 * side) for side in grey.size]).save(file, "JPEG", quality=50)
            copies += frame_hashes(resize(np.asarray(Image.open(file)), 64)[None])
        assert len(originals) == len(copies) == len(real.items)
        hashes[name] = bits(originals)
        largest = max(distances(one[None], two[None])[0, 0] for one, two in zip(hashes[name], bits(copies)))
        near = distances(hashes[name], hashes[name]) <= leaks.ALIKE
        alarms = int((near & (groups[name][:, None] != groups[name])).sum()) // 2
        print(f"{name}: {len(originals)} copies differ by at most {largest:g} bits; {alarms} pairs of different groups")
        assert largest <= 20 and alarms <= 3
    for one, other in (("busi3", "bus_uc"), ("busi3", "ovary"), ("bus_uc", "ovary")):
        least = distances(hashes[one], hashes[other]).min()
        print(f"{one} and {other}: at least {least:g} bits differ")
        assert least > leaks.ALIKE
