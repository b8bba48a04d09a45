"""Tasks: what is found, what is excluded and why, groups, frames and folds."""

import csv
import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA
from PIL import Image

from training.data.cache import FrameCache
from training.data.ingest import ingest
from training.evaluation import datasets, frames
from training.evaluation.datasets import TaskError, load_frames, load_task, make_folds
from uscl_hub.clips import find_clips
from uscl_hub.clips.read import read_clip


def load(root, name, **kwargs):
    return load_task(name, root, root / "covid_blues", **kwargs)


@pytest.fixture
def copy(downstream, tmp_path):
    """A copy of the data that a test may damage."""
    return Path(shutil.copytree(downstream, tmp_path / "data"))


def reason(task, part):
    found = [why for name, why in task.excluded if part in name]
    assert len(found) == 1, task.excluded
    return found[0]


def test_every_task_finds_all(downstream):
    expected = {
        "pocus": ([7, 6, 6], 19),
        "blues": ([8, 8], 8),
        "blues_point": ([16], 8),  # all at point 1
        "busi": ([32, 32], 64),
        "busi3": ([32, 32, 32], 96),
        "busi_seg": ([32, 32], 64),
    }
    for name in expected:
        task = load(downstream, name)
        assert (np.bincount(task.labels).tolist(), len(set(task.groups))) == expected[name]
        assert task.excluded == [] and task.found == len(task.items)
    assert any("1 viral" in note for note in load(downstream, "pocus").notes)
    assert all(len(item.masks) == 1 for item in load(downstream, "busi_seg").items)
    with pytest.raises(TaskError, match="choose from pocus"):
        load(downstream, "heart")
    with pytest.raises(TaskError, match="no such file"):
        load(downstream / "busi", "pocus")


def test_pocus_names_what_it_cannot_use(copy):
    videos = copy / "pocus_lung" / "videos" / "convex"
    shutil.move(videos / "covid" / "covid0.mp4", videos / "regular" / "covid0.mp4")
    shutil.copy(videos / "covid" / "covid1.mp4", videos / "covid" / "stranger.mp4")
    shutil.copy(videos / "covid" / "covid2.mp4", videos / "pneumonia" / "pneumonia0.mp4")
    shutil.copy(videos / "covid" / "covid3.mp4", videos / "covid" / "covid4.mp4")
    shutil.copy(videos / "covid" / "covid4.mp4", videos / "covid" / "covid5.mp4")
    task = load(copy, "pocus")
    assert "its folder says regular, file_index.csv says covid" in reason(task, "covid0")
    assert "not in file_index.csv" in reason(task, "stranger")
    assert "two labels on the same file" in reason(task, "pneumonia0")
    assert "two labels on the same file" in reason(task, "covid2")
    assert task.found == 20 and len(task.items) == 16
    same = {item.group for item in task.items if item.path.stem in ("covid3", "covid4", "covid5")}
    assert len(same) == 1, "copies of one file are one group, however many patients they are filed under"
    with pytest.raises(TaskError, match="(?s)4 of 20 files cannot be used.*stranger.mp4: not in file_index"):
        datasets.check_excluded(task, 0.05)


def test_scan_points_are_in_the_names(copy):
    videos = copy / "covid_blues" / "lus_videos"
    (copy / "covid_blues" / "severity.csv").unlink()
    for old, new in (("patient_0_L1", "patient_0_R3_2"), ("patient_1_L1", "patient_1_L2"), ("patient_2_L1", "p2")):
        (videos / f"{old}.mp4").rename(videos / f"{new}.mp4")
    task = load(copy, "blues_point")
    labels = {item.path.stem: item.label for item in task.items}
    assert (labels["patient_0_R3_2"], labels["patient_1_L2"], labels["patient_1_R1"]) == (
        "point 3",
        "point 2",
        "point 1",
    )
    assert [reason for _, reason in task.excluded] == ["its name is not patient_N and a point from L1 to R3"]
    assert len(task.items) == 15 and {item.group for item in task.items} == {
        f"covid_blues/patient_{i}" for i in range(8)
    }


