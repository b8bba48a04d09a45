"""The whole evaluation on simulated data: results, report, model card, resumption, refusals."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import fresh
import numpy as np
import pytest
import timm
from helpers import DATA
from PIL import Image

from training import config as configs
from training import evaluate
from training.data.provenance import Provenance
from training.engine.export import export, fingerprint
from training.evaluate import EvaluateConfig
from training.evaluation import features, protocols, report, segmentation
from training.evaluation.backbones import LeakError
from training.evaluation.datasets import EvaluationError
from training.evaluation.protocols import FineTune
from training.evaluation.segmentation import Segment

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An export that was pretrained on patient_3 of the simulated COVID-BLUES."""
    provenance = Provenance("uscl", 3, [], "", {}, groups=[fingerprint("patient_3")])
    model = timm.create_model("test_resnet", num_classes=0)
    return export(model, "test_resnet", 32, tmp_path_factory.mktemp("trained") / "export", provenance)


@pytest.fixture(scope="module")
def config(downstream, trained, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    return EvaluateConfig(
        backbones=("random:test_resnet", f"ours={trained}"),
        tasks=("pocus", "busi", "blues", "busi_seg"),
        protocols=("knn", "linear", "finetune_last", "finetune_full"),
        fractions=(0.7, 1.0),
        seeds=(0, 1),
        folds=2,
        draws=60,
        rate=6.0,
        leaks="skip",
        data=str(downstream),
        blues=str(downstream / "covid_blues"),
        out=str(root / "out"),
        cache=str(root / "cache"),
        model_card=str(root / "MODEL_CARD.md"),
        device="cpu",
        last=FineTune(2, 0.01, 32),
        full=FineTune(1, 1e-3, 16),
        segment=Segment(px=32, epochs=1),
    )


@pytest.fixture(scope="module")
def out(config):
    Path(config.model_card).write_text(f"# Card\n\nby hand\n\n{BEGIN}\noutdated\n{END}\n\nby hand too\n")
    return evaluate.main(config)


@pytest.fixture(scope="module")
def result(out):
    return json.loads((out / "results.json").read_text())


def test_every_cell_is_there_with_every_metric(result):
    cells = {(r["task"], r["backbone"], r["protocol"], r["fraction"], r["level"]) for r in result["results"]}
    backbones = {
        "pocus": ("random:test_resnet", "ours"),
        "busi": ("random:test_resnet", "ours"),
        "blues": ("random:test_resnet",),
    }
    levels = {"pocus": ("video", "frame"), "blues": ("video", "frame"), "busi": ("image",)}
    expected = {
        (task, b, p, f, level)
        for task, names in backbones.items()
        for b in names
        for p in ("knn", "linear", "finetune_last", "finetune_full")
        for f in (0.7, 1.0)
        for level in levels[task]
    }
    expected |= {("busi_seg", b, "unet", f, "image") for b in backbones["busi"] for f in (0.7, 1.0)}
    assert cells == expected and len(result["results"]) == len(cells)
    for r in result["results"]:
        classes = result["tasks"][r["task"]]["classes"]
        wanted = ["accuracy", "balanced accuracy", "macro-F1", "AUROC", "average precision"]
        wanted += ["expected calibration error"]
        wanted += [f"{m} {c}" for m in ("precision", "recall", "F1") for c in classes]
        assert list(r["metrics"]) == (["Dice", "PPV", "sensitivity", "HD95"] if r["task"] == "busi_seg" else wanted)
        for metric, e in r["metrics"].items():
            most, slack = (80, 9) if metric == "HD95" else (1, 0.2)  # 80: the diagonal of 64 x 48
            assert 0 <= e["low"] <= e["value"] + slack and e["value"] - slack <= e["high"] <= most
        if r["task"] != "busi_seg":
            assert np.sum(r["confusion"]) == 2 * r["n"]  # once a seed
    video = next(r for r in result["results"] if r["level"] == "video" and r["task"] == "pocus")
    frame = next(r for r in result["results"] if r["level"] == "frame" and r["task"] == "pocus")
    assert (video["n"], frame["n"], video["found"], video["excluded"]) == (19, 18 * 8 + 1, 19, 0)


def test_the_confusion_is_that_of_the_stored_scores(result, out):
    with np.load(out / "arrays.npz") as arrays:
        for r in result["results"]:
            if r["level"] in ("video", "image") and "confusion" in r:
                scores = arrays[f"scores/{r['task']}/{r['backbone']}/{r['protocol']}/{r['fraction']:g}"]
                labels = np.resize(arrays[f"labels/{r['task']}"], len(scores))
                assert r["metrics"]["accuracy"]["value"] == pytest.approx((scores.argmax(1) == labels).mean(), abs=0.06)
                assert np.trace(r["confusion"]) / len(labels) == pytest.approx(r["metrics"]["accuracy"]["value"])


def test_what_is_needed_to_redo_it(result, config, out):
    assert result["config"]["seeds"] == [0, 1] and result["environment"]["torch"] and "commit" in result["environment"]
    assert configs.load(EvaluateConfig, out / "config.yaml") == config
    pocus = result["tasks"]["pocus"]
    assert len(pocus["items"]) == 19 and len(pocus["folds"]["0"]) == 19 and pocus["folds"]["0"] != pocus["folds"]["1"]
    assert len(result["backbones"]["random:test_resnet"]["sha"]) == 2 and len(result["backbones"]["ours"]["sha"]) == 1
    assert result["backbones"]["ours"]["provenance"]["method"] == "uscl"


def test_no_folder_of_this_machine_is_named(config, out, tmp_path):
    assert str(tmp_path.parent) in config.data + config.out  # the fixture's are absolute
    for name in ("results.json", "report.md", "report.html"):
        assert str(tmp_path.parent) not in (out / name).read_text(encoding="utf-8")
    assert not Path(EvaluateConfig().data).is_absolute() or "USCL_DATA" in os.environ


HOSTILE = "<script>alert(1)</script> ` ** | [k](javascript:x)\n\n| a | b |"


def test_names_from_elsewhere_are_text(tmp_path):
    known = {"method": HOSTILE, "steps": 1}
    backbone = {"provenance": known, "architecture": HOSTILE, "px": 1, "sha": [], "untrained": False}
    found = {"found": 1, "used": 1, "groups": 1, "by_class": {}, "groups_by_class": {}, "classes": []}
    task = {**found, "title": HOSTILE, "notes": [HOSTILE], "excluded": [[HOSTILE, HOSTILE]]}
    result = {
        **{"created": "now", "command": HOSTILE, "environment": {}, "refused": [], "results": [], "differences": []},
        "config": {"folds": 5, "seeds": [0], "draws": 1},
        "backbones": {HOSTILE: {**backbone, "leaks_checked": True}},
        "tasks": {"t": task},
    }
    (tmp_path / "results.json").write_text(json.dumps(result), encoding="utf-8")
    np.savez(tmp_path / "arrays.npz")
    report.write(tmp_path)
    text, page = ((tmp_path / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))
    without_code = re.sub("`[^`\n]*`", "", re.sub(r"\\`", "", text))
    assert "<script>" not in page and "<script>" not in without_code
    assert page.count("<table>") == 1 and "href" not in page
    assert not re.search(r"(?<!\\)\]\(javascript", without_code)  # every bracket is escaped


def test_differences_are_between_backbones_of_the_same_kind(result):
    found = [d for d in result["differences"] if d["task"] == "pocus" and d["level"] == "video"]
    assert len(found) == 4 * 2 * 15 and {(d["backbone"], d["against"]) for d in found} == {
        ("ours", "random:test_resnet")
    }
    for d in result["differences"]:
        values = [
            r["metrics"][d["metric"]]["value"]
            for name in (d["backbone"], d["against"])
            for r in result["results"]
            if r["backbone"] == name and all(r[k] == d[k] for k in ("task", "protocol", "fraction", "level"))
        ]
        assert d["value"] == pytest.approx(values[0] - values[1])
        less_is_better = d["metric"] in ("expected calibration error", "HD95")
        words = ("worse", "better") if less_is_better else ("better", "worse")
        assert d["verdict"] == (words[0] if d["low"] > 0 else words[1] if d["high"] < 0 else "no difference shown")


def test_the_report_is_one_file_and_says_what_was_left_out(out):
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and page.count("data:image/png;base64,") == 18
    pictures = re.findall(r"\]\((figures/.*?)\)", text)
    assert len(pictures) == 18 and all((out / p).stat().st_size > 3000 for p in pictures)
    for kind in ("bars", "labels", "confusion", "roc", "tsne"):
        assert f"figures/pocus_{kind}.png" in pictures
    assert "figures/busi_seg_overlays.png" in pictures
    for said in ("Left out:** ours on COVID-BLUES severity: it was pretrained on 1 of the groups", "19 files found"):
        assert said in text
    assert "<strong>Left out:</strong>" in page and page.count("<table>") == text.count("| --- |\n") > 8
    row = re.search(r"\| ours \| linear probe \| 100% \| video \| 19 \|(.*)\|\n", text)[1].split("|")
    assert len(row) == 6 and all(re.fullmatch(r" \d+\.\d \[\d+\.\d, \d+\.\d\] ", cell) for cell in row)


def test_differences_are_shown_from_the_backbones_asked_for(result):
    def shown(*compare):
        text = report.markdown_tables({**result, "config": {**result["config"], "compare": compare}})
        return [line.split(" ")[3].rstrip(",") for line in text.splitlines() if line.startswith("Paired differences")]

    assert shown() == shown("random:test_resnet") == ["random:test_resnet"] * 3  # all tasks but the refused one
    assert shown("ours") == []  # differences are of later backbones from earlier ones


def test_the_model_card_changes_between_its_markers_only(config, out, result):
    text = Path(config.model_card).read_text()
    assert text.startswith(f"# Card\n\nby hand\n\n{BEGIN}\n*Written by") and text.endswith("\n\nby hand too\n")
    assert "outdated" not in text and "| ours | linear probe | 100% | video |" in text and "By class" not in text
    report.update_model_card(Path(config.model_card), result)
    assert Path(config.model_card).read_text() == text
    bare = out / "CARD.md"
    bare.write_text("no markers")
    with pytest.raises(EvaluationError, match="CARD.md: needs one line <!-- results:begin"):
        report.update_model_card(bare, result)
    assert bare.read_text() == "no markers"
    two = [f"<!-- results{name}:{end} -->" for name in ("", ":other") for end in ("begin", "end")]
    bare.write_text("\n".join(two))
    report.replace_section(bare, "other", "new")
    lines = bare.read_text().splitlines()
    assert lines[:3] == two[:3] and lines[-2:] == ["new", two[3]]


def test_a_second_run_computes_nothing_and_says_the_same(config, out, result, monkeypatch):
    for module, name in ((protocols, "knn"), (protocols, "linear"), (features, "compute"), (segmentation, "train")):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(report, "plot", lambda *args: [])  # the first run's are looked at
    again = evaluate.main(replace(config, out=str(out.parent / "again"), model_card=""))
    second = json.loads((again / "results.json").read_text())
    for key in ("results", "differences", "tasks", "backbones", "refused"):
        assert second[key] == result[key]


def test_an_interrupted_run_goes_on_with_the_next_fold(config, tmp_path, monkeypatch):
    small = replace(
        config, tasks=("busi",), backbones=("random:test_resnet",), protocols=("knn", "linear"), fractions=(1.0,),
        out=str(tmp_path / "out"), cache=str(tmp_path / "cache"), model_card="",
    )  # fmt: skip
    computed, linear = [], protocols.linear

    def spy(*args):
        if len(computed) == 1:
            raise KeyboardInterrupt
        computed.append(1)
        return linear(*args)

    monkeypatch.setattr(protocols, "linear", spy)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(small)
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(protocols, "linear", lambda *args: (computed.append(1), linear(*args))[1])
    evaluate.main(small)
    assert len(computed) == 2 * 2  # folds and seeds, each once


def test_a_leak_ends_the_run_before_anything_is_computed(config, tmp_path):
    with pytest.raises(LeakError, match="ours was pretrained on 1 of the 8 groups that COVID-BLUES severity tests"):
        evaluate.main(replace(config, leaks="refuse", out=str(tmp_path / "out"), cache=str(tmp_path / "cache")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"protocols": ("svm",)}, "protocols: no 'svm'; choose from knn, linear"),
        ({"compare": ("theirs",)}, "compare: theirs is not among the backbones random:test_resnet, ours"),
        ({"tasks": ("heart",)}, "tasks: no 'heart'; choose from pocus"),
        ({"leaks": "ignore"}, "leaks: no 'ignore'"),
        ({"segment": Segment(heads=("fcn",))}, "segment.heads: no 'fcn'"),
        ({"backbones": ()}, "backbones: give at least one"),
        ({"backbones": ("random:test_resnet",) * 2}, "not all different"),
        ({"fractions": (0.0,)}, "fractions: give shares"),
        ({"fractions": (0.5, 20.0)}, "fractions: give shares in .* not both"),
        ({"device": "tpu"}, "device: no 'tpu'"),
        ({"task": "survival"}, "task: no 'survival'; choose from classification"),
        ({"frames": "video"}, "frames: no 'video'"),
        ({"test": "elsewhere"}, "test, task, columns and classes are for own labels"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, changes, said):
    with pytest.raises(EvaluationError, match=said):
        evaluate.main(replace(config, **changes))


@pytest.mark.slow
def test_the_command_line(config, tmp_path):
    """A YAML file, overrides, and an error without a traceback."""
    file = tmp_path / "c.yaml"
    file.write_text(f"tasks: busi\nlast: {{epochs: 2}}\nout: {tmp_path / 'out'}\ncache: {config.cache}\n")
    loaded = configs.load(EvaluateConfig, file)
    assert loaded.tasks == ("busi",) and loaded.last == FineTune(2, 0.01, 128) and loaded.full == EvaluateConfig().full
    ended = fresh.script("training/evaluate.py", "--config", file, "--data", tmp_path)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1].startswith("evaluate.py: ")
    assert "no such folder" in ended.stderr and "Traceback" not in ended.stderr


