"""What CMW-Net learned: the pairs are the training's, the statistics plain."""

import csv

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from training import explain, run
from training.data import batches, faults
from training.data.cache import FrameCache
from training.data.dataset import prepare
from training.evaluation.datasets import EvaluationError


def test_a_finished_training_is_explained(tiny, tmp_path, capsys):
    config = tiny(data={"licences": {"clips": "CC0"}})
    run.main(config)
    before = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    card = tmp_path / "CARD.md"
    card.write_text("# Card\n<!-- results:weights:begin -->\n<!-- results:weights:end -->\n")
    text = explain.main(config.out, batches=3, model_card=card)
    assert "| all | 12 |" in text and "| clips | 12 |" in text and text in card.read_text()
    assert (tmp_path / "run" / "figures" / "explain.png").stat().st_size > 5000
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(v, after["encoder"][k]) for k, v in before["encoder"].items())
    with pytest.raises(EvaluationError, match="holds no training"):
        explain.main(tmp_path)


def test_a_training_without_a_cmw_net(tiny):
    config = tiny(method="simclr", optim={"steps": 1})
    run.main(config)
    with pytest.raises(EvaluationError, match="was trained by simclr"):
        explain.main(config.out)
    with pytest.raises(EvaluationError, match="has no weights: --by similarity or loss"):
        explain.find_suspects(config.out, by="weight")
    assert "| 1 | clips/" in explain.find_suspects(config.out)


@pytest.mark.parametrize("statistics", ["representation", "statistics"])
def test_suspects_of_a_training_with_planted_faults(tiny, tmp_path, statistics):
    config = tiny(pairs={"corrupt": 0.4}, meta={"input": statistics}, optim={"steps": 6})
    run.main(config)
    text = explain.find_suspects(config.out, count=5, by="similarity")
    out = tmp_path / "run"
    with open(out / "suspects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == list("12345")
    similarity = [float(row["similarity"]) for row in rows]
    assert similarity == sorted(similarity) and all(int(row["pairs"]) >= 10 for row in rows)
    cache = FrameCache.open(config.data.cache)
    assert {row["clip"] for row in rows} < set(cache.ids) and rows[0]["clip"] in text
    clips = prepare(config, out)
    planted = faults.plant(clips.cache, clips.train, config.pairs, config.seed).kinds
    assert f"{len(planted)} of 20 clips have planted faults" in text
    assert all(row["fault"] == planted.get(cache.ids.index(row["clip"]), "") for row in rows)
    assert "precision at 5" in text and (out / "figures" / "suspects.png").stat().st_size > 1000
    assert "Pairs made wrong on purpose" in explain.main(config.out, batches=2)


def test_distances_are_those_of_the_frames_in_the_batch(demo):
    from training.config import Pairs

    cache, clips, key = FrameCache.open(demo / "cache"), np.arange(8), (0, batches.EXPLAIN, 0)
    numbers, mix = batches.choose(cache, clips, Pairs(), np.random.default_rng(key))
    batch = batches.make_batch(cache, clips, Pairs(), key)
    assert np.array_equal(batch.mix.numpy(), mix)
    for clip, chosen, frames in zip(clips, numbers, batch.frames.numpy()):
        assert np.array_equal(cache.clip(clip)[chosen], frames)


def test_the_correlation_is_spearmans_and_its_draws_are_of_groups():
    rng = np.random.default_rng(0)
    x, groups = rng.normal(size=60), np.repeat(np.arange(12), 5)
    y = x + rng.normal(size=60)
    estimate = explain.correlation(x, y, groups)
    assert estimate.value == pytest.approx(spearmanr(x, y).statistic)
    assert estimate.low < estimate.value < estimate.high and estimate.high - estimate.low < 0.8
    from scipy.stats import rankdata

    counts = explain.intervals.draw_groups(12, explain.DRAWS, 0)
    for i in range(5):  # a draw is Pearson's correlation of the ranks with the groups' rows repeated
        rows = np.repeat(np.arange(60), counts[i][groups])
        expected = np.corrcoef(rankdata(x)[rows], rankdata(y)[rows])[0, 1]
        assert estimate.draws[i] == pytest.approx(expected)
    assert np.isnan(explain.correlation(np.ones(60), y, groups).value)