def test_blues_names_what_it_cannot_use(copy):
    table = copy / "covid_blues" / "severity.csv"
    rows = list(csv.reader(open(table)))
    rows[1][1], rows[2][1], rows[3][1] = "", "nan", "3.0"
    rows += [[rows[3][0], "0.0"], ["patient_77_L1", "1.0"]]
    csv.writer(open(table, "w", newline="")).writerows(rows)
    videos = copy / "covid_blues" / "lus_videos"
    (videos / "patient_7_R1.mp4").rename(videos / "someone.mp4")
    csv.writer(open(table, "a", newline="")).writerow(["someone", "1.0"])
    task = load(copy, "blues")
    assert "no severity score" in reason(task, rows[1][0])
    assert "'nan'" in reason(task, rows[2][0])
    assert "two labels" in reason(task, rows[3][0])
    assert "no video of that name" in reason(task, "patient_77")
    assert "no video of that name" in reason(task, "patient_7_R1")
    assert "does not begin with patient_N" in reason(task, "someone")
    assert task.found == 18 and len(task.items) == 12


def test_linked_folders_are_followed_once(copy):
    videos = copy / "pocus_lung" / "videos" / "convex"
    before = [item.id for item in load(copy, "pocus").items]
    (videos / "covid").rename(copy / "elsewhere")
    (videos / "covid").symlink_to(copy / "elsewhere")
    (videos / "regular" / "loop").symlink_to(videos)
    assert [item.id for item in load(copy, "pocus").items] == before and len(before) == 19


def test_busi_names_what_it_cannot_use(copy):
    busi = copy / "busi"
    shutil.copy(busi / "benign" / "images" / "benign (0).png", busi / "malignant" / "images" / "malignant (0).png")
    (busi / "benign" / "mask" / "benign (1)_mask.png").unlink()
    (busi / "benign" / "images" / "benign (2).png").write_bytes(b"not an image")
    (busi / "normal" / "images" / "normal (2).png").write_bytes(b"not an image")
    task = load(copy, "busi_seg")
    assert "two labels on the same image" in reason(task, "benign (0)")
    assert "two labels on the same image" in reason(task, "malignant (0)")
    assert "image without its mask" in reason(task, "benign (1)")
    assert "unreadable" in reason(task, "benign (2)")
    assert task.found == 64 and len(task.items) == 60
    assert any("benign (2)_mask.png" in note for note in task.notes)
    assert len(load(copy, "busi").items) == 61 and "unreadable" in reason(load(copy, "busi3"), "normal (2)")


def test_near_duplicates_share_a_group():
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, 256, (3, 60, 80)).astype(np.uint8)
    smooth = [np.asarray(Image.fromarray(x).resize((16, 12)).resize((80, 60))) for x in (a, b, c)]
    brighter = (smooth[0] * 0.8 + 30).astype(np.uint8)
    other_size = np.asarray(Image.fromarray(smooth[1]).resize((120, 100)))
    flat = np.full((60, 80), 7, np.uint8)
    images = [smooth[0], smooth[1], smooth[2], brighter, other_size, flat]
    assert datasets.near_duplicates(images).tolist() == [0, 1, 2, 0, 1, 5]
    assert datasets.near_duplicates([]).tolist() == []


@pytest.mark.parametrize("crop", ["none", "crop", "blank"])
def test_one_preprocessing_in_training_evaluation_and_deployment(downstream, tmp_path, crop):
    """The same clip through the training's frame cache, the evaluation's frames and `uscl-hub embed`: difference 0."""
    task = load(downstream, "pocus")
    task.items = [task.items[0], task.items[-1]]
    frames = load_frames(task, 32, tmp_path / "evaluation", rate=1e6, crop=crop, workers=1)
    ingest([item.path for item in task.items], tmp_path / "training", size=32, crop=crop, workers=0, progress=False)
    cache = FrameCache.open(tmp_path / "training")
    for i, item in enumerate(task.items):
        evaluated = frames.images[frames.item == i]
        trained = cache.clip([Path(name).name for name in cache.ids].index(item.path.name))
        deployed = read_clip(find_clips([item.path])[0], 32, crop=crop).images  # what `uscl-hub embed` shows a model
        assert evaluated.shape == trained.shape == deployed.shape
        assert not (evaluated != trained).any() and not (evaluated != deployed).any()


