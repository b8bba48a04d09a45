"""Choosing files by licence."""

import pytest

from training.evaluation.datasets import TaskError, load_task
from training.licensed import link
from uscl_hub.clips import find_clips

LICENCES = ("CC BY 4.0", "None", "CC BY-NC 4.0")


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "pocus_lung"
    lines = ["path,label,licence,patient_id,source_id"]
    for i in range(6):
        label = ("covid", "viral")[i % 2]
        file = root / "videos" / label / f"Clip{i}.mp4"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([i]))
        lines.append(f"cc/videos/{label}/clip{i}.MP4,{label},{LICENCES[i % 3]},{i // 3},9")
    lines.append("cc/videos/covid/absent.mp4,covid,CC BY 4.0,7,9")
    (root / "file_index.csv").write_text("\n".join(lines))
    return root


def test_only_files_of_the_licence_and_label_are_linked(root, tmp_path):
    out = tmp_path / "chosen" / "pocus_lung"
    assert link(root, out, ["CC BY 4.0"]) == {"CC BY 4.0": 2}
    assert [clip.id for clip in find_clips([out])] == [
        "pocus_lung/patient_0/Clip0.mp4",
        "pocus_lung/patient_1/Clip3.mp4",
    ]
    assert link(root, out, ["CC BY 4.0"]) == {"CC BY 4.0": 2}  # again: nothing changes
    assert link(root, tmp_path / "viral", ["CC BY 4.0", "CC BY-NC 4.0"], ["viral"]) == {
        "CC BY 4.0": 1,
        "CC BY-NC 4.0": 1,
    }
    with pytest.raises(TaskError, match="files that do not belong there"):
        link(root, out, ["CC BY-NC 4.0"])


def test_links_follow_data_that_have_moved(root, tmp_path):
    out = tmp_path / "chosen" / "pocus_lung"
    link(root, out, ["CC BY 4.0"])
    root.rename(tmp_path / "moved")
    assert link(tmp_path / "moved", out, ["CC BY 4.0"]) == {"CC BY 4.0": 2}
    assert sorted(path.read_bytes() for path in out.rglob("*.mp4")) == [b"\0", b"\3"]


def test_mistakes_are_named(root, tmp_path):
    with pytest.raises(TaskError, match="no licence CC0 in file_index.csv; there are CC BY 4.0, CC BY-NC 4.0, None"):
        link(root, tmp_path / "out", ["CC0"])
    with pytest.raises(TaskError, match="no label healthy"):
        link(root, tmp_path / "out", ["None"], ["healthy"])
    (root / "images").mkdir()
    (root / "images" / "clip0.png").touch()
    with pytest.raises(TaskError, match="clip0.MP4: 2 files have this name"):
        link(root, tmp_path / "out", ["CC BY 4.0"])
    index = root / "file_index.csv"
    index.write_text(index.read_text().replace("CC BY 4.0,1,9", "CC BY 4.0,,"))
    (root / "images" / "clip0.png").unlink()
    with pytest.raises(TaskError, match="neither patient_id nor source_id"):
        link(root, tmp_path / "out", ["CC BY 4.0"])
    with pytest.raises(TaskError, match="no such file"):
        link(tmp_path, tmp_path / "out", ["CC BY 4.0"])
    assert not (tmp_path / "out").exists()


def test_the_groups_are_those_of_the_task(downstream, tmp_path):
    """A backbone that was trained on linked files is refused where the task tests the same patient."""
    link(downstream / "pocus_lung", tmp_path / "pocus_lung", ["CC BY 4.0"])
    groups = {"/".join(clip.id.split("/")[:2]) for clip in find_clips([tmp_path / "pocus_lung"])}
    tested = {item.group for item in load_task("pocus", downstream, tmp_path).items}
    assert groups == tested | {"pocus_lung/patient_viral0"}  # viral: linked, not tested


@pytest.mark.parametrize("name", ["/../../home", "..", "../x", "a/b", "a\\\\b", "a\x00b", "/tmp"])
def test_nothing_is_made_outside_of_out(root, tmp_path, name):
    index = root / "file_index.csv"
    index.write_text(index.read_text().replace("CC BY 4.0,0,9", f"CC BY 4.0,{name},9"))
    before = sorted(tmp_path.rglob("*"))
    if name == "..":  # patient_.. is an odd name, but one
        link(root, tmp_path / "out" / "pocus_lung", ["CC BY 4.0"])
        assert (tmp_path / "out" / "pocus_lung" / "patient_..").is_dir()
        return
    with pytest.raises(TaskError, match="file_index.csv"):
        link(root, tmp_path / "out" / "pocus_lung", ["CC BY 4.0"])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_in_out_leads_nowhere_else(root, tmp_path):
    out = tmp_path / "out" / "pocus_lung"
    out.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (out / "patient_0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TaskError):
        link(root, out, ["CC BY 4.0"])
    assert not list((tmp_path / "elsewhere").iterdir())
