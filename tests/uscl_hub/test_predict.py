"""A fine-tuned model on files: tables of all kinds of tasks, resumed, by onnxruntime, and what it refuses."""

import csv
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import onnxruntime  # noqa: F401  (of the extra [test]: --onnx must not be skipped in silence)
import pyarrow.parquet as pq
import pytest
import timm
import torch
from helpers import interrupted
from PIL import Image
from safetensors.torch import load_file, save_file

import uscl_hub
from uscl_hub import cli, predict
from uscl_hub.checkpoints import CheckpointError
from uscl_hub.classifier import Meaning, check_export, read_meaning
from uscl_hub.errors import UserError
from uscl_hub.files import sha256
from uscl_hub.unet import UNet

LABELS = {"classification": ["benign", "malignant", "normal"], "multilabel": ["cyst", "stone"], "regression": ["area"]}


def export(folder, kind, **about):
    """A folder as training/finetune.py writes it, with random weights."""
    folder.mkdir()
    torch.manual_seed(0)
    labels = LABELS.get(kind, ["lesion"])
    model = timm.create_model("test_resnet", num_classes=len(labels))
    cfg = {**model.pretrained_cfg, "input_size": [3, 64, 64], "mean": [0.2] * 3, "std": [0.3] * 3}
    cfg |= {"num_classes": len(labels), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    if kind == "segmentation":
        model = UNet(timm.create_model("test_resnet", features_only=True))
    save_file(model.state_dict(), folder / "model.safetensors")
    own = {"method": "finetune", "task": kind, "label_names": labels, "temperature": 2.0, "crop": "none", "rate": 3.0}
    own |= {"sha256": sha256(folder / "model.safetensors"), "target_mean": [5.0], "target_std": [2.0], **about}
    keep = (
        "input_size",
        "mean",
        "std",
        "num_classes",
        "interpolation",
        "crop_pct",
        "crop_mode",
        "first_conv",
        "classifier",
    )
    config = {"architecture": "test_resnet", "num_classes": len(labels), "num_features": 64, "label_names": labels}
    config |= {"pretrained_cfg": {k: cfg[k] for k in keep}, "uscl_hub": own}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {task: export(root / task, task) for task in (*LABELS, "segmentation")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three images and an animated gif of 9 frames, 30 a second."""
    root, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (50 + i, 70), np.uint8)).save(root / f"image{'abc'[i]}.png")
    frames = [Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)) for _ in range(9)]
    frames[0].save(root / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    return root


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def logits_of(folder, image):
    model, transform, _ = uscl_hub.load_classifier(folder)
    with torch.inference_mode():
        return model(transform(image)[None])[0].double()


def test_classes(models, files, tmp_path):
    folder = models["classification"]
    report = predict.predict(folder, [files], tmp_path / "p.csv", progress=False)
    rows = rows_of(tmp_path / "p.csv")
    assert report["rows"] == len(rows) == 4 and report["failed"] == []
    assert list(rows[0]) == [
        *("path", "clip", "frame", "frames", "p_benign", "p_malignant", "p_normal", "label", "entropy")
    ]
    row = next(row for row in rows if row["path"].endswith("imagea.png"))
    want = torch.softmax(logits_of(folder, Image.open(files / "imagea.png")) / 2.0, 0)
    p = torch.tensor([float(row[f"p_{name}"]) for name in LABELS["classification"]], dtype=torch.float64)
    assert torch.allclose(p, want, atol=1e-6) and row["label"] == LABELS["classification"][int(want.argmax())]
    assert float(row["entropy"]) == pytest.approx(float(-(want * want.log()).sum()), abs=1e-5)
    assert json.loads((tmp_path / "p.csv.report.json").read_text())["rows"] == 4
    assert not (tmp_path / "p.csv.partial").exists()


def test_a_clip_is_the_mean_of_its_frames_at_the_rate_of_training(models, files, tmp_path):
    folder = models["classification"]
    predict.predict(folder, [files / "clip.gif"], tmp_path / "clip.csv", progress=False)
    predict.predict(folder, [files / "clip.gif"], tmp_path / "frame.parquet", per="frame", progress=False)
    (whole,), frames = rows_of(tmp_path / "clip.csv"), pq.read_table(tmp_path / "frame.parquet").to_pylist()
    assert [row["frame"] for row in frames] == list(range(9)) and whole["frames"] == "3"  # 10 a second, of which 3
    for name in LABELS["classification"]:
        assert float(whole[f"p_{name}"]) == pytest.approx(np.mean([row[f"p_{name}"] for row in frames[::3]]), abs=1e-9)


def test_several_labels_and_numbers(models, files, tmp_path):
    image = Image.open(files / "imageb.png")
    predict.predict(models["multilabel"], [files / "imageb.png"], tmp_path / "m.csv", progress=False)
    (row,) = rows_of(tmp_path / "m.csv")
    want = torch.sigmoid(logits_of(models["multilabel"], image) / 2.0)
    assert [float(row["p_cyst"]), float(row["p_stone"])] == pytest.approx(want.tolist(), abs=1e-6)
    predict.predict(models["regression"], [files / "imageb.png"], tmp_path / "r.csv", progress=False)
    (row,) = rows_of(tmp_path / "r.csv")
    assert float(row["area"]) == pytest.approx(float(logits_of(models["regression"], image)) * 2 + 5, abs=1e-5)


def test_masks_have_the_size_of_the_file(models, files, tmp_path):
    predict.predict(models["segmentation"], [files / "imagec.png"], tmp_path / "s.csv", progress=False)
    (row,) = rows_of(tmp_path / "s.csv")
    mask = np.asarray(Image.open(tmp_path / "s_masks" / row["mask"]))
    assert Image.open(tmp_path / "s_masks.png").size == (predict.TILE, predict.TILE)
    assert mask.shape == (52, 70) and set(np.unique(mask)) <= {0, 255}
    assert float(row["area"]) == pytest.approx((mask > 0).mean())
    logits = logits_of(models["segmentation"], Image.open(files / "imagec.png"))
    assert abs((mask > 0).mean() - float((logits > 0).double().mean())) < 0.05


def test_masks_are_made_of_every_frame_and_never_of_masks(models, files, tmp_path, monkeypatch):
    scans = shutil.copytree(files, tmp_path / "scans")
    command = models["segmentation"], [scans], scans / "s.csv"
    monkeypatch.setattr(predict, "write_whole", interrupted(predict.write_whole, call=11))
    monkeypatch.setattr(predict, "BATCH", 1)
    with pytest.raises(KeyboardInterrupt):  # pictures lie in s.csv.partial
        predict.predict(*command, progress=False)
    assert list((scans / "s.csv.partial").rglob("*.png"))
    for _ in range(2):  # the second time s_masks and s_masks.png are there
        predict.predict(*command, progress=False)
        rows = rows_of(scans / "s.csv")
        assert [row["frame"] for row in rows] == [*map(str, range(9)), "0", "0", "0"]
        assert {Path(row["path"]).parent for row in rows} == {scans}


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_long_clip_is_in_several_batches(models, files, tmp_path, monkeypatch, task):
    """What the model says of a batch is never held longer than the batch: masks are large."""
    sizes = []

    def say(self, logits, original=Meaning.say):
        sizes.append(len(logits))
        return original(self, logits)

    monkeypatch.setattr(Meaning, "say", say)
    tables = []
    for batch in (64, 4):
        monkeypatch.setattr(predict, "BATCH", batch)
        predict.predict(models[task], [files], tmp_path / f"{batch}.csv", per="frame", progress=False)
        tables.append(rows_of(tmp_path / f"{batch}.csv"))
    assert sizes == [12, 4, 4, 4]  # 9 frames and 3 images
    for whole, cut in zip(*tables, strict=True):
        assert (whole["path"], whole["frame"]) == (cut["path"], cut["frame"])
        name = "area" if task == "segmentation" else "p_benign"
        assert float(whole[name]) == pytest.approx(float(cut[name]), abs=1e-3 if task == "segmentation" else 1e-6)


def test_a_name_that_is_not_utf_8(models, files, tmp_path):
    odd = os.fsencode(tmp_path) + b"/M\xfcller.png"
    try:
        shutil.copy(files / "imagea.png", odd)
    except OSError:
        pytest.skip("the file system takes names of UTF-8 only")
    for output in ("p.csv", "p.parquet"):
        predict.predict(models["classification"], [tmp_path], tmp_path / output, progress=False)
    assert rows_of(tmp_path / "p.csv")[0]["path"].endswith("/M\\xfcller.png")
    assert pq.read_table(tmp_path / "p.parquet").to_pylist()[0]["path"].endswith("/M\\xfcller.png")


@pytest.mark.parametrize("crop", ["crop", "blank"])
def test_the_transform_crops_as_predict_does(tmp_path, crop):
    folder, black = export(tmp_path / "model", "classification", crop=crop), np.full((120, 160), 3, np.uint8)
    black[30:90, 40:120] = np.random.default_rng(0).integers(60, 255, (60, 80))
    Image.fromarray(black).save(tmp_path / "bordered.png")
    predict.predict(folder, [tmp_path / "bordered.png"], tmp_path / "p.csv", progress=False)
    (row,) = rows_of(tmp_path / "p.csv")
    model, transform, labels = uscl_hub.load_classifier(folder)
    x = pickle.loads(pickle.dumps(transform))(Image.open(tmp_path / "bordered.png"))
    with torch.inference_mode():
        p = torch.softmax(model(x[None])[0].double() / 2.0, 0).tolist()
    assert p == pytest.approx([float(row[f"p_{name}"]) for name in labels], abs=1e-6)
    uncropped = uscl_hub.create_transform({"input_size": [3, 64, 64], "mean": [0.2] * 3, "std": [0.3] * 3})
    assert not torch.equal(x, uncropped(Image.open(tmp_path / "bordered.png")))


def test_a_unet_can_be_verified(models, tmp_path, capsys):
    folder = export(tmp_path / "model", "segmentation", decoder="unet")
    assert cli.main(["verify", str(folder)]) == 0
    weights = load_file(folder / "model.safetensors")
    weights["decoder.head.bias"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors")
    assert cli.main(["verify", str(folder)]) == 1
    assert "model.safetensors" in capsys.readouterr().err


def test_onnx_gives_equal_numbers(files, tmp_path):
    from training.tuning.export import write_onnx

    folder = export(tmp_path / "model", "classification")
    with pytest.raises(UserError, match="model.onnx: is missing"):
        predict.predict(folder, [files], tmp_path / "o.csv", onnx=True, progress=False)
    write_onnx(folder, uscl_hub.load_classifier(folder)[0], 64)
    predict.predict(folder, [files], tmp_path / "o.csv", onnx=True, progress=False)
    predict.predict(folder, [files], tmp_path / "t.csv", progress=False)
    for ours, theirs in zip(rows_of(tmp_path / "t.csv"), rows_of(tmp_path / "o.csv"), strict=True):
        assert ours["path"] == theirs["path"]
        for name in LABELS["classification"]:
            assert float(ours[f"p_{name}"]) == pytest.approx(float(theirs[f"p_{name}"]), abs=predict.TOLERANCE)


def test_interrupted_it_goes_on(models, tmp_path, monkeypatch):
    whole, files = tmp_path / "whole.csv", tmp_path / "scans"
    files.mkdir()
    for name in "abcdefghijklmnop":
        Image.fromarray(np.random.default_rng(ord(name)).integers(0, 255, (50, 70), np.uint8)).save(
            files / f"{name}.png"
        )
    predict.predict(models["classification"], [files], whole, progress=False)

    monkeypatch.setattr(predict, "read_clip", interrupted(predict.read_clip, call=15))
    monkeypatch.setattr(predict, "BATCH", 1)  # a clip a batch: what waits for its batch is not finished
    with pytest.raises(KeyboardInterrupt):
        predict.predict(models["classification"], [files], tmp_path / "p.csv", progress=False)
    log = tmp_path / "p.csv.partial" / "clips.jsonl"
    assert not (tmp_path / "p.csv").exists() and 1 <= len(log.read_text().splitlines()) <= 14
    with open(log, "a") as file:
        file.write('{"id": "cut')  # killed while it wrote
    with pytest.raises(ValueError, match="interrupted run of another model, --per or --onnx"):
        predict.predict(models["classification"], [files], tmp_path / "p.csv", per="frame", progress=False)
    calibrated = shutil.copytree(models["classification"], tmp_path / "calibrated")  # the same weights
    config = (calibrated / "config.json").read_text()
    (calibrated / "config.json").write_text(config.replace('"temperature": 2.0', '"temperature": 3.0'))
    with pytest.raises(ValueError, match="interrupted run of another model"):
        predict.predict(calibrated, [files], tmp_path / "p.csv", progress=False)
    report = predict.predict(models["classification"], [files], tmp_path / "p.csv", progress=False)
    assert report["computed"] < 16
    for row, expected in zip(
        rows_of(tmp_path / "p.csv"), rows_of(whole), strict=True
    ):  # in their order, and all of them
        assert row["path"] == expected["path"] and row["label"] == expected["label"]
        assert float(row["entropy"]) == pytest.approx(float(expected["entropy"]), abs=1e-5)


def test_what_cannot_be_read_is_named_and_passed_over(models, files, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "letter.docx").write_bytes(b"text")
    given = [str(files / "imagea.png"), str(tmp_path / "broken.png"), str(tmp_path / "letter.docx")]
    assert cli.main(["predict", str(models["classification"]), *given, "-o", str(tmp_path / "p.csv")]) == 0
    shown = capsys.readouterr().out
    assert "1 rows of 1 clips" in shown and "broken.png" in shown and "letter.docx" in shown
    assert cli.main(["predict", str(models["classification"]), given[1], "-o", str(tmp_path / "q.csv")]) == 1
    assert "nothing could be read" in capsys.readouterr().err and not (tmp_path / "q.csv.partial").exists()


@pytest.mark.parametrize(
    "about, message",
    [
        ({"task": "poetry"}, "it has no task"),
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"temperature": "warm"}, "temperature must be a number above 0"),
        ({"label_names": "abc"}, "label_names must be a list"),
        ({"label_names": ["benign", "malignant"]}, "num_classes is 3, but uscl_hub.label_names has 2 names"),
        ({"crop": "no"}, "crop must be"),
        ({"rate": -1}, "rate must be"),
    ],
)
def test_models_that_are_none_are_one_line(files, tmp_path, about, message, capsys):
    folder = export(tmp_path / "model", "classification", **about)
    with pytest.raises(CheckpointError, match=message):
        read_meaning(folder)
    with pytest.raises(CheckpointError, match=message):  # of uscl-hub verify and push
        check_export(folder)
    assert cli.main(["predict", str(folder), str(files), "-o", str(tmp_path / "p.csv")]) == 1
    error = capsys.readouterr().err
    assert message.split(" must")[0] in error and error.count("\n") == 1


def test_weights_of_another_network_are_refused(tmp_path):
    folder = export(tmp_path / "model", "segmentation")
    config = json.loads((folder / "config.json").read_text())
    config["uscl_hub"]["task"] = "classification"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        uscl_hub.load_classifier(folder)
    other = export(tmp_path / "other", "classification", task="segmentation")
    with pytest.raises(CheckpointError):
        uscl_hub.load_classifier(other)


def test_wrong_arguments(models, files, tmp_path):
    for arguments, message in (({"per": "week"}, "per is 'week'"), ({"device": "abacus"}, "abacus")):
        with pytest.raises(ValueError, match=message):
            predict.predict(models["classification"], [files], tmp_path / "p.csv", progress=False, **arguments)
    with pytest.raises(ValueError, match="written as one of .csv, .parquet"):
        predict.predict(models["classification"], [files], tmp_path / "p.xlsx", progress=False)
    assert not list(tmp_path.iterdir())
