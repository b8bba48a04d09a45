"""What find_clips finds, passes over and calls its clips; what numbered files are taken for."""

import os
import unicodedata

import numpy as np
import pytest
from helpers import DATA, dicom, movie, one, write
from PIL import Image

from uscl_hub.clips import Report, UnreadableClip, content_hash, find_clips
from uscl_hub.clips.alike import ALIKE, likeness
from uscl_hub.clips.decode import decode


def png(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 20), dtype=np.uint8)).save(path, "png")
    return path


def names(clips):
    return [clip.id for clip in clips]


# ------------------------------------------------------------------------------------------- what is passed over


def test_what_is_passed_over_is_said(tmp_path):
    root = tmp_path / "s"
    png(root / "ok.png")
    for name in ("b.xyz", "a.xyz", "c\n.xyz", "d.txt"):
        (root / name).write_text("x" * 200)
    (root / "nowhere.mp4").symlink_to("missing")
    os.mkfifo(root / "pipe.png")
    report = Report()
    assert names(find_clips([root], report=report)) == ["s/ok.png"]
    assert report.as_dict()["passed_over"] == {
        "links to nothing": ["s/nowhere.mp4"],
        "not a known image, video or DICOM file": ["s/a.xyz", "s/b.xyz", "s/c\n.xyz", "s/d.txt"],
        "not a regular file": ["s/pipe.png"],
    }
    assert report.lines() == [
        "1 passed over, links to nothing: s/nowhere.mp4",
        "4 passed over, not a known image, video or DICOM file: s/a.xyz, s/b.xyz, s/c\\n.xyz, ...",
        "1 passed over, not a regular file: s/pipe.png",
    ]


@pytest.mark.parametrize("name", ["IM0001", "IM0002.US", "x.img", "1.2.840.113", "y.tmp"])
def test_dicom_is_known_by_its_content(tmp_path, name):
    assert one(dicom(tmp_path / name, movie())).kind == "dicom"
    (tmp_path / name).write_bytes(bytes(range(256)) * 3)
    assert find_clips([tmp_path]) == []


@pytest.mark.parametrize("extension", [".3gp", ".flv", ".mts", ".ogv", ".m2ts"])
def test_more_extensions_of_videos(tmp_path, extension):
    content = write(tmp_path / "a.mp4", movie(), "mpeg4").read_bytes()
    (tmp_path / f"b{extension}").write_bytes(content)
    assert [len(decode(clip)[0]) for clip in find_clips([tmp_path])] == [6, 6]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