def noisy(path, level, seed):
    """A picture of noise that is brighter by `level`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 120, (40, 48)) + level
    Image.fromarray(noise.astype(np.uint8)).save(path)


def own(folder, header, value, count=24, seed=0):
    """A labels.csv of pictures whose brightness tells the row: i is dark or bright, values are value(i)."""
    lines = [f"path,{header}"]
    for i in range(count):
        noisy(folder / f"{i}.png", 120 * (i % 2), seed + i)
        lines.append(f"{i}.png,{value(i)}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture
def on_own(tmp_path):
    def run(data, **changes):
        protocols = ("knn", "linear", "finetune_full")
        base = EvaluateConfig(("random:test_resnet",), (), protocols, folds=2, draws=50, data=data, px=32, device="cpu")
        base = replace(base, full=FineTune(2, 1e-3, 8), segment=Segment(px=32, epochs=1))
        changed = replace(base, out=str(tmp_path / "out"), cache=str(tmp_path / "cache"), **changes)
        out = evaluate.main(changed)
        return json.loads((out / "results.json").read_text()), (out / "report.md").read_text()

    return run


def by_protocol(result, metric):
    return {row["protocol"]: row["metrics"][metric]["value"] for row in result["results"]}


def test_own_classes_tested_on_another_folder(on_own, tmp_path):
    first = own(tmp_path / "first", "label", lambda i: "ab"[i % 2], 48)
    second = own(tmp_path / "second", "label", lambda i: "ab"[i % 2], 10, seed=900)
    result, text = on_own(first, test=second)
    assert by_protocol(result, "AUROC") == dict.fromkeys(("knn", "linear", "finetune_full"), 1.0)
    assert {row["n"] for row in result["results"]} == {row["groups"] for row in result["results"]} == {10}
    assert {sum(map(sum, row["confusion"])) for row in result["results"]} == {10}
    task = result["tasks"]["own"]
    assert task["title"] == "first: a / b, tested on second" and task["folds"]["0"].count(-1) == 48
    assert "No folds: 10 are tested once, by what the other 48 taught." in text
    assert "trained on all 48 files of first, tested once on 10 of second" in text and str(tmp_path) not in text
    with np.load(tmp_path / "out" / "arrays.npz") as arrays:
        assert len(arrays["labels/own"]) == len(arrays["tsne/own/random:test_resnet"]) == 10


def test_own_values(on_own, tmp_path):
    result, text = on_own(own(tmp_path / "mine", "label", lambda i: 10 + 3 * (i % 2) + i / 100, 48))
    assert min(by_protocol(result, "R2").values()) > 0.1 and by_protocol(result, "R2")["linear"] > 0.9
    assert min(by_protocol(result, "Spearman").values()) > 0.7
    assert {row["level"] for row in result["results"]} == {"image"} and "confusion" not in result["results"][0]
    assert "| R2 | MAE | Spearman |" in text and "label 11.73 on average (10 to 13.47)" in text
    assert (tmp_path / "out" / "figures" / "own_scatter.png").stat().st_size > 3000


def test_several_own_labels(on_own, tmp_path):
    result, text = on_own(own(tmp_path / "mine", "bright,late", lambda i: f"{i % 2},{int(i >= 24)}", 48))
    assert min(by_protocol(result, "AUROC bright").values()) == 1
    metrics = result["results"][0]["metrics"]
    assert metrics["AUROC"]["value"] == pytest.approx((1 + metrics["AUROC late"]["value"]) / 2)
    assert "By column:" in text and (tmp_path / "out" / "figures" / "own_roc.png").stat().st_size > 3000


def test_own_masks_tested_on_another_folder(on_own, tmp_path):
    for name, count in (("first", 12), ("second", 4)):
        for i in range(count):
            mask = np.zeros((40, 48), np.uint8)
            mask[5 + i : 25 + i, 8:30] = 255
            noise = np.random.default_rng(100 * count + i).integers(120, 240, mask.shape)
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(np.where(mask, 10, noise).astype(np.uint8)).save(tmp_path / name / f"{i}.png")
            Image.fromarray(mask).save(tmp_path / name / f"{i}_mask.png")
    result, text = on_own(str(tmp_path / "first"), test=str(tmp_path / "second"))
    (row,) = result["results"]
    assert (row["protocol"], row["n"], row["groups"]) == ("unet", 4, 4) and "HD95 (px)" in text
    assert list(row["metrics"]) == ["Dice", "PPV", "sensitivity", "HD95"]


def test_look_alikes_of_the_training_are_shown(on_own, tmp_path, capsys):
    first = own(tmp_path / "first", "label", lambda i: "ab"[i % 2], 48)
    second = own(tmp_path / "second", "label", lambda i: "ab"[i % 2], 10, seed=900)
    with Image.open(tmp_path / "first" / "3.png") as image:
        image.convert("RGB").save(tmp_path / "second" / "3.png")  # other bytes, the same picture
    result, text = on_own(first, test=second, protocols=("knn",))
    (alike,) = result["look_alikes"]
    assert alike["pairs"] == [{"item": "second/3.png", "clip": "first/3.png", "bits": 0}]
    assert "warning: 1 of the files of first: a / b, tested on second look like" in capsys.readouterr().out
    assert "**Look-alikes:** 1 of the files" in text and "](figures/look_alikes_0.png)" in text
    assert (tmp_path / "out" / "figures" / "look_alikes_0.png").is_file()


@pytest.mark.parametrize(
    "changes, tasks",
    [
        ({}, evaluate.DEFAULT_TASKS),
        ({"data": "builtin"}, evaluate.DEFAULT_TASKS),
        ({"data": "mine"}, ("own",)),
        ({"data": "mine", "tasks": ("busi",)}, ("busi",)),
        ({"test": "other"}, ("own",)),
    ],
)
def test_which_tasks_are_meant(tmp_path, monkeypatch, changes, tasks):
    (tmp_path / "builtin" / "busi").mkdir(parents=True)
    (tmp_path / "mine" / "benign").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert evaluate.with_tasks(EvaluateConfig(**changes)).tasks == tasks


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data")
def test_a_subset_of_the_real_data(tmp_path):
    pocus = tmp_path / "pocus_lung"
    for label in ("covid", "pneumonia", "regular"):
        files = sorted((DATA / "classification" / "pocus_lung" / "videos" / "convex" / label).glob("*"))[::4]
        for path in files[:8]:
            link = pocus / path.relative_to(DATA / "classification" / "pocus_lung")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    (pocus / "file_index.csv").symlink_to(DATA / "classification" / "pocus_lung" / "file_index.csv")
    run = EvaluateConfig(
        tasks=("pocus",), folds=2, draws=50, px=32, rate=1.0, data=str(tmp_path), device="cpu",
        out=str(tmp_path / "out"), cache=str(tmp_path / "cache"),
    )  # fmt: skip
    result = json.loads((evaluate.main(run) / "results.json").read_text())
    assert result["tasks"]["pocus"]["used"] > 20 and {r["level"] for r in result["results"]} == {"video", "frame"}
