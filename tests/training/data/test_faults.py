"""Pairs made wrong on purpose: which ones, how, the same for every number of ranks, and as the log says."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import cache_in_memory

from training import run
from training.config import Pairs
from training.data import batches, faults
from training.data.cache import FrameCache
from uscl_hub.errors import UserError

KEY = (3, batches.TRAIN, 5)


def cache(n=20, sources=2):
    made = cache_in_memory([6] * n, px=6, sources=sources)
    return made


def planted(c, share=1.0, **options):
    return faults.plant(c, np.arange(len(c)), Pairs(corrupt=share, **options), seed=0)


def test_the_share_of_clips_and_its_kinds_in_turn():
    assert planted(cache(), 0.0) is None
    some = planted(cache(), 0.5)
    assert Counter(some.kinds.values()) == dict.fromkeys(faults.KINDS, 2)
    assert (
        some.kinds == planted(cache(), 0.5).kinds != faults.plant(cache(), np.arange(20), Pairs(corrupt=0.5), 1).kinds
    )
    assert "cut" not in planted(cache(sources=1)).kinds.values()
    train = np.arange(5, 15)  # partners are training clips, too
    one = faults.plant(cache(), train, Pairs(corrupt=1), 0)
    assert set(one.kinds) == set(train)
    assert all(set(pool) < set(train) for pool in (*one.others.values(), *one.foreign.values()))


@pytest.mark.parametrize("mode", ["standard", "inner"])
@pytest.mark.parametrize("frames", [2, 3, 5])
def test_what_each_kind_does_to_the_second_view(mode, frames):
    c, clips, config = cache(), np.arange(20), Pairs(frames=frames, mode=mode)
    wrong = planted(c)
    right, spoilt = (batches.make_batch(c, clips, config, KEY, faults=f) for f in (None, wrong))
    assert spoilt.faults == [wrong.kinds[i] for i in range(20)] and right.faults is None
    assert torch.equal(right.augmentation, spoilt.augmentation)
    assert all(torch.equal(a, b) for a, b in zip(right.about, spoilt.about))  # as an index of files would say it

    def view(batch, i, number):
        return torch.einsum("k,khw->hw", batch.mix[i, number], batch.frames[i].float())

    for i, kind in enumerate(spoilt.faults):
        torch.testing.assert_close(spoilt.mix[i].sum(1), torch.ones(2))
        own = c.frames[c.offsets[i] : c.offsets[i] + 6]
        first = spoilt.frames[i][spoilt.mix[i, 0] > 0].numpy()
        assert all((own == frame).all((1, 2)).any() for frame in first)  # the first view is of the clip
        partner = view(spoilt, i, 1)
        at = np.flatnonzero((c.frames == partner.numpy()).all((1, 2))) // 6  # the clip that the partner is from
        if kind == "frozen":
            torch.testing.assert_close(partner, view(spoilt, i, 0))
        elif kind == "black":
            assert not partner.any()
        elif kind == "noise":
            assert not len(at) and len(partner.unique()) > 20
        else:
            assert len(at) == 1 and at[0] != i and (c.sources[at[0]] == c.sources[i]) == (kind == "clip")


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_out_the_same_faults(world):
    c, clips, wrong = cache(), np.arange(8), planted(cache(), 0.6, corrupt_often=0.7)
    whole = batches.make_batch(c, clips, Pairs(), KEY, faults=wrong)
    assert 0 < sum(map(bool, whole.faults)) < 8
    for rank in range(world):
        part = slice(rank * 8 // world, (rank + 1) * 8 // world)
        mine = batches.make_batch(c, clips, Pairs(), KEY, part, wrong)
        assert torch.equal(mine.frames, whole.frames[part]) and torch.equal(mine.mix, whole.mix[part])
        assert mine.faults == whole.faults


def test_as_often_as_said():
    c, wrong = cache(), planted(cache(), 1.0, corrupt_often=0.25)
    done = [batches.make_batch(c, np.arange(20), Pairs(), (0, 0, step), faults=wrong).faults for step in range(50)]
    assert np.mean([bool(f) for row in done for f in row]) == pytest.approx(0.25, abs=0.05)


def test_a_training_logs_its_faults_and_others_do_not(tiny, tmp_path):
    config = tiny(method="uscl", pairs={"corrupt": 0.5}, optim={"steps": 6})
    run.main(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert {len(row[key]) for row in rows for key in ("clips", "faults", "similarity", "losses")} == {4}
    assert rows[0]["loss"] == pytest.approx(np.mean(rows[0]["losses"]), abs=1e-4)
    kinds = {}
    for row in rows:
        for clip, kind in zip(row["clips"], row["faults"]):
            assert kinds.setdefault(clip, kind) == kind  # corrupt_often is 1: the clip's
    wrong = [clip for clip, kind in kinds.items() if kind]
    assert 0 < len(wrong) < len(kinds)
    assert len(FrameCache.open(config.data.cache)) >= len(kinds)


@pytest.mark.parametrize("changes", [{"method": "simclr"}, {"pairs": {"frames": 1, "corrupt": 0.1}}])
def test_one_frame_twice_has_no_partner_to_replace(tiny, changes):
    with pytest.raises((UserError, SystemExit), match="pairs.corrupt: takes method uscl or meta_uscl"):
        run.main(tiny(**{"pairs": {"corrupt": 0.1}, **changes}))
