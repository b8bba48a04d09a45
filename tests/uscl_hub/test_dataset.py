"""Labels from folders and tables, and the torch Dataset on them."""

import doctest
import warnings

import numpy as np
import pytest
import torch
from helpers import DATA, dicom, movie, write
from PIL import Image
from torch.utils.data import DataLoader, WeightedRandomSampler

import uscl_hub
import uscl_hub.errors
from uscl_hub.clips.read import read_clip
from uscl_hub.labels import LabelError, cluster, read_labels

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*patients are unknown", "ignore:.*fewer than", "ignore:.*mask.s.", "ignore:.*have no mask"
)


def picture(path, seed, size=(60, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(30, 255, size[::-1], dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def classes(tmp_path):
    """Two classes of numbered images, a video and a DICOM file."""
    for i in range(5):
        picture(tmp_path / "images" / "benign" / f"b ({i}).png", i)
        picture(tmp_path / "images" / "malignant" / f"m{i}.png", 100 + i)
    write(tmp_path / "images" / "malignant" / "clip.mp4", movie(8), "libx264")
    dicom(tmp_path / "images" / "benign" / "scan.dcm", movie(3))
    dicom(tmp_path / "images" / "benign" / "still.dcm", movie(1) // 2)
    return tmp_path


@pytest.fixture
def table(tmp_path):
    """Writes labels.csv for six images a.png ... f.png."""
    for i, name in enumerate("abcdef"):
        picture(tmp_path / f"{name}.png", i)

    def make(text, encoding="utf-8", name="labels.csv"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        return tmp_path / name

    return make


def rows(column, values, more=""):
    names = "abcdef"
    return f"path,{column}\n" + "".join(f"{names[i]}.png,{value}\n" for i, value in enumerate(values)) + more


# ----------------------------------------------------------------------------------------------------------- labels


def test_folder_of_classes_holds_images_not_clips(classes):
    found = read_labels(classes)
    assert (found.task, found.classes, found.groups_known) == ("classification", ("benign", "malignant"), False)
    assert [item.kind for item in found.items].count("image") == 10
    assert found.targets.tolist() == [0] * 7 + [1] * 6
    assert found.items[0].id == "benign/b (0).png" and found.items[0].path.is_file()
    assert read_labels(classes / "images").targets.tolist() == found.targets.tolist()
    clips = read_labels(classes, frames="clip")  # overruled: each series is one clip
    assert sorted(item.kind for item in clips.items) == ["dicom", "dicom", "frames", "frames", "video"]


def test_table_of_classes_with_groups_and_splits(table):
    text = "path;label;group;split\n" + "".join(
        f"{n}.png;{'xy'[i % 2]};p{i // 2};{'test' if i > 3 else 'train'}\n" for i, n in enumerate("abcdef")
    )
    found = read_labels(table(text))
    assert found.groups.tolist() == ["p0", "p0", "p1", "p1", "p2", "p2"] and found.groups_known
    assert found.splits.tolist() == ["train"] * 4 + ["test"] * 2
    assert any("fewer than 5 groups" in note and "'x' 3" in note for note in found.notes)
    assert read_labels(table(text).parent).targets.tolist() == found.targets.tolist()  # the folder around it


@pytest.mark.parametrize(
    "header, lines, task, targets",
    [
        ("label", ["1.5", "2", "3", "4", "5", "6"], "regression", [[1.5], [2], [3], [4], [5], [6]]),
        ("label", ["a", "b", "a", "b", "a", "b"], "classification", [0, 1, 0, 1, 0, 1]),
        (
            "a,b",
            ["0,1", "1,0", "1,1", "0,0", "0,0", "1,0"],
            "multilabel",
            [[0, 1], [1, 0], [1, 1], [0, 0], [0, 0], [1, 0]],
        ),
        (
            "a,b",
            ["0,9", "1,0", "1,1", "0,0", "0,0", "1,0"],
            "regression",
            [[0, 9], [1, 0], [1, 1], [0, 0], [0, 0], [1, 0]],
        ),
    ],
)
def test_task_follows_from_the_values(table, header, lines, task, targets):
    found = read_labels(table(rows(header, lines)))
    assert found.task == task and found.targets.tolist() == targets
    assert found.targets.dtype == (np.int64 if task == "classification" else np.float32)


def test_numbers_can_be_said_to_be_classes(table):
    path = table(rows("label", ["10", "2", "2", "10", "1", "1"]))
    assert any("task='classification'" in note for note in read_labels(path).notes)
    found = read_labels(path, "classification")
    assert found.classes == ("1", "2", "10") and found.targets.tolist() == [2, 1, 1, 2, 0, 0]


def test_parquet(table, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table("")
    content = {"path": [f"{n}.png" for n in "abcdef"], "size": [1.0, 2.0, 3.0, 4.0, 5.0, 6.5]}
    pq.write_table(pa.table(content), tmp_path / "t.parquet")
    assert read_labels(tmp_path / "t.parquet").targets[:, 0].tolist() == content["size"]
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(LabelError.__base__, match="t.parquet: is not a Parquet file"):
        read_labels(tmp_path / "t.parquet")


GOOD = ["x", "y", "x", "y", "x", "y"]
BROKEN = {
    "a missing file": (rows("label", GOOD, "g.png,x\n"), "1 of 7 files are missing, the first in row 8: g.png"),
    "no path": ("file,label\na.png,x\n", "has no column 'path'; its columns are file, label"),
    "no label": ("path,group\na.png,p\n", "has no column of labels"),
    "several texts": (rows("site,view", ["x,y"] * 6), "could all be labels"),
    "one class": (rows("label", ["x"] * 6), "only one class, 'x'"),
    "a constant": (rows("label", ["2"] * 6), "every 'label' is 2"),
    "NaN": (rows("label", ["1", "nan", "2", "3", "4", "5"]), "row 3: 'label' is nan"),
    "infinite": (rows("label", ["1", "2", "-inf", "3", "4", "5"]), "row 4: 'label' is -inf"),
    "empty": (rows("label", ["x", "y", "", "x", "y", "x"]), "row 4: 'label' is empty"),
    "an empty group": (rows("label,group", ["x,p", "y,q", "x,", "y,r", "x,s", "y,t"]), "row 4: 'group' is empty"),
    "a folder with the table in it": (rows("label", GOOD, ".,x\n"), "row 8: . is a folder that holds this table"),
    "the same twice": (rows("label", GOOD, "a.png,x\n"), "rows 2 and 8 both name a.png"),
    "a group in two splits": (
        rows("label,group,split", [f"{c},{'p' if i < 2 else i},{'ab'[i % 2]}" for i, c in enumerate(GOOD)]),
        r"1 group\(s\) are in two splits, as 'p' in a and b",
    ),
    "no rows": ("path,label\n", "has no rows"),
    "more cells than columns": (rows("label", GOOD, "a.png,x,1,2\n"), "line 8: 4 cells, but the header has 2"),
    "a column twice": (rows("label,label", ["x,y"] * 6), "the header has 'label' twice"),
    "a stray quote": (rows("label", ["x", '"y', *["x", "y"] * 2]), "line 3: .*quot"),
    "a stray quote that is closed later": (rows("label", ["x", '"y', "x", '"y', "x", "y"]), "line 3: .*quot"),
    "zero bytes": (rows("label", ["x\0", *GOOD[1:]]), "zero bytes"),
    "no image": (rows("label", GOOD, "labels.csv,x\n"), "row 8: .*labels.csv is not one image"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_table_is_one_line(table, name):
    text, message = BROKEN[name]
    with pytest.raises(uscl_hub.errors.UserError, match=message) as caught:
        read_labels(table(text))
    assert "\n" not in str(caught.value) and "labels.csv" in str(caught.value)


@pytest.mark.parametrize("encoding, message", [("cp1252", "line 2: byte 0xfc is not UTF-8"), ("utf-16", "is UTF-16")])
def test_other_encodings(table, encoding, message):
    with pytest.raises(uscl_hub.errors.UserError, match=message):
        read_labels(table(rows("label", ["grün", *GOOD[1:]]), encoding))


def test_unknown_settings(table, tmp_path):
    path = table(rows("label", GOOD))
    for arguments, message in [
        ({"columns": ("age",)}, "has no column 'age'; its columns are path, label"),
        ({"task": "detection"}, "choose from classification"),
        ({"task": "segmentation"}, "no column 'mask'"),
        ({"task": "regression"}, "row 2: 'label' is 'x': not a number"),
        ({"task": "multilabel"}, "not a number"),
    ]:
        with pytest.raises(LabelError, match=message):
            read_labels(path, **arguments)
    with pytest.raises(LabelError, match="no such file"):
        read_labels(tmp_path / "nothing")


def test_classes_that_look_like_no_value(table, tmp_path):
    labels = ["none", "inf", "sup", "none", "inf", "sup"]
    assert read_labels(table(rows("label", labels))).classes == ("inf", "none", "sup")
    for values, message in [
        (["1", "2", "none", "1", "2", "1"], "row 4: 'label' is none, among numbers"),
        (["1", "2", "inf", "1", "2", "1"], "row 4: 'label' is inf, among numbers"),
        (["x", "y", "NA", "x", "y", "x"], "row 4: 'label' is NA. Fill it in"),
        (["x", "y", "", "x", "y", "x"], "row 4: 'label' is empty"),
    ]:
        with pytest.raises(LabelError, match=message):
            read_labels(table(rows("label", values)))
    graded = read_labels(table(rows("label", ["1", "2", "none"] * 2)), "classification")
    assert graded.classes == ("1", "2", "none")


def test_digits_with_an_underscore_are_no_number(table):
    found = read_labels(table(rows("label", ["1_2", "1_3"] * 3)))
    assert (found.task, found.classes) == ("classification", ("1_2", "1_3"))


def test_folders_that_say_nothing(tmp_path):
    for name in ("train", "test"):
        picture(tmp_path / "a" / name / "x.png", 1)
    picture(tmp_path / "b" / "x.png", 1)
    for folder, message in [("a", "splits, not classes"), ("b", "no folders of classes"), (".", None)]:
        if message:
            with pytest.raises(LabelError, match=message):
                read_labels(tmp_path / folder)


def test_a_file_with_two_labels_is_left_out(classes):
    image = classes / "images/benign/b (1).png"
    (classes / "images/malignant/copy.png").write_bytes(image.read_bytes())
    found = read_labels(classes)
    assert not {"benign/b (1).png", "malignant/copy.png"} & {item.id for item in found.items}
    assert any("same file" in note for note in found.notes)


def test_the_same_file_in_two_splits_is_refused(table, tmp_path):
    (tmp_path / "f.png").write_bytes((tmp_path / "a.png").read_bytes())
    splits = ["train"] * 5 + ["test"]
    path = table(rows("label,split", [f"{c},{s}" for c, s in zip("xyxyxx", splits)]))
    with pytest.raises(LabelError, match="a.png .train. and f.png .test. are the same file"):
        read_labels(path)


# ------------------------------------------------------------------------------------------------------------ masks


def mask(path, box, size=(60, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size[::-1], np.uint8)
    pixels[box] = 255
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("layout", ["beside", "folder", "inside images", "table"])
def test_masks(tmp_path, layout):
    images = tmp_path / ("images" if "folder" in layout or "images" in layout else "")
    for i in range(3):
        picture(images / f"x{i}.png", i)
        if layout == "beside":
            mask(tmp_path / f"x{i}_mask.png", np.s_[:10])
            mask(tmp_path / f"x{i}_mask_1.png", np.s_[-10:])
        else:
            mask(tmp_path / "masks" / f"x{i}.png", np.s_[:10])
            mask(tmp_path / "masks" / f"x{i}_mask_1.png", np.s_[-10:])
    source = tmp_path
    if layout == "inside images":
        source = images
    if layout == "table":
        source = tmp_path / "t.csv"
        lines = [f"x{i}.png,masks/x{i}.png;masks/x{i}_mask_1.png" for i in range(3)]
        source.write_text("path,mask\n" + "\n".join(lines), encoding="utf-8")
    data = uscl_hub.UltrasoundDataset(source, crop="none", transform=lambda grey: torch.from_numpy(grey)[None])
    assert data.task == "segmentation" and len(data) == 3 and data.classes == ("foreground",)
    x, y = data[1]
    assert x.shape == (1, 50, 60) and y.shape == (50, 60) and y.dtype == torch.bool
    assert y[:10].all() and y[-10:].all() and not y[10:-10].any()


def test_masks_of_another_size_and_none(tmp_path):
    picture(tmp_path / "x.png", 0), picture(tmp_path / "y.png", 1), picture(tmp_path / "z.png", 2)
    mask(tmp_path / "x_mask.png", np.s_[:5])
    mask(tmp_path / "y_mask.png", np.s_[:5])
    found = read_labels(tmp_path)
    assert len(found.items) == 2 and "1 image(s) have no mask" in found.notes[0]
    mask(tmp_path / "y_mask.png", np.s_[:5], size=(30, 50))
    with pytest.raises(LabelError, match=r"1 mask\(s\) .*y_mask.png has 30 x 50 pixels, its image y.png 60 x 50"):
        read_labels(tmp_path)
    mask(tmp_path / "y_mask.png", np.s_[:5], size=(61, 50))  # as rounding leaves them
    assert "stretched" in read_labels(tmp_path).notes[-1]
    assert uscl_hub.UltrasoundDataset(tmp_path, crop="none")[1][1].shape == (224, 224)


def test_classes_with_masks_can_be_either(classes):
    mask(classes / "images/benign/b (1)_mask.png", np.s_[:5])
    mask(classes / "images/benign/b (2)_mask.png", np.s_[:5])
    found = read_labels(classes)
    assert found.task == "classification" and len(found.items) == 13
    assert any("task='segmentation'" in note for note in found.notes)
    assert len(read_labels(classes, "segmentation").items) == 2


def test_mask_is_cropped_and_moved_with_its_image(tmp_path):
    for i in range(2):
        pixels = np.zeros((80, 120), np.uint8)
        pixels[20:60, 30:90] = np.random.default_rng(i).integers(60, 255, (40, 60))
        Image.fromarray(pixels).save(tmp_path / f"x{i}.png")
        mask(tmp_path / f"x{i}_mask.png", np.s_[20:60, 30:90], size=(120, 80))
    x, y = uscl_hub.UltrasoundDataset(tmp_path)[0]
    assert x.shape == (1, 224, 224) and y.shape == (224, 224) and y.float().mean() > 0.85  # 0.25 of the uncropped
    joint = uscl_hub.UltrasoundDataset(tmp_path, joint=lambda image, mask: (image[:, ::-1], mask[:, ::-1]))
    plain = uscl_hub.UltrasoundDataset(tmp_path, joint=lambda image, mask: (image, mask))
    assert np.array_equal(joint[0][0][:, ::-1], plain[0][0]) and np.array_equal(joint[0][1][:, ::-1], plain[0][1])


# ---------------------------------------------------------------------------------------------------------- dataset


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_in_a_loader(classes, workers):
    data = uscl_hub.UltrasoundDataset(classes, frames_per_clip=3)
    assert len(data) == 11 + 2 * 3 and len(data.targets) == len(data) == len(data.groups)
    batches = list(DataLoader(data, batch_size=4, num_workers=workers))
    assert torch.cat([y for _, y in batches]).tolist() == data.targets.tolist()
    x = torch.cat([x for x, _ in batches])
    assert x.shape == (17, 1, 224, 224) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    clip = x[data.item == next(i for i, item in enumerate(data.labels.items) if item.kind == "video")]
    assert (clip[0] - clip[1]).abs().max() > 0.1  # three different frames


def test_samples_are_the_pixels_that_embed_sees(classes):
    data = uscl_hub.UltrasoundDataset(classes, transform=lambda grey: grey, frames_per_clip=8)
    number = next(i for i, item in enumerate(data.labels.items) if item.kind == "video")
    frames = read_clip(data.labels.items[number].clip, 32)
    from uscl_hub.preprocess import resize

    for k, index in enumerate(np.flatnonzero(data.item == number)):
        assert np.array_equal(resize(data[index][0], 32), frames.images[k])


def test_sampler_by_targets(classes):
    data = uscl_hub.UltrasoundDataset(classes)
    weights = 1 / np.bincount(data.targets)[data.targets]
    sampler = WeightedRandomSampler(weights, 40, generator=torch.Generator().manual_seed(0))
    drawn = torch.cat([y for _, y in DataLoader(data, batch_size=20, sampler=sampler)])
    assert 10 <= drawn.sum() <= 30


def test_regression_and_split(table):
    text = rows("size,split", [f"{i / 2},{'train' if i < 4 else 'test'}" for i in range(6)])
    data = uscl_hub.UltrasoundDataset(table(text), split="test")
    assert data.targets[:, 0].tolist() == [2.0, 2.5] and data[1][1].tolist() == [2.5]
    with pytest.raises(LabelError, match="no file is in the split 'val'; its splits: test, train"):
        uscl_hub.UltrasoundDataset(table(text), split="val")


def test_index_beyond_the_end(classes):
    data = uscl_hub.UltrasoundDataset(classes)
    assert torch.equal(data[-1][0], data[len(data) - 1][0])
    with pytest.raises(IndexError):
        data[len(data)]


def test_an_unreadable_file_is_named(classes):
    (classes / "images/benign/broken.png").write_bytes(b"nothing")
    data = uscl_hub.UltrasoundDataset(classes)
    with pytest.raises(LabelError, match="1 file.s. cannot be read, the first: .*broken.png"):
        data.groups
    with pytest.raises(LabelError, match="broken.png"):
        list(data)


def test_unknown_patients_are_clustered_and_said(classes):
    again = Image.open(classes / "images/benign/b (1).png")
    again.save(classes / "images/benign/again.jpg", quality=90)
    data = uscl_hub.UltrasoundDataset(classes)
    with pytest.warns(UserWarning, match="patients are unknown"):
        filters = list(warnings.filters)
        groups = data.groups
        assert warnings.filters == filters  # decoding in threads leaves them as they were
    name = {item.id: i for i, item in enumerate(data.labels.items)}
    group = {key: groups[data.item == i][0] for key, i in name.items()}
    assert group["benign/again.jpg"] == group["benign/b (1).png"] != group["benign/b (2).png"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.groups  # said once


def test_docstring_example():
    import uscl_hub.dataset
    import uscl_hub.labels.groups

    for module in (uscl_hub.dataset, uscl_hub.labels.groups):
        failed, tried = doctest.testmod(module)
        assert tried and not failed


@pytest.mark.skipif(not (DATA / "classification" / "busi").is_dir(), reason="no BUSI images here")
def test_busi():
    found = read_labels(DATA / "classification" / "busi")
    assert found.classes == ("benign", "malignant", "normal")
    assert len(found.items) == 778  # one image is both benign and malignant
    assert [np.sum(found.targets == c) for c in range(3)] == [436, 209, 133]
    masks = read_labels(DATA / "classification" / "busi", "segmentation")
    assert sum(len(item.masks) > 1 for item in masks.items) > 10
    few = cluster(found.subset(np.arange(0, 778, 40)))
    assert any("patients are unknown" in note for note in few.notes)


@pytest.mark.parametrize("linked", ["site", "images", "masks"])
def test_masks_behind_a_link(tmp_path, linked):
    root, disk = tmp_path / "lesions", tmp_path / "disk"
    for i in range(3):
        picture(disk / "images" / f"x{i}.png", i)
        mask(disk / "masks" / f"x{i}.png", np.s_[:10])
    root.mkdir()
    if linked == "site":
        (root / "site").symlink_to(disk)
    else:
        for name in ("images", "masks"):
            if name == linked:
                (root / name).symlink_to(disk / name)
            else:
                (disk / name).rename(root / name)
    (root / "loop").symlink_to(root)
    found = read_labels(root, "segmentation")
    assert [len(item.masks) for item in found.items] == [1, 1, 1] and not found.notes
    assert all(y[:100].any() for _, y in uscl_hub.UltrasoundDataset(root, task="segmentation", crop="none"))


@pytest.mark.parametrize("name", ["x0.jpg", "x0.png"])
def test_an_image_that_is_shown_turned_does_not_fit_its_mask(tmp_path, name):
    for i in range(2):
        picture(tmp_path / f"x{i}.png", i, size=(50, 50))
        mask(tmp_path / f"x{i}_mask.png", np.s_[:10], size=(50, 50))
    assert len(read_labels(tmp_path).items) == 2
    image = Image.open(tmp_path / "x0.png")
    image.load()
    (tmp_path / "x0.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / name, exif=exif)
    with pytest.raises(LabelError, match=f"{name}: it is shown turned, by its EXIF, and its mask is not"):
        read_labels(tmp_path)


def test_pages_and_frames_of_pictures_are_samples(tmp_path):
    shades = [Image.fromarray(np.full((40, 40), 40 * i + 10, np.uint8)) for i in range(6)]
    for kind in "ab":
        (tmp_path / kind).mkdir()
        shades[0].save(tmp_path / kind / f"{kind}.tif", save_all=True, append_images=shades[1 if kind == "a" else 6 :])
    data = uscl_hub.UltrasoundDataset(tmp_path, crop="none", frames_per_clip=3, transform=lambda grey: grey.max())
    assert [(int(x), y) for x, y in data] == [(50, 0), (130, 0), (210, 0), (10, 1)]


def test_masks_below_a_linked_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "disk" / f"{name}.png")
        Image.fromarray(np.eye(20, dtype=bool)).save(tmp_path / "disk" / f"{name}_mask.png")
    (tmp_path / "lesions").symlink_to(tmp_path / "disk")
    found = read_labels(tmp_path / "lesions")
    assert found.task == "segmentation"
    assert [(item.id, len(item.masks)) for item in found.items] == [("a.png", 1), ("b.png", 1)]