def test_frames_follow_the_rate(downstream, tmp_path):
    assert datasets.frame_numbers(8, 6.0, 3.0).tolist() == [0, 2, 4, 6]
    assert datasets.frame_numbers(91, 30.0, 3.0).tolist() == list(range(0, 91, 10))
    assert datasets.frame_numbers(5, 2.0, 3.0).tolist() == [0, 1, 2, 3, 4]  # never one twice
    assert datasets.frame_numbers(1, None, 3.0).tolist() == [0]
    assert len(datasets.frame_numbers(1000, 29.97, 3.0)) == 101
    task = load(downstream, "pocus")
    frames = load_frames(task, 32, tmp_path, workers=2)
    assert np.bincount(frames.item).tolist() == [1 if i.kind == "image" else 4 for i in task.items]
    again = load_frames(load(downstream, "pocus"), 32, tmp_path)
    assert again.key == frames.key and np.array_equal(again.images, frames.images)
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_an_unreadable_video_stays_in_the_denominator(copy, tmp_path):
    broken = copy / "pocus_lung" / "videos" / "convex" / "regular" / "regular3.mp4"
    broken.write_bytes(broken.read_bytes()[:300])
    task = load(copy, "pocus")
    frames = load_frames(task, 32, tmp_path, workers=1)
    with pytest.raises(TaskError, match="(?s)1 of 19 files cannot be used.*regular3.mp4: unreadable"):
        datasets.check_excluded(task, 0.05)
    datasets.check_excluded(task, 0.1)
    assert task.found == 19 and len(task.items) == 18 and "unreadable" in reason(task, "regular3")
    assert frames.item.max() == 17 and set(frames.item) == set(range(18))


def test_folds_keep_groups_whole_and_every_class_in_every_fold():
    rng = np.random.default_rng(0)
    groups = np.array([f"g{i}" for i in np.repeat(np.arange(30), rng.integers(1, 6, 30))])
    labels = np.array([int(g[1:]) % 3 for g in groups])
    folds = make_folds(labels, groups, ("a", "b", "c"), 5, seed=0)
    assert all(len(set(folds[groups == g])) == 1 for g in set(groups))
    assert all(set(labels[folds == f]) == {0, 1, 2} for f in range(5)) and folds.min() == 0
    assert not np.array_equal(folds, make_folds(labels, groups, ("a", "b", "c"), 5, seed=1))
    assert np.array_equal(folds, make_folds(labels, groups, ("a", "b", "c"), 5, seed=0))


def test_a_fold_without_a_class_is_refused():
    groups = np.array(list("aabbccddee"))
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    with pytest.raises(TaskError, match="lung: class 'ill' has 2 group.* too few for 3 folds"):
        make_folds(labels, groups, ("well", "ill"), 3, 0, "lung")
    # 'a' holds both classes, so that three groups do not mean three groups to spare
    groups, labels = np.array(list("aaaabc")), np.array([0, 0, 1, 1, 0, 1])
    with pytest.raises(TaskError, match="fold . .seed 0. has no"):
        make_folds(labels, groups, ("well", "ill"), 2, 0)


def test_label_subsets_are_nested_whole_groups_of_every_class():
    groups = np.array([f"g{i}" for i in np.repeat(np.arange(40), 3)])
    labels = np.array([int(int(g[1:]) >= 30) for g in groups])
    kept = {f: datasets.label_subset(labels, groups, f, seed=0) for f in (0.01, 0.1, 0.25, 1.0)}
    counts = {f: [len(set(groups[k & (labels == c)])) for c in (0, 1)] for f, k in kept.items()}
    assert counts == {0.01: [1, 1], 0.1: [3, 1], 0.25: [8, 2], 1.0: [30, 10]}
    assert all((kept[a] <= kept[b]).all() for a, b in ((0.01, 0.1), (0.1, 0.25), (0.25, 1.0)))
    assert all(len(set(k[groups == g])) == 1 for k in kept.values() for g in set(groups))
    with pytest.raises(ValueError, match="above 0"):
        datasets.label_subset(labels, groups, 0, seed=0)


