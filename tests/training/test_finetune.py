import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from training import finetune
from training.evaluation import leaks, own
from training.evaluation.backbones import load_backbone
from training.evaluation.folds import task_folds
from training.tuning import export, labels, network, problem, run, scores, search
from training.tuning.plan import Plan
from training.tuning.recipes import Recipe, freeze, recipes
from uscl_hub import create_transform
from uscl_hub.errors import UserError
from uscl_hub.labels import LabelError

ROOT = Path(__file__).resolve().parents[2]


def picture(rng, radius, side=40):
    y, x = np.mgrid[:side, :side]
    inside = np.hypot(x - rng.uniform(15, 25), y - rng.uniform(15, 25)) < radius
    speckle = rng.rayleigh(1, (side, side)) * np.where(inside, 12, 60)
    return speckle.clip(0, 255).astype(np.uint8), inside


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """images: 24 of two classes told apart by the size of a dark disc; masks, and tables of the other tasks."""
    root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    rows = []
    for i in range(24):
        name, radius = ("small", rng.uniform(3, 5)) if i % 2 else ("large", rng.uniform(9, 13))
        image, mask = picture(rng, radius)
        for kind, pixels in (("classes", image), ("lesions", image), ("test", picture(rng, radius)[0])):
            path = root / kind / (f"{name}/{i}.png" if kind != "lesions" else f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        Image.fromarray(mask).save(root / "lesions" / f"{i}_mask.png")
        rows.append([f"classes/{name}/{i}.png", f"p{i // 2}", f"{radius:.3f}", int(i % 2), int(i % 3 == 0)])
    for name, columns in (("numbers.csv", (0, 1, 2)), ("several.csv", (0, 1, 3, 4))):
        head = ["path", "group", "radius", "small", "third"]
        with open(root / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([[r[c] for c in columns] for r in (head, *rows)])
    return root


def settings(folder, tiny_export, out, **more):
    base = {"backbones": (f"tiny={tiny_export}",), "minutes": 5, "folds": 2, "device": "cpu"}
    return run.FinetuneConfig(str(folder), str(out), **{**base, **more})


def setting_of(folder, tiny_export, tmp_path, **more):
    config = settings(folder, tiny_export, tmp_path, **more)
    return run.make_settings(config, labels.read(config.data), tmp_path / "cache")[0]


def shorten(patch, epochs=(2, 1)):
    for module in ("plan", "search"):
        patch.setattr(f"training.tuning.{module}.EPOCHS", epochs)
    patch.setattr(network, "DRAWS", 96)


@pytest.fixture
def short(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def classified(folder, tiny_export, tmp_path_factory):
    """A finished run on the two classes."""
    out = tmp_path_factory.mktemp("run") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        config = settings(folder / "classes", tiny_export, out, test=str(folder / "test"), onnx=True)
        return config, finetune.main(config)


def test_it_learns_what_is_there_and_says_how_it_chose(classified):
    config, result = classified
    assert result["scores"]["AUROC"]["value"] > 0.9
    assert result["test"]["scores"]["AUROC"]["value"] > 0.9
    assert result["table"].count("\n") == 2 + 4 - 1 and "chosen" in result["table"]
    assert "Chosen among 4 recipes" in result["honesty"]
    assert any("patients are unknown" in note for note in result["notes"])
    page = (Path(config.out) / "report.html").read_text(encoding="utf-8")
    for part in (
        "Confusion matrix",
        "ROC and precision-recall",
        "Reliability",
        "mistakes",
        "Grad-CAM",
        "Score by group",
    ):
        assert part in page, part
    assert "Not drawn" not in page.partition("Grad-CAM")[2].partition("<h2>")[0]
    assert "<img" in page and 'src="http' not in page


def test_plain_timm_loads_the_export(classified):
    config, result = classified
    folder = Path(config.out) / "export"
    code = (
        "import sys, json, timm\n"
        f"model = timm.create_model('local-dir:{folder}', pretrained=True)\n"
        "assert 'uscl_hub' not in sys.modules\n"
        "print(json.dumps([model.num_classes, list(model.pretrained_cfg['label_names'])]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert json.loads(done.stdout) == [2, ["large", "small"]]
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))["uscl_hub"]
    assert about["task"] == "classification" and about["temperature"] == result["temperature"]
    assert about["parents"][0]["name"] == "tiny" and len(about["data_sha256"]) == 64
    assert len(about["groups"]) == result["groups"] and not any("png" in group for group in about["groups"])
    text = (folder / "config.json").read_text(encoding="utf-8") + (folder / "README.md").read_text(encoding="utf-8")
    assert str(Path(config.data).parent) not in text


def test_the_export_predicts_from_files_as_the_run_did(classified, folder):
    """The preprocessing that the export names is the one that it was trained with."""
    config, result = classified
    export = Path(config.out) / "export"
    model = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    transform, found = create_transform(model), labels.read(folder / "test")
    with torch.inference_mode():
        x = torch.stack([transform(Image.open(item.path)) for item in found.items])
        logits = model(x).numpy()
    p = torch.from_numpy(logits / result["temperature"]).softmax(1).numpy()
    assert scores.roc_auc_score(found.targets, p[:, 1]) == pytest.approx(result["test"]["scores"]["AUROC"]["value"])
    import onnxruntime

    content = (export / "model.onnx").read_bytes()  # it names no folder of this machine
    assert str(ROOT).encode() not in content and b"site-packages" not in content
    session = onnxruntime.InferenceSession(str(export / "model.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"image": x.numpy()})[0], logits, atol=1e-4)


def test_names_of_labels_and_sources_are_no_markup():
    evil = "<script>x</script>\n\n| a | b |"
    parent = {"name": evil, "licence": evil, "sources": [{"name": evil, "licence": evil}], "parents": []}
    about = {"task": "classification", "items": 1, "groups": [], "recipe": "frozen", "imbalance": evil, "scores": {}}
    about |= {"honesty": "", "parents": [parent], "data_sha256": "", "sha256": "", "temperature": 1.0}
    config = {"architecture": "resnet18", "num_classes": 1, "label_names": [evil], "uscl_hub": about}
    card = export.card({**config, "pretrained_cfg": {"input_size": [3, 64, 64]}})
    assert "<script>" not in card and "\n| a |" not in card


@pytest.mark.slow
def test_repeated_by_the_same_plan_it_gives_the_same_bits(classified, tmp_path, short):
    config, _ = classified
    again = replace(config, out=str(tmp_path / "again"), plan=str(Path(config.out) / "plan.json"), minutes=0.001)
    finetune.main(again)
    for name in ("model.safetensors", "config.json", "README.md"):
        one, two = (Path(c.out) / "export" / name for c in (config, again))
        assert one.read_bytes() == two.read_bytes(), name


def test_a_finished_run_is_not_trained_again(classified, tmp_path, monkeypatch, short):
    config, result = classified
    shutil.copytree(config.out, tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    trained, original = [], network.train
    monkeypatch.setattr(network, "train", lambda *a: trained.append(len(a[2])) or original(*a))
    finetune.main(replace(config, out=str(tmp_path / "copy"), onnx=False))
    assert trained in ([], [result["items"]])  # the last one at most, on everything
    with pytest.raises(UserError, match="belongs to a run with other data or settings"):
        finetune.main(replace(config, out=str(tmp_path / "copy"), seed=1))


@pytest.mark.slow
def test_regression(folder, tiny_export, tmp_path, short):
    both = (f"tiny={tiny_export}", "random:test_resnet")
    result = finetune.main(settings(folder / "numbers.csv", tiny_export, tmp_path / "r", backbones=both, px=32))
    assert result["table"].count("random:test_resnet, ") == result["table"].count("| tiny, ") == 4
    assert result["task"] == "regression" and result["groups"] == 12
    assert result["scores"]["R2"]["value"] > 0.3 and result["temperature"] == 1
    about = json.loads((tmp_path / "r/export/config.json").read_text(encoding="utf-8"))["uscl_hub"]
    found = labels.read(folder / "numbers.csv")
    assert about["target_mean"] == pytest.approx([found.targets.mean()])
    assert about["target_std"] == pytest.approx([found.targets.std()])
    assert "Predicted against true" in (tmp_path / "r/report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_several_labels(folder, tiny_export, tmp_path, short):
    result = finetune.main(settings(folder / "several.csv", tiny_export, tmp_path / "m"))
    assert result["task"] == "multilabel" and result["names"] == ["small", "third"]
    assert result["scores"]["AUROC small"]["value"] > 0.8
    assert timm.create_model(f"local-dir:{tmp_path}/m/export", pretrained=True).num_classes == 2


@pytest.mark.slow
def test_segmentation(folder, tiny_export, tmp_path, monkeypatch):
    shorten(monkeypatch, (2,))
    result = finetune.main(settings(folder / "lesions", tiny_export, tmp_path / "s", px=32))
    assert result["task"] == "segmentation" and result["scores"]["Dice"]["value"] > 0.3
    from safetensors.torch import load_file

    names = load_file(tmp_path / "s/export/model.safetensors")
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder"}
    about = json.loads((tmp_path / "s/export/config.json").read_text(encoding="utf-8"))["uscl_hub"]
    assert about["decoder"] == "unet"
    assert "Outlines" in (tmp_path / "s/report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_interrupted_it_goes_on(folder, tiny_export, tmp_path):
    out = tmp_path / "stopped"
    command = [sys.executable, str(ROOT / "training/finetune.py"), "--data", str(folder / "classes"), "--out", str(out)]
    command += ["--backbones", f"tiny={tiny_export}", "--folds", "2", "--device", "cpu", "--minutes", "0.5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 600
    while not list(out.glob("cache/tuned-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130 and "the same command goes on" in errors and "Traceback" not in errors
    before = {path: path.stat().st_mtime_ns for path in out.glob("cache/tuned-*")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr
    assert before and all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert (out / "export/model.safetensors").is_file()


# --------------------------------------------------------------------------------------------------------- parts


def test_no_group_is_in_two_folds(folder):
    for name in ("numbers.csv", "several.csv"):
        found = labels.read(folder / name)
        folds = search.split(found, 3, 0)
        assert set(folds) == {0, 1, 2}
        assert all(len(set(folds[found.groups == g])) == 1 for g in found.groups)


def test_the_plan_prefers_all_then_the_cheap_and_remembers(tmp_path, monkeypatch):
    monkeypatch.setattr("training.tuning.plan.EPOCHS", (24, 12, 6))
    path, slow = tmp_path / "plan.json", {24: (600.0, 100.0), 12: (300.0, 50.0), 6: (150.0, 25.0)}
    quick = {24: (60.0, 10.0), 12: (30.0, 5.0), 6: (15.0, 2.5)}
    plan = Plan(path, "k", 6.5)
    assert plan.decide("a", {"a": quick, "b": slow})["epochs"] == 24  # 60 + 150 + 25 seconds of 390
    plan.spend("a", 250)
    assert plan.decide("b", {"b": slow})["epochs"] == 0  # 175 of 140
    assert plan.decide("c", {"c": slow}, needed=True)["epochs"] == 6 and not plan.too_slow("c", 400, 400, 900)
    again = Plan(path, "k", 6.5)
    assert again.decide("a", {})["epochs"] == 24 and again.decide("b", {})["epochs"] == 0
    more = Plan(path, "k", 20)
    assert more.decide("a", {})["epochs"] == 24 and more.decide("b", {"b": slow})["epochs"] == 24
    with pytest.raises(UserError, match="belongs to a run"):
        Plan(path, "other", 6.5)


def test_a_long_training_is_preferred_to_all_of_them_short(tmp_path, monkeypatch):
    monkeypatch.setattr("training.tuning.plan.EPOCHS", (24, 12, 6))
    costs = {"a": {24: (120.0, 40.0), 12: (60.0, 20.0), 6: (30.0, 10.0)}}
    plan = Plan(tmp_path / "plan.json", "k", 3)  # 180 seconds
    first = plan.decide("a", costs | {"b": costs["a"]})
    assert (first["epochs"], first["why"]) == (12, "what follows fits as well")  # 24: 120 + 30 + 40
    short = Plan(tmp_path / "short.json", "k", 1.5)  # 90 seconds: 12 and nothing else, or 6 of both
    assert short.decide("a", costs | {"b": costs["a"]})["epochs"] == 12
    short.spend("a", 40)
    assert short.decide("b", {"b": costs["a"]})["epochs"] == 6  # 50 left: 30 and the 20 of a's last training


def test_a_training_much_slower_than_expected_is_shortened_then_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("training.tuning.plan.EPOCHS", (24, 12, 6))
    costs = {"a": {24: (60.0, 10.0), 12: (30.0, 5.0), 6: (15.0, 2.5)}}
    plan = Plan(tmp_path / "plan.json", "k", 2)
    assert plan.decide("a", costs)["epochs"] == 24
    assert not plan.too_slow("a", 40, 85, 180)  # 80 s are left, and 12 s may be overdrawn
    assert plan.too_slow("a", 20, 120, 180) and plan.decisions["a"]["epochs"] == 12  # 90 of 100 seconds
    plan.spend("a", 20)
    assert plan.too_slow("a", 20, 100, 330)
    plan.spend("a", 20)
    again = Plan(tmp_path / "plan.json", "k", 2)
    assert again.decide("a", costs)["why"].startswith("given up") and again.remaining() == 80
    again.spend("b", 500)  # a run that is repeated long after its minutes are over keeps what is finished
    assert not again.too_slow("a", 0.1, 0.2, 0.3)


def test_a_slow_training_is_given_up_between_folds(folder, tiny_export, tmp_path, monkeypatch):
    setting, folds = setting_of(folder / "classes", tiny_export, tmp_path), np.arange(24) % 3
    done, original = [], search.fold_logits
    monkeypatch.setattr(search, "fold_logits", lambda *a: done.append(a[3]) or original(*a))
    monkeypatch.setattr(Plan, "too_slow", lambda self, name, used, needed, anew: anew > needed > used)
    plan, cache = Plan(tmp_path / "plan.json", "k", 1), tmp_path / "cache"
    assert search.try_out(setting, Recipe("x", "last", 1e-3, 1), folds, plan, cache) is None and done == [0]
    assert len(list(cache.glob("tuned-*"))) == 1
    assert search.try_out(setting, Recipe("frozen features", "frozen"), folds, plan, cache).items.shape == (5, 24, 2)


def test_calibration_counts_classes_alike(folder):
    """Odds that are right for equal classes are no error, though they say a rare class too often."""
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1], [2000, 200])
    found = replace(labels.read(folder / "classes"), targets=targets)
    described = problem.describe(found)
    said = np.where(rng.random(2200) < np.where(targets == 1, 0.8, 0.2), 0.8, 0.2)
    both = np.stack([1 - said, said], axis=1)
    got = scores.estimates(described, targets, both, np.arange(2200))
    assert got[scores.CALIBRATION].value < 0.05
    _, mean, share = scores.reliability(targets == 1, said, np.ones(2200)).T
    assert np.nanmax(np.abs(mean - share)) > 0.1  # counted by items, it is one
    other = replace(described, weights=np.ones(2, np.float32))  # a training of other shares is of no account
    assert scores.estimates(other, targets, both, np.arange(2200))[scores.CALIBRATION].value < 0.05


@pytest.mark.parametrize(
    "depth, expected", [("last", {"layer4", "fc"}), ("whole", {"conv1", "layer1", "layer4", "fc"})]
)
def test_depths(depth, expected):
    model = timm.create_model("test_resnet", num_classes=2).train()
    freeze(model, depth)
    trained = {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    assert expected <= trained and (depth == "whole") == ("conv1" in trained)
    assert model.layer1[0].bn1.training == (depth == "whole") and model.layer4[0].bn1.training


def test_frozen_stages_keep_their_weights_and_statistics(folder, tiny_export, tmp_path):
    setting = setting_of(folder / "classes", tiny_export, tmp_path)
    model = network.train(setting, Recipe("x", "last", 1e-2, 2), np.arange(24), 2)
    before, after = setting.backbone.model.state_dict(), model.state_dict()
    same = {key.split(".")[0] for key in before if torch.equal(before[key], after[key])}
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert "conv1" in same and "conv1" not in changed and "layer4" in changed


def test_the_head_of_scikit_learn_is_the_networks(folder, tiny_export, tmp_path):
    setting = setting_of(folder / "classes", tiny_export, tmp_path)
    x = search.frozen_features(setting, tmp_path / "cache")
    w, b = search.fit_head(setting, x, np.arange(24), 0.1)
    model = network.build(setting.backbone, setting.problem)
    search.frozen.install(model, w, b)
    logits = network.predict(model.eval(), setting, np.arange(24))
    np.testing.assert_allclose(logits, x[0] @ w.T + b, atol=1e-3)


def test_temperature_undoes_a_factor(folder, tiny_export, tmp_path):
    setting = setting_of(folder / "classes", tiny_export, tmp_path)
    rng = np.random.default_rng(0)
    truth = setting.found.targets
    logits = np.eye(2)[truth] * 1.5 + rng.normal(size=(24, 2))
    one, four = (problem.fit_temperature(setting.problem, logits * f, truth, setting.pixels) for f in (1, 4))
    assert four == pytest.approx(4 * one, rel=1e-2)


def test_intervals_of_regression_agree_with_scikit_learn(folder):
    from scipy.stats import spearmanr
    from sklearn.metrics import mean_absolute_error, r2_score

    found = labels.read(folder / "numbers.csv")
    values = found.targets.astype(float) + np.random.default_rng(0).normal(size=found.targets.shape)
    got = scores.estimates(problem.describe(found), found.targets, values, found.groups)
    assert got["R2"].value == pytest.approx(r2_score(found.targets, values))
    assert got["MAE"].value == pytest.approx(mean_absolute_error(found.targets, values))
    assert got["Spearman"].value == pytest.approx(spearmanr(found.targets[:, 0], values[:, 0]).statistic)
    assert all(e.low <= e.value <= e.high for e in got.values())


def test_an_epoch_of_a_small_set_goes_through_it_several_times(folder, tiny_export, tmp_path):
    setting, items = setting_of(folder / "classes", tiny_export, tmp_path), np.arange(2, 12)
    frames = network.epoch_frames(setting, items, 0)
    assert len(frames) == network.in_epoch(setting, items) == 510
    assert np.bincount(frames).tolist() == [0, 0] + [51] * 10 and not np.array_equal(frames[:10], frames[10:20])


def test_limits_are_nested_and_keep_the_classes(folder):
    found = labels.read(folder / "classes")
    few, more = (labels.limited(found, n, 0) for n in (6, 12))
    assert {i.id for i in few.items} < {i.id for i in more.items} and len(few.items) == 6
    assert np.bincount(few.targets).tolist() == [3, 3]


def test_rows_of_the_split_test_are_not_learned_from(folder, tmp_path):
    rows = [
        f"{folder}/classes/{n}/{i}.png,{n},{'test' if i > 20 else ''}"
        for i in range(24)
        for n in [("large", "small")[i % 2]]
    ]
    (tmp_path / "labels.csv").write_text("path,label,split\n" + "\n".join(rows), encoding="utf-8")
    learn, test = labels.without_test(labels.read(tmp_path))
    assert (len(learn.items), len(test.items)) == (21, 3) and not {i.id for i in learn.items} & {
        i.id for i in test.items
    }


@pytest.mark.parametrize(
    "tested, message",
    [
        ({1, 3}, "the split 'test' has no file of large"),
        ({0, 1}, "the split 'test' is of one group"),
        (set(range(0, 24, 2)), "without the rows of the split 'test', has no file of large"),
        (set(range(2, 24)), "without the rows of the split 'test', is of one group"),
    ],
)
def test_a_split_without_scores_is_refused_before_anything_is_trained(folder, tmp_path, tested, message, monkeypatch):
    names, patients = ("large", "small"), 2 if tested in ({0, 1}, set(range(2, 24))) else 1
    rows = [
        f"{folder}/classes/{names[i % 2]}/{i}.png,{names[i % 2]},p{i // patients},{'test' * (i in tested)}"
        for i in range(24)
    ]
    (tmp_path / "labels.csv").write_text("path,label,group,split\n" + "\n".join(rows), encoding="utf-8")
    monkeypatch.setattr(run, "load_backbone", lambda *a: pytest.fail("the labels come first"))
    with pytest.raises(LabelError, match=message):
        run.run(run.FinetuneConfig(str(tmp_path), str(tmp_path / "out")))


def test_the_released_lite0_is_tuned_as_itself(folder, tiny_export, tmp_path):
    name = "meta_uscl_efficientnet_lite0.cc_by_128"
    setting = setting_of(folder / "classes", tiny_export, tmp_path, backbones=(name,), px=64)
    model = network.build(setting.backbone, setting.problem).eval()
    result = {"items": 24, "recipe": "", "temperature": 1.0, "scores": {}, "honesty": "", "imbalance": ""}
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.onnx").write_bytes(b"of other weights")
    written = export.write(tmp_path / "export", model, setting, result)
    export.check(written, model, setting)
    assert not (written / "model.onnx").exists()
    unet = network.build(setting.backbone, replace(setting.problem, task="segmentation")).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        maps = setting.backbone.model.forward_intermediates(x, intermediates_only=True)
        for ours, theirs in zip(unet.encoder(x), maps, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_export_is_known_by_what_it_and_its_start_have_seen(folder, tiny_export, tmp_path):
    setting = setting_of(folder / "classes", tiny_export, tmp_path)
    start = {"groups": ["p7"], "clips": ["a" * 64], "files": ["b" * 64], "method": "simclr"}
    setting.backbone.provenance = {**start, "parents": [{"name": "older", "licence": "MIT", "groups": ["p8"]}]}
    model = network.build(setting.backbone, setting.problem).eval()
    result = {"items": 24, "recipe": "", "temperature": 1.0, "scores": {}, "honesty": "", "imbalance": ""}
    written = export.write(tmp_path / "export", model, setting, result)
    mine = load_backbone(f"mine={written}")
    seen = own.load_own(own.OwnData(str(folder / "classes")))  # no column of patients: by the files' content
    assert len(leaks.find_leaks(mine, seen)) == len(set(seen.groups))
    assert not leaks.find_leaks(mine, own.load_own(own.OwnData(str(folder / "test"))))
    for group in ("p7", "p8"):
        item = replace(seen.items[0], id="x.png", path=folder / "test/large/0.png", group=group)
        assert leaks.find_leaks(mine, replace(seen, items=[item])) == [group]


def test_a_test_of_more_classes_or_beside_a_split_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_backbone", lambda *a: pytest.fail("the labels come first"))
    more = shutil.copytree(folder / "test", tmp_path / "more")
    shutil.copytree(more / "small", more / "tiny")
    for i in range(1, 24, 2):  # other files
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40), np.uint8)).save(more / "tiny" / f"{i}.png")
    names = ("large", "small")
    rows = [f"{folder}/classes/{names[i % 2]}/{i}.png,{names[i % 2]},{'test' * (i > 15)}" for i in range(24)]
    (tmp_path / "labels.csv").write_text("path,label,split\n" + "\n".join(rows), encoding="utf-8")
    for data, test, message in (
        (folder / "classes", more, "has large, small, tiny, --data has large, small. Name the same ones"),
        (tmp_path / "labels.csv", folder / "test", "has rows of the split 'test', and --test names another test set"),
    ):
        with pytest.raises(LabelError, match=message):
            run.run(run.FinetuneConfig(str(data), str(tmp_path / "out"), test=str(test)))
    chosen = run.FinetuneConfig(
        str(folder / "classes"), str(tmp_path / "out"), test=str(more), classes=("large", "small")
    )
    with pytest.raises(pytest.fail.Exception, match="the labels come first"):  # they are right
        run.run(chosen)


def test_a_test_that_cannot_be_read_is_known_before_anything_is_trained(folder, tiny_export, tmp_path, monkeypatch):
    broken = shutil.copytree(folder / "test", tmp_path / "test")
    whole = (broken / "large/0.png").read_bytes()
    (broken / "large/0.png").write_bytes(whole[: len(whole) // 2])
    names = [f"{n}/{i}.png,{n},q{i}" for i in range(24) for n in [("large", "small")[i % 2]]]
    (broken / "labels.csv").write_text("path,label,group\n" + "\n".join(names), encoding="utf-8")
    monkeypatch.setattr(search, "try_all", lambda *a: pytest.fail("the test comes first"))
    with pytest.raises(UserError, match="0.png"):
        run.run(settings(folder / "classes", tiny_export, tmp_path / "out", test=str(broken / "labels.csv")))


def test_onnx_that_cannot_be_written_is_known_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="--onnx needs onnx, onnxscript and onnxruntime"):
        run.run(run.FinetuneConfig(str(tmp_path / "nothing"), onnx=True))


def test_a_training_that_diverges_is_left_out(folder, tiny_export, tmp_path, monkeypatch):
    shorten(monkeypatch)
    setting = setting_of(folder / "classes", tiny_export, tmp_path)
    folds = search.split(setting.found, 2, 0)

    def train(setting, recipe, *more, original=network.train):
        if recipe.name == gone:
            raise network.Diverged(f"{recipe.name}: the loss became nan: left out")
        return original(setting, recipe, *more)

    names = [recipe.name for recipe in recipes("classification") if recipe.epochs]
    gone = names[0]
    monkeypatch.setattr(network, "train", train)
    plan = Plan(tmp_path / "plan.json", "k", 5)
    tried = search.try_all([setting], folds, plan, tmp_path / "cache", lambda text: None)
    assert [t.recipe.name for t in tried][1:] == names[1:]
    again = Plan(tmp_path / "plan.json", "k", 5).decisions[f"tiny, {gone}"]
    assert again["epochs"] == 0 and again["why"].endswith("the loss became nan: left out")


def test_a_followed_plan_does_not_decide_anew_with_more_minutes(tmp_path):
    decisions = {"a": {"epochs": 2, "last": 1.0}, "b": {"epochs": 0, "last": 0.0, "why": "no time"}}
    content = {"key": "k", "minutes": 5, "decisions": decisions, "spent": {}}
    for name in ("other.json", "mine.json"):
        (tmp_path / name).write_text(json.dumps(content))
    plan = Plan(tmp_path / "mine.json", "k", 9, tmp_path / "other.json")
    assert plan.decide("b", {"b": {}}) == decisions["b"]


def test_a_small_regression_has_folds(folder):
    found = labels.read(folder / "numbers.csv")
    few = found.subset(np.arange(6))
    assert np.bincount(search.split(few, 3, 0)).sum() == 6
    task = own.load_own(own.OwnData(str(folder / "numbers.csv")))
    task.items = [replace(item, group=item.id) for item in task.items[:15]]
    assert np.bincount(task_folds(task, 5, 0)).tolist() == [3] * 5


def test_a_backbone_pretrained_on_the_data_is_told(folder, tiny_export):
    found, backbone = labels.read(folder / "numbers.csv"), load_backbone(f"tiny={tiny_export}")
    assert run.leaked(backbone, found) == ""
    backbone.provenance = {"groups": ["p0", "p1"]}
    assert "pretrained on 2 of the 12 groups" in run.leaked(backbone, found)


# -------------------------------------------------------------------------------------------------- broken labels


def table(tmp_path, text, images=("a.png", "b.png", "c.png", "d.png")):
    for i, name in enumerate(images):
        Image.fromarray(picture(np.random.default_rng(i), 5)[0]).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "text, message",
    [
        ("path,label\na.png,x\nz.png,y\n", "z.png"),
        ("file,label\na.png,x\nb.png,y\n", "path"),
        ("path,label\na.png,x\nb.png,x\n", "one class"),
        ("path,label\na.png,1.5\nb.png,nan\n", "label"),
        ("path,label\na.png,1.5\nb.png,1.5\n", "1.5"),
        ("path,label\n", "labels.csv"),
    ],
)
def test_broken_tables_are_one_line_before_anything_long(tmp_path, text, message, monkeypatch):
    source = table(tmp_path, text)
    monkeypatch.setattr(run, "load_backbone", lambda *a: pytest.fail("the labels come first"))
    with pytest.raises(UserError, match=message) as error:
        run.run(run.FinetuneConfig(str(source), str(tmp_path / "out")))
    assert "\n" not in str(error.value)


def test_other_broken_settings_are_one_line(folder, tmp_path):
    for more, message in (
        ({"data": str(folder / "numbers.csv"), "columns": ("weight",)}, "weight"),
        ({"classes": ("small", "huge")}, "huge"),
        ({"test": str(folder / "classes")}, "are in --data too"),
        ({"folds": 1}, "folds"),
        ({"folds": 20}, "folds"),
        ({"crop": "all"}, "crop"),
        ({"data": str(tmp_path / "nowhere")}, "nowhere"),
    ):
        config = run.FinetuneConfig(**{"data": str(folder / "classes"), "out": str(tmp_path), **more})
        with pytest.raises(UserError, match=message) as error:
            run.run(config)
        assert "\n" not in str(error.value)


def test_masks_of_another_size(folder, tmp_path):
    shutil.copytree(folder / "lesions", tmp_path / "m")
    Image.fromarray(np.zeros((9, 9), bool)).save(tmp_path / "m/3_mask.png")
    with pytest.raises(LabelError, match="3_mask.png.* 9 x 9 .*40"):
        labels.read(tmp_path / "m")


def test_the_command_ends_with_one_line(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "training/finetune.py"),
        "--data",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("finetune.py: ")
