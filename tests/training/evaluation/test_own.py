"""Own labelled data: what becomes of it, and what is refused, in one line."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from training.engine.export import fingerprint
from training.evaluation.leaks import LeakError, find_leaks, refuse_leaks
from training.evaluation.own import OwnData, load_own
from training.evaluation.task import TaskError, check_excluded
from uscl_hub.errors import UserError


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48), np.uint8)).save(path)
    return path


def classes(root, names=("benign", "malignant"), count=4, seed=0):
    for label, name in enumerate(names):
        for i in range(count):
            picture(root / name / f"{i}.png", seed + 100 * label + i)
    return root


def table(root, header, rows, seed=0):
    """A labels.csv whose first column is the path of a picture that is made."""
    for i, row in enumerate(rows):
        picture(root / row[0], seed + i)
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def test_a_folder_of_classes(tmp_path):
    task = load_own(OwnData(str(classes(tmp_path / "mine"))))
    assert (task.name, task.kind, task.classes) == ("own", "classification", ("benign", "malignant"))
    assert task.labels.tolist() == [0] * 4 + [1] * 4 and len(set(task.groups)) == 8 and not task.external
    assert task.title == "mine: benign / malignant" and task.items[0].id == "mine/benign/0.png"
    assert any("patients are unknown" in note for note in task.notes)
    assert not [note for note in task.notes if str(tmp_path) in note]


def test_chosen_classes(tmp_path):
    folder = classes(tmp_path / "mine", ("a", "b", "c"))
    task = load_own(OwnData(str(folder), classes=("c", "a")))
    assert task.classes == ("c", "a") and sorted(task.labels.tolist()) == [0] * 4 + [1] * 4
    assert {item.id.split("/")[1] for item, label in zip(task.items, task.labels) if label == 0} == {"c"}
    with pytest.raises(TaskError, match="--classes: no d; its classes are a, b, c"):
        load_own(OwnData(str(folder), classes=("a", "d")))


def test_another_folder_is_the_test(tmp_path):
    first, second = classes(tmp_path / "one" / "x"), classes(tmp_path / "two" / "x", count=3, seed=1000)
    task = load_own(OwnData(str(first), str(second)))
    assert len(task.items) == 14 and len(task.external) == 6 and task.title.endswith(", tested on x")
    tested = [item for item in task.items if item.id in task.external]
    assert all(str(second) in str(item.path) for item in tested)
    assert not {item.group for item in tested} & {item.group for item in task.items if item not in tested}
    assert any("trained on all 8 files of x, tested once on 6 of x" in note for note in task.notes)


def test_a_backbone_may_have_seen_what_an_external_test_learns_from(tmp_path):
    first, second = classes(tmp_path / "one"), classes(tmp_path / "two", count=3, seed=1000)
    task = load_own(OwnData(str(first), str(second)))
    learned = next(item for item in task.items if item.id not in task.external)
    tested = next(item for item in task.items if item.id in task.external)
    refuse_leaks(SimpleNamespace(name="ours", provenance={"clips": [learned.sha256]}), task)
    with pytest.raises(LeakError, match="pretrained on 1 of the 6 groups"):
        refuse_leaks(SimpleNamespace(name="ours", provenance={"clips": [learned.sha256, tested.sha256]}), task)


def test_groups_of_one_name_in_both_sets_are_different_patients_and_said(tmp_path):
    rows = [(f"{c}{i}.png", c, f"p{i}") for c in "ab" for i in range(3)]
    first = table(tmp_path / "one", "path,label,group", rows)
    second = table(tmp_path / "two", "path,label,group", rows[:2] + rows[3:5], seed=500)
    task = load_own(OwnData(str(first), str(second)))
    assert {item.group for item in task.items} == {*(f"one/p{i}" for i in range(3)), "two/p0", "two/p1"}
    assert any(note.startswith("2 group name(s) stand in both sets, as p0") for note in task.notes)


def test_a_patient_that_was_trained_on_is_refused_under_the_tables_name(tmp_path):
    rows = [(f"{c}{i}.png", c, f"patient{i}") for c in "ab" for i in range(3)]
    task = load_own(OwnData(str(table(tmp_path / "mine", "path,label,group", rows))))
    seen = SimpleNamespace(name="ours", provenance={"groups": [fingerprint("patient1")]})
    assert find_leaks(seen, task) == ["mine/patient1"]
    with pytest.raises(LeakError, match="1 of the 3 groups"):
        refuse_leaks(seen, task)
    alike = load_own(OwnData(str(classes(tmp_path / "other"))))  # no groups are given: a file's name is no patient's
    assert not find_leaks(SimpleNamespace(name="ours", provenance={"groups": ["benign/0.png"]}), alike)


def test_a_test_of_one_patient_is_refused(tmp_path):
    rows = [(f"{c}{i}.png", c, f"p{i}", "test" if i == 2 else "") for c in "ab" for i in range(3)]
    task = load_own(OwnData(str(table(tmp_path / "mine", "path,label,group,split", rows))))
    with pytest.raises(TaskError, match=r"its test has files of 1 group\(s\)"):
        check_excluded(task, 0.05)


def test_rows_of_the_split_test_are_the_test(tmp_path):
    rows = [(f"{c}{i}.png", c, "test" if i == 2 else "train" if i else "val") for c in "ab" for i in range(3)]
    folder = table(tmp_path / "mine", "path,label,split", rows)
    task = load_own(OwnData(str(folder)))
    assert {task_id.rsplit("/")[-1] for task_id in task.external} == {"a2.png", "b2.png"} and len(task.items) == 6
    assert "tested on its split 'test'" in task.title
    with pytest.raises(TaskError, match="rows of the split 'test', and --test"):
        load_own(OwnData(str(folder), str(classes(tmp_path / "other", seed=900))))


@pytest.mark.parametrize(
    "header, value, kind, names, targets",
    [
        ("path,label", lambda i: (f"{i / 4}",), "regression", ("label",), [[i / 4] for i in range(6)]),
        ("path,f,gas", lambda i: (i % 2, i // 3), "multilabel", ("f", "gas"), [[i % 2, i // 3] for i in range(6)]),
    ],
)  # fmt: skip
def test_values_and_several_labels(tmp_path, header, value, kind, names, targets):
    task = load_own(OwnData(str(table(tmp_path / "mine", header, [(f"{i}.png", *value(i)) for i in range(6)]))))
    assert (task.kind, task.classes) == (kind, names) and task.targets.tolist() == targets
    assert task.targets.dtype == np.float32 and task.strata.dtype.kind == "i"
    with pytest.raises(TaskError, match=f"--classes is for classification, this is {kind}"):
        load_own(OwnData(str(tmp_path / "mine"), classes=("x",)))


def test_images_with_masks(tmp_path):
    for i in range(4):
        picture(tmp_path / "mine" / f"{i}.png", i)
        Image.fromarray(np.full((40, 48), 255, np.uint8)).save(tmp_path / "mine" / f"{i}_mask.png")
    task = load_own(OwnData(str(tmp_path / "mine")))
    assert task.kind == "segmentation" and [len(item.masks) for item in task.items] == [1] * 4
    assert task.labels.tolist() == [0] * 4 and task.title == "mine: segmentation"


def test_a_numbered_series_is_one_item(tmp_path):
    for label, name in enumerate("ab"):
        for clip in range(3):
            for i in range(3):
                picture(tmp_path / "mine" / name / f"clip{clip}" / f"f{i}.png", 100 * label + 10 * clip + i)
    task = load_own(OwnData(str(tmp_path / "mine"), frames="clip"))
    assert len(task.items) == 6 and task.has_video and all(len(item.file_sha256) == 3 for item in task.items)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda a, b: shutil.copy(a / "benign" / "0.png", b / "benign" / "copy.png"), "1 file.s. are in the training"),
        (lambda a, b: shutil.rmtree(b / "malignant"), "there is only one class, 'benign'"),
        (lambda a, b: classes(b, ("normal",), seed=700), "its classes or columns are benign, malignant, normal, those"),
        (lambda a, b: (b / "benign" / "0.png").write_bytes(b"no picture"), "cannot be read"),
    ],
)
def test_what_cannot_test_is_refused(tmp_path, change, said):
    first, second = classes(tmp_path / "one"), classes(tmp_path / "two", seed=1000)
    change(first, second)
    with pytest.raises(UserError, match=said) as error:
        load_own(OwnData(str(first), str(second)))
    assert "\n" not in str(error.value)


def test_nothing_to_learn_from(tmp_path):
    rows = [(f"{c}{i}.png", c, "test") for c in "ab" for i in range(3)]
    with pytest.raises(TaskError, match="every row is of the split 'test'"):
        load_own(OwnData(str(table(tmp_path, "path,label,split", rows))))