def test_label_subsets_of_a_number_of_files_are_nested_and_in_proportion():
    groups = np.array([f"g{i}" for i in np.repeat(np.arange(40), 3)])
    labels = np.array([int(int(g[1:]) >= 30) for g in groups])
    kept = {n: datasets.label_subset(labels, groups, n, seed=0) for n in (2, 10, 12, 24, 60, 120)}
    assert {n: int(k.sum()) for n, k in kept.items()} == {2: 6, 10: 12, 12: 12, 24: 24, 60: 60, 120: 120}
    assert [int(k[labels == 1].sum()) for k in kept.values()] == [3, 3, 3, 6, 15, 30]
    assert all((kept[a] <= kept[b]).all() for a, b in zip(list(kept), list(kept)[1:]))
    assert all(len(set(k[groups == g])) == 1 for k in kept.values() for g in set(groups))
    with pytest.raises(TaskError, match="121 labelled files were asked for, the training part has 120"):
        datasets.label_subset(labels, groups, 121, seed=0)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-7], lambda b: b[:900] + b"x" + b[901:], lambda b: b"", lambda b: b"hi"]
)
def test_a_damaged_entry_of_the_cache_is_made_again(tmp_path, damage):
    arrays = {"x": np.arange(1000.0), "names": np.array(["a", "bc"])}
    datasets.cached(tmp_path, ["kind", 1], lambda: arrays)
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(damage(file.read_bytes()))
    for make in (lambda: arrays, None):  # None: it is there again, nothing is made
        found = datasets.cached(tmp_path, ["kind", 1], make)
        assert all((found[name] == value).all() for name, value in arrays.items()) and len(found) == 2


def test_what_cannot_be_kept_is_one_line(tmp_path, monkeypatch):
    def full(path, write):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(frames, "write_whole", full)
    with pytest.raises(datasets.EvaluationError, match="cannot be written .No space left on device.; make room, or"):
        datasets.cached(tmp_path, ["kind", 1], lambda: {"x": np.arange(3)})


def test_a_cell_that_is_cut_short_leaves_nothing_behind(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        datasets.cached(tmp_path, ["x", 1], fail)
    assert datasets.cached(tmp_path, ["x", 1], lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]
    assert datasets.cached(tmp_path, ["x", 1], fail)["a"].tolist() == [0, 1, 2]
    assert [p.suffix for p in tmp_path.iterdir()] == [".npz"]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data")
def test_the_real_data_is_all_accounted_for():
    counts = {}
    for name in ("pocus", "blues", "blues_point", "busi_seg"):
        task = load_task(name, DATA / "classification", DATA / "pretrain" / "covid_blues")
        make_folds(task.labels, task.groups, task.classes, 5, seed=0, name=task.title)
        counts[name] = task.found, len(task.excluded), len(set(task.groups))
    assert counts == {
        "pocus": (159, 0, 105),
        "blues": (282, 0, 48),
        "blues_point": (282, 0, 48),
        "busi_seg": (647, 2, 505),
    }


def save_noise(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (40, 48), np.uint8)
    Image.fromarray(noise).save(path)
    return noise


OVARY = "chocolate_cyst high_grade_serous mucinous_cystadenoma normal serous_cystadenoma simple_cyst teratoma"
OVARY += " theca_cell_tumour"


@pytest.mark.parametrize("name, classes", [("bus_uc", "benign malignant"), ("ovary", OVARY)])
def test_images_by_class_folder(tmp_path, name, classes):
    classes = tuple(classes.split())
    for label, folder in enumerate(classes):
        for i in range(3):
            save_noise(tmp_path / name / folder / f"{label}{i}.png", 10 * label + i)
    first, second = (tmp_path / name / folder for folder in classes[:2])
    save_noise(first / "00_mask.png", 100)
    shutil.copy(second / "10.png", first / "same.png")
    noise = save_noise(second / "near.png", 12)
    Image.fromarray(noise // 2 + 60).save(second / "near.png")  # correlates fully with 12.png
    (first / "broken.png").write_bytes(b"no picture")
    task = load(tmp_path, name)
    assert task.name == name and task.classes == classes and task.found == 3 * len(classes) + 3
    assert "two labels on the same image" in reason(task, "same.png") and "two labels" in reason(task, "10.png")
    assert "unreadable" in reason(task, "broken.png")
    group = {item.path.name: item.group for item in task.items}
    assert "00_mask.png" not in group and all(item.masks == () for item in task.items)
    assert group["12.png"] == group["near.png"] and len(set(group.values())) == len(group) - 1
    shutil.rmtree(second)
    with pytest.raises(TaskError, match=f"{second.name}: no such folder"):
        load(tmp_path, name)


@pytest.mark.skipif(not (DATA / "classification" / "bus_uc").is_dir(), reason="needs the shared data")
@pytest.mark.parametrize("name, counts", [("bus_uc", [358, 453]), ("ovary", [114, 15, 40, 91, 74, 18, 118, 30])])
def test_the_real_images_by_class_folder(name, counts):
    task = load(DATA / "classification", name)
    assert np.bincount(task.labels).tolist() == counts and task.excluded == []
    make_folds(task.labels, task.groups, task.classes, 5, 0)
