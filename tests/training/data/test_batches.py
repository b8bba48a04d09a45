"""Batches depend on (seed, stream, step) alone: not on ranks, prefetching or what was drawn before."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import cache_in_memory

from training import distributed
from training.config import Pairs
from training.data import batches

FIELDS = ("frames", "mix", "augmentation")


def cache(lengths=(9, 1, 2, 30, 7, 12, 5, 3)):
    return cache_in_memory(lengths, px=6)


def equal(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


def test_the_key_fixes_a_batch():
    clips = np.arange(8)
    first = batches.make_batch(cache(), clips, Pairs(), (3, batches.TRAIN, 5))
    assert equal(first, batches.make_batch(cache(), clips, Pairs(), (3, batches.TRAIN, 5)))
    for key in ((4, batches.TRAIN, 5), (3, batches.META, 5), (3, batches.TRAIN, 6)):
        other = batches.make_batch(cache(), clips, Pairs(), key)
        assert not any(torch.equal(getattr(first, f), getattr(other, f)) for f in FIELDS)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("augment_first", [False, True])
def test_the_ranks_share_out_the_same_batch(monkeypatch, world, augment_first):
    clips, config = np.array([5, 0, 3, 3, 6, 7, 1, 2]), Pairs(augment_first=augment_first)
    whole = batches.make_batch(cache(), clips, config, (0, batches.TRAIN, 9))
    assert whole.augmentation.shape == ((8, 2, 3, 8) if augment_first else (8, 2, 8))
    monkeypatch.setattr(distributed, "world", lambda: world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        part = distributed.share(8)
        parts += range(8)[part]
        mine = batches.make_batch(cache(), clips, config, (0, batches.TRAIN, 9), part)
        for field in FIELDS:
            assert torch.equal(getattr(mine, field), getattr(whole, field)[part])
    assert parts == list(range(8))  # in the order of the ranks


def test_frames_come_from_their_clip_and_short_clips_fall_back():
    c = cache()
    batch = batches.make_batch(c, np.arange(8), Pairs(frames=3, max_dist=4), (0, 0, 0))
    for clip, (frames, mix) in enumerate(zip(batch.frames.numpy(), batch.mix.numpy())):
        own = c.frames[c.offsets[clip] : c.offsets[clip] + c.lengths[clip]]
        numbers = [np.flatnonzero((own == f).all((1, 2))) for f in frames]
        assert all(len(n) == 1 for n in numbers)
        used = [int(n[0]) for n, w in zip(numbers, mix.sum(0)) if w > 0]
        assert used == sorted(set(used)) and used[-1] - used[0] <= 4 and len(used) == min(3, c.lengths[clip])
        np.testing.assert_allclose(mix.sum(1), 1, rtol=1e-6)
    assert batch.mix[1].tolist() == [[1, 0, 0], [1, 0, 0]]  # one frame: twice
    assert batch.mix[2].tolist() == [[1, 0, 0], [0, 1, 0]]  # two frames: as they are


def test_views_differ_only_by_augmentation_for_one_frame():
    batch = batches.make_batch(cache(), np.arange(8), Pairs(frames=1), (0, 0, 0))
    assert (batch.mix == 1).all() and batch.frames.shape == (8, 1, 6, 6)
    views = batch.views(torch.device("cpu"), 6, 3)
    assert views.shape == (16, 3, 6, 6) and not torch.equal(views[:8], views[8:])


def test_every_clip_once_an_epoch():
    clips = np.arange(100, 123)
    seen = [np.concatenate([batches.train_clips(clips, e * 5 + i, 4, 7) for i in range(5)]) for e in range(40)]
    assert all(len(set(epoch)) == 20 and set(epoch) <= set(clips) for epoch in seen)
    assert len({tuple(epoch) for epoch in seen}) == 40  # in another order each time
    counts = Counter(np.concatenate(seen).tolist())  # the incomplete end is another one each time
    assert set(counts) == set(clips) and min(counts.values()) > 20
    assert set(np.concatenate([batches.train_clips(clips, i, 23, 7) for i in range(1)])) == set(clips)
    assert not np.array_equal(batches.train_clips(clips, 0, 4, 7), batches.train_clips(clips, 0, 4, 8))


@pytest.mark.parametrize(
    "counts, balance, want",
    [
        ((40, 1000), 1, (16, 16)),
        ((90, 810), 0.5, (8, 24)),
        ((30, 90, 200), 0, (3, 9, 20)),
        ((5, 20, 200), 1, (5, 13.5, 13.5)),  # 5 are all there are
        ((2, 30), 1, (2, 30)),
    ],
)
def test_shares_of_sources(counts, balance, want):
    sources = np.repeat(np.arange(len(counts)) + 3, counts)
    clips = np.arange(len(sources)) + 100
    drawn = [batches.balanced_clips(clips, sources, balance, step, 32, 7) for step in range(400)]
    assert all(len(set(batch)) == 32 for batch in drawn)
    numbers = np.array([np.bincount(sources[batch - 100] - 3, minlength=len(counts)) for batch in drawn])
    assert np.abs(numbers - want).max() < 1 and np.abs(numbers.mean(0) - want).max() < 0.15
    first = np.concatenate([batch[:8] for batch in drawn])  # the first rank's
    assert np.abs(np.bincount(sources[first - 100] - 3) / 100 - np.array(want)).max() < 2.5
    used = Counter(np.concatenate(drawn).tolist())
    assert set(used) == set(clips)
    again = batches.balanced_clips(clips, sources, balance, 3, 32, 7)
    assert (
        np.array_equal(again, drawn[3]) and not np.array_equal(np.sort(drawn[4]), np.sort(drawn[5])) or len(clips) == 32
    )


@pytest.mark.parametrize("held_out, batch", [(3, 8), (8, 8), (20, 8), (1, 4)])
def test_meta_clips_are_balanced(held_out, batch):
    clips = np.arange(50, 50 + held_out)
    for step in range(5):
        chosen = batches.meta_clips(clips, step, batch, 0)
        counts = [int((chosen == clip).sum()) for clip in clips]
        assert len(chosen) == batch == sum(counts) and max(counts) - min(counts) <= 1
        assert np.array_equal(chosen, batches.meta_clips(clips, step, batch, 0))
    if held_out > 1:
        assert len({tuple(batches.meta_clips(clips, s, batch, 0)) for s in range(20)}) > 1


def test_prefetch_changes_nothing_and_stays_ahead():
    made = []

    def make(step):
        made.append(step)
        return batches.make_batch(
            cache(), batches.train_clips(np.arange(8), step, 4, 0), Pairs(), (0, batches.TRAIN, step)
        )

    direct = [make(step) for step in range(3, 9)]
    made.clear()
    fetching = batches.prefetch(make, range(3, 9))
    fetched = [next(fetching)]
    wait_for(lambda: len(made) >= 3)  # the first one is not yet used up
    fetched += list(fetching)
    assert made == list(range(3, 9)) and len(fetched) == 6
    assert all(equal(a, b) for a, b in zip(direct, fetched))
    assert list(batches.prefetch(make, range(0))) == []


def test_an_exception_in_make_surfaces_at_its_step():
    def make(step):
        if step == 2:
            raise KeyError("broken clip")
        return step

    fetching = batches.prefetch(make, range(5))
    assert next(fetching) == 0 and next(fetching) == 1
    with pytest.raises(KeyError, match="broken clip"):
        next(fetching)


def test_a_consumer_that_leaves_ends_the_thread():
    before = threading.active_count()
    fetching = batches.prefetch(lambda step: step, iter(int, 1))  # without an end
    next(fetching)
    assert threading.active_count() == before + 1
    fetching.close()
    wait_for(lambda: threading.active_count() == before)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