@pytest.mark.parametrize("mode", [0, 0o644])
def test_a_folder_that_cannot_be_read_is_a_clip_that_cannot(tmp_path, mode):
    """Neither passed over in silence nor the end of the run. 0: not listed; 644: its names are, its files are not."""
    root = tmp_path / "s"
    png(root / "ok.png"), png(root / "shut" / "a.png")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder != folder.parent and os.stat(folder).st_mode & 0o5 != 0o5:
            folder.chmod(0o755)
    (root / "shut").chmod(mode)
    read, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534), os.setuid(65534)
            clips = find_clips([root])
            told = []
            for clip in clips:
                for act in (content_hash, decode):
                    try:
                        act(clip)
                    except (UnreadableClip, OSError) as error:
                        told.append("Permission denied" in str(error))
            os.write(write_end, repr((names(clips), told)).encode())
        except BaseException as error:  # noqa: BLE001 - said to the parent, which fails
            os.write(write_end, repr(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    (root / "shut").chmod(0o755)
    assert os.read(read, 9999).decode() == repr((["s/ok.png", "s/shut" + "/a.png" * (mode > 0)], [True, True]))


def test_names_beyond_path_max(tmp_path):
    root = tmp_path / "s"
    png(root / "ok.png")
    here = os.getcwd()
    try:
        os.chdir(root)
        for _ in range((4090 - len(str(root))) // 201):
            os.mkdir("x" * 200)
            os.chdir("x" * 200)
        for name in ("y" * 100, "z" * 100):
            os.mkdir(name)
            os.chdir(name)
        with open("picture.png", "wb") as file:
            file.write(b"x")
    finally:
        os.chdir(here)
    clips = find_clips([root])
    assert len(clips) >= 2 and "s/ok.png" in names(clips)
    for clip in clips:
        if clip.id != "s/ok.png":
            with pytest.raises(UnreadableClip):
                decode(clip)


# -------------------------------------------------------------------------------------------------------- names


def test_a_link_that_may_not_be_followed_does_not_end_the_run(tmp_path, monkeypatch):
    """As those in /proc of another user's processes."""
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "cwd").symlink_to(tmp_path / "elsewhere")
    real = os.path.realpath

    def realpath(path, **kwargs):
        if str(path).endswith("cwd"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **kwargs)

    monkeypatch.setattr(os.path, "realpath", realpath)
    assert [clip.files[0].name for clip in find_clips([tmp_path])] == ["a.png"]


def test_a_link_has_its_own_name(tmp_path):
    (tmp_path / "blobs").mkdir()
    write(tmp_path / "a.mp4", movie(), "mpeg4").rename(tmp_path / "blobs" / "0f3c")
    link = tmp_path / "snap" / "p1.mp4"
    link.parent.mkdir()
    link.symlink_to("../blobs/0f3c")
    assert names(find_clips([link])) == names(find_clips([link.parent])) == ["snap/p1.mp4"]
    (tmp_path / "train").symlink_to("snap")
    assert names(find_clips([tmp_path / "train"])) == ["train/p1.mp4"]
    png(tmp_path / "blobs" / "x.png")
    (link.parent / "plain").symlink_to("../blobs/x.png")  # the link has no extension, its target has
    assert [len(decode(clip)[0]) for clip in find_clips([link.parent])] == [6, 1]


def test_ids_are_in_one_spelling(tmp_path):
    name = "Müller.png"
    file = png(tmp_path / "s" / unicodedata.normalize("NFD", name))
    (found,) = find_clips([tmp_path / "s" / unicodedata.normalize("NFC", name)])  # as it is typed, or in a table
    assert found.files == (file,)
    assert names(find_clips([tmp_path / "s"])) == ["s/" + unicodedata.normalize("NFC", name)]


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_given_twice_is_found_once(tmp_path, order):
    inner = png(tmp_path / "s" / "in" / "a.png")
    for i in range(3):
        Image.new("L", (20, 16), i).save(tmp_path / "s" / f"f{i}.png")
    (tmp_path / "link").symlink_to("s")
    roots = [tmp_path / "s", tmp_path / "s" / "in", inner, tmp_path / "s" / "f1.png", tmp_path / "link" / "in"]
    clips = find_clips(roots[::order])
    assert sorted(file.name for clip in clips for file in clip.files) == ["a.png", "f0.png", "f1.png", "f2.png"]


@pytest.mark.parametrize("kind", ["numbered", "bytes", "spelling", "roots"])
def test_two_files_never_get_one_id(tmp_path, kind):
    root, roots = tmp_path / "s", [tmp_path / "s"]
    if kind == "numbered":
        files = [png(root / "a#.png"), png(root / "a1.png"), png(root / "a2.png")]
    elif kind == "bytes":
        files = [png(root / "b\\xff.png"), png(root / os.fsdecode(b"b\xff.png"), 1)]
    elif kind == "spelling":
        files = [png(root / unicodedata.normalize(form, "ü.png"), i) for i, form in enumerate(("NFC", "NFD"))]
    else:
        files = [png(tmp_path / p, i) for i, p in enumerate(("1/x/data/f.png", "2/data/f.png", "3/x/data/f.png"))]
        roots = [tmp_path / "1/x/data", tmp_path / "2/data", tmp_path / "3/x"]
    clips = find_clips(roots)
    assert {file for clip in clips for file in clip.files} == set(files)
    assert len(set(names(clips))) == len(clips) and names(clips) == names(find_clips(roots[::-1]))


# ----------------------------------------------------------------------------------- frames of a clip, or images


@pytest.mark.parametrize("alike", [True, False])
def test_numbered_files_are_what_they_look_like_unless_told(tmp_path, alike):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 200, (40, 40))
    for i in range(12):
        picture = base + rng.integers(0, 40, (40, 40)) if alike else rng.integers(0, 240, (40, 40))
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / f"{i}.png")
    report = Report()
    assert len(find_clips([tmp_path], report=report)) == (1 if alike else 12)
    assert bool(report.lines()) != alike and (alike or "taken as separate images" in report.lines()[0])
    assert len(find_clips([tmp_path], "clip")) == 1 and len(find_clips([tmp_path], "images")) == 12
    with pytest.raises(ValueError, match="'movie' is not 'auto', 'clip' or 'images'"):
        find_clips([tmp_path], "movie")


REAL = {  # folder: are its numbered files frames? As measured: the least (or the largest) likeness of its folders
    "pretrain/carotid_splab": (True, 0.795),
    "pretrain/phantom_plus": (True, 0.995),
    "classification/bus_uc": (False, 0.377),
    "classification/ovary": (False, 0.708),
    "classification/busi": (False, None),  # of different sizes
    "pretrain/muscle_dltrack": (False, None),
}


@pytest.mark.parametrize("folder", REAL)
def test_real_folders(folder):
    if not (DATA / folder).is_dir():
        pytest.skip("needs the real data")
    frames, measured = REAL[folder]
    clips = find_clips([DATA / folder])
    assert clips == find_clips([DATA / folder], "clip" if frames else "images")
    assert ("frames" in {clip.kind for clip in clips}) == frames
    if measured:
        grouped = [clip for clip in find_clips([DATA / folder], "clip") if clip.kind == "frames"]
        found = [likeness(clip.files) for clip in grouped]
        assert (min if frames else max)(found) == pytest.approx(measured, abs=0.02)
        assert all((value >= ALIKE) == frames for value in found)


def test_masks_are_no_pictures_unless_they_are_asked_for(tmp_path):
    root = tmp_path / "s"
    for name in (
        "a.png",
        "a_mask.png",
        "a_mask_1.png",
        "b_mask.png",
        "c/images/x.png",
        "c/mask/x_mask.png",
        "masks/y.png",
    ):
        png(root / name)
    found = ["s/a.png", "s/b_mask.png", "s/c/images/x.png", "s/masks/y.png"]  # nothing for the others to be masks of
    assert names(find_clips([root], report=(report := Report()))) == found
    passed = ["s/a_mask.png", "s/a_mask_1.png", "s/c/mask/x_mask.png"]
    assert report.as_dict()["passed_over"] == {"masks of other pictures": passed}
    assert report.lines() == ["3 passed over, masks of other pictures: " + ", ".join(passed)]
    assert names(find_clips([root / "a_mask.png"])) == ["s/a_mask.png"]
    assert names(find_clips([root / "c" / "mask"])) == ["mask/x_mask.png"]
