"""What is read from a training's log about its wrong pairs, and lists of suspects, against numbers done by hand."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from training.evaluation import suspects, wrong_pairs


def log(tmp_path):
    rows = [
        {"step": 1, "loss": 1.0, "clips": [0, 1], "faults": ["", "cut"], "similarity": [0.9, 0.1], "losses": [1, 3]},
        {"step": 1, "val_loss": 2.0},
        {
            "step": 2,
            "clips": [0, 2],
            "faults": ["black", ""],
            "similarity": [0.5, 0.4],
            "losses": [4, 2],
            "weights": [0.1, 0.3],
        },
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_weights_are_relative_to_their_batch(tmp_path):
    pairs = wrong_pairs.read(log(tmp_path))
    assert pairs["weight"].tolist() == pytest.approx([1, 1, 0.5, 1.5])
    assert pairs["step"].tolist() == [1, 1, 2, 2] and pairs["fault"].tolist() == ["", "cut", "black", ""]
    assert wrong_pairs.auroc(pairs, "weight") == 0.875 and wrong_pairs.auroc(pairs, "loss") == 1
    assert wrong_pairs.auroc(wrong_pairs.only(pairs, "black"), "similarity") == 0.5
    # sum 1: 1/2, 1/2 and 1/4, 3/4
    assert wrong_pairs.effective_share(pairs) == pytest.approx((1 + 1 / (1 / 16 + 9 / 16) / 2) / 2)
    text = wrong_pairs.describe(pairs, ["a", "b", "b"])
    assert "50.0% of 4" in text and "| 2–2 | 1.000 | 0.000 | 1.000 | 0.800 | 0.500 | 0.500 | 1.500 |" in text
    longer = {name: np.concatenate([values] * 5) for name, values in pairs.items()} | {"step": np.arange(20) // 2}
    row = wrong_pairs.compare({"a": [longer, longer]}).splitlines()[-1]  # every fifth has both batches
    assert row == "| a | 2 | 0.88 0.88 0.88 0.88 0.88 | 0.875 (0.875) | 0.750 (0.750) | 1.000 (1.000) | 0.900 |"
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert wrong_pairs.read(tmp_path / "log.jsonl") is None


def test_the_parts_of_a_training_hold_every_pair_once():
    step = np.repeat(np.arange(1, 14), 3)
    parts = list(wrong_pairs.parts_of_training({"step": step}))
    assert [(first, last) for first, last, _ in parts] == [(1, 3), (4, 5), (6, 8), (9, 10), (11, 13)]
    assert np.array_equal(np.concatenate([part["step"] for *_, part in parts]), step)


def test_clips_are_ranked_by_the_mean_of_their_pairs(tmp_path):
    pairs = {
        "clip": np.array([7, 3, 7, 5, 3]),
        "fault": np.array(["", "cut", "", "", ""], object),
        "similarity": np.array([0.4, 0.5, 0.8, 0.9, 0.1]),
        "loss": np.array([1.0, 1.0, 2.0, 5.0, 1.0]),
    }
    found = suspects.by_clip(pairs)
    assert found["clip"].tolist() == [3, 5, 7] and found["pairs"].tolist() == [2, 1, 2]
    assert found["similarity"].tolist() == pytest.approx([0.3, 0.9, 0.6]) and found["fault"].tolist() == ["cut", "", ""]
    assert suspects.order(found, "similarity").tolist() == [0, 2, 1]
    assert suspects.order(found, "loss").tolist() == [1, 2, 0]
    quality = suspects.quality(found, 1)
    assert quality.keys() == {"similarity", "loss"}
    assert quality["similarity"] == {
        "precision": 1,
        "recall": 1,
        "average_precision": 1,
        "auroc": 1,
        "kinds": {"cut": 1},
    }
    assert quality["loss"]["precision"] == quality["loss"]["auroc"] == 0
    suspects.write_csv(tmp_path / "a.csv", found, [0, 2], {3: "s/x, y.mp4", 7: "z"})
    with open(tmp_path / "a.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["rank", "clip", "pairs", "similarity", "loss", "fault"],
            ["1", "s/x, y.mp4", "2", "0.30000", "1.00000", "cut"],
            ["2", "z", "2", "0.60000", "1.50000", ""],
        ]


def test_the_sheet_has_every_picture(tmp_path):
    pictures = np.arange(1, 15, dtype=np.uint8).reshape(7, 2, 1, 1).repeat(20, 2).repeat(20, 3) * 10
    suspects.write_sheet(tmp_path / "a.png", pictures, [f"clip {i}" for i in range(7)])
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (2 * 35, 5 * 46, 3) and set(range(10, 150, 10)) <= set(np.unique(sheet))
