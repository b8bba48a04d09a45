"""The ablation driver on simulated clips: arms, equal settings, resumption, one table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from training import ablate, run
from training import config as configs
from training import evaluate as evaluation
from training.ablate import AblateConfig
from training.evaluation.datasets import EvaluationError

ARMS = ("random", "simclr", "meta_uscl/inner/2")
CONFIGS = Path(ablate.__file__).parent / "configs"


@pytest.fixture
def config(tiny, downstream, tmp_path):
    data = {"data": str(downstream), "blues": str(downstream / "covid_blues")}
    tasks = evaluation.EvaluateConfig(tasks=("busi",), protocols=("knn",), folds=2, draws=50, device="cpu", **data)
    return AblateConfig(ARMS, (0, 1), str(tmp_path / "ablation"), tiny(optim={"steps": 2}), tasks)


@pytest.mark.slow
def test_every_arm_is_trained_and_evaluated_once(config, monkeypatch, capsys):
    trained, main = [], run.main

    def spy(one):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((one.method, one.pairs.mode, one.pairs.frames, one.seed, one.optim.steps))
        main(one)

    monkeypatch.setattr(run, "main", spy)
    with pytest.raises(KeyboardInterrupt):
        ablate.main(config)
    monkeypatch.setattr(run, "main", lambda one: (trained.append(one.seed), main(one)))
    table = ablate.main(config).read_text()
    assert trained == [
        ("simclr", "standard", 3, 0, 2),
        ("simclr", "standard", 3, 1, 2),
        ("meta_uscl", "inner", 2, 0, 2),
        1,
    ]

    folder = Path(config.out)
    result = json.loads((folder / "evaluation" / "results.json").read_text())
    assert list(result["backbones"]) == list(ARMS) and all(len(b["sha"]) == 2 for b in result["backbones"].values())
    assert result["backbones"]["simclr"]["provenance"]["method"] == "simclr"
    lines = table.split("\n\n")[2].splitlines()
    assert [line.split(" | ")[0:2] for line in lines[2:]] == [["| random", "0"], *([f"| {a}", "2"] for a in ARMS[1:])]
    value = next(r for r in result["results"] if r["backbone"] == "simclr")["metrics"]["macro-F1"]["value"]
    assert f"{100 * value:.1f} [" in lines[3] and "kNN, 100% of labels: macro-F1" in lines[0]

    monkeypatch.setattr(run, "main", None)  # nothing is trained again
    assert ablate.main(config).read_text() == table
    config.train.optim.steps = 3
    with pytest.raises(EvaluationError, match="simclr-0: holds a training with other settings"):
        ablate.main(config)


def test_a_stopped_training_ends_the_run_with_what_to_do(config, monkeypatch):
    monkeypatch.setattr(run, "main", lambda one: None)  # as after a SIGTERM
    with pytest.raises(EvaluationError, match="start it again to go on"):
        ablate.main(config)


@pytest.mark.parametrize(
    "arm",
    [
        "uscl",
        "uscl/standard",
        "uscl/middle/3",
        "uscl/inner/x",
        "simclr/inner/3",
        "moco",
        "uscl/inner/0",
        "uscl/inner/3/delayed",
        "meta_uscl/inner/3/distance",
        "meta_uscl/inner/3/corrupt",
        "meta_uscl/inner/3/corrupt101",
        "meta_uscl/inner/3/every0",
        "meta_uscl/inner/3/depth0",
        "uscl/inner/3/depth1",
        "simclr/corrupt10",
        "meta_uscl/inner/3/every2/shuffled",
    ],
)
def test_an_unknown_arm_is_refused(config, arm):
    with pytest.raises(EvaluationError, match=f"arms: '{arm}' is not"):
        ablate.main(replace(config, arms=("random", arm)))


def test_options_and_the_control_are_arms_of_their_own(config):
    settings = [ablate.training(config, f"meta_uscl/standard/3/{v}", 0) for v in ("delayed", "every4", "shuffled")]
    assert [(s.meta.delayed, s.meta.every, s.meta.shuffle) for s in settings] == [
        (True, 1, False),
        (False, 4, False),
        (False, 1, True),
    ]
    assert {(s.method, s.pairs.mode, s.pairs.frames) for s in settings} == {("meta_uscl", "standard", 3)}
    assert ablate.training(config, "meta_uscl/standard/3/depth1/corrupt20", 0).meta.depth == 1
    one = ablate.training(config, "meta_uscl/inner/3/statistics/by_source/corrupt40", 0)
    assert (one.meta.input, one.meta.by_source, one.pairs.corrupt) == ("statistics", True, 0.4)
    assert ablate.training(config, "uscl/inner/3/distance", 0).loss.weights == "distance"
    fair = configs.load(AblateConfig, CONFIGS / "fair_test.yaml")
    assert len({ablate.training(fair, arm, 0).out for arm in fair.arms}) == len(fair.arms)


def test_the_table_says_what_the_weights_did_with_wrong_pairs(config):
    assert ablate.wrong({}) == ""
    config.train.optim.steps = 5
    one = ablate.training(config, "meta_uscl/standard/3/corrupt50", 0)
    run.main(one)
    text = ablate.wrong({("some arm", 0): one})
    assert "| some arm | 1 | " in text and "finds the pairs made wrong on purpose" in text


def test_what_cannot_be_evaluated_is_said_before_the_training(config, tmp_path):
    config.train.data.roots = ()
    with pytest.raises(EvaluationError, match="train.data.roots: name the folders"):
        ablate.main(config)
    config.evaluate.data = str(tmp_path)
    with pytest.raises(EvaluationError, match="no such folder"):
        ablate.main(replace(config, arms=("random",)))
    assert not Path(config.out).exists()


def test_the_table_marks_only_differences_whose_interval_excludes_0():
    def row(backbone):
        metrics = {"macro-F1": {"value": 0.5, "low": 0.4, "high": 0.6}}
        return {
            "task": "busi",
            "backbone": backbone,
            "protocol": "knn",
            "fraction": 1.0,
            "level": "image",
            "metrics": metrics,
        }

    def difference(backbone, verdict, metric="macro-F1"):
        return {**row(backbone), "against": "random", "metric": metric, "verdict": verdict}

    result = {
        "backbones": {name: {"provenance": {"steps": 7}} for name in ("random", "a", "b", "c")},
        "tasks": {"busi": {"title": "BUSI"}},
        "config": {"seeds": [0]},
        "results": [row(name) for name in ("random", "a", "b")],
        "differences": [
            difference("a", "better"),
            difference("b", "no difference shown"),
            difference("b", "worse", "AUROC"),
        ],
    }
    lines = ablate.table(result).splitlines()[-4:]
    assert [line.split(" | ")[2] for line in lines] == [
        "50.0 [40.0, 60.0] |",
        "50.0 [40.0, 60.0] ▲ |",
        "50.0 [40.0, 60.0] |",
        "– |",
    ]


def test_the_shipped_list_is_the_paper_s():
    config = configs.load(AblateConfig, CONFIGS / "ablation.yaml")
    settings = {arm: ablate.training(config, arm, 0) for arm in config.arms if arm != "random"}
    assert config.arms[0] == "random" and {c.method for c in settings.values()} == {"simclr", "uscl", "meta_uscl"}
    assert {c.pairs.frames for c in settings.values() if c.method == "meta_uscl"} == {1, 2, 3, 5}
    assert {c.pairs.mode for c in settings.values()} == {"standard", "inner"}
    assert len({c.optim.steps for c in settings.values()}) == 1 and len(config.seeds) == 3
