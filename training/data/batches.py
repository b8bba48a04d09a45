"""Batches of pairs from the frame cache: which clips, which frames, which random numbers at which step.

All randomness is a function of (seed, stream, step): nothing has a state, so that a resumed run, another number of
ranks or a prefetching thread sees the very same batches (of a distillation's crops, see engine/distil.py).
"""

import queue
import threading
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from training.config import Pairs
from training.method import augment, pairs
from training.method.weighting import About

TRAIN, META, VAL, ORDER, EXPLAIN, DISTIL = range(6)  # random streams


@dataclass
class Batch:
    """One rank's share of a batch, on the CPU. `views(device, ...)` makes the images on the device."""

    frames: torch.Tensor  # uint8 (n, K, S, S)
    mix: torch.Tensor  # float32 (n, 2, K)
    augmentation: torch.Tensor  # float32 (n, 2, 8) or (n, 2, K, 8)
    about: About  # of the global batch's pairs
    faults: list[str] | None = None  # of the global batch's pairs, see `faults.Faults`

    def views(self, device, size, channels):
        tensors = (self.frames, self.mix, self.augmentation)
        if device.type == "cuda":
            tensors = (t.pin_memory().to(device, non_blocking=True) for t in tensors)
        return pairs.make_views(*tensors, size, channels)


def make_batch(cache, clips, config: Pairs, key, part=slice(None), faults=None):
    """Draw the pairs of a batch.

    Args:
        cache: `cache.FrameCache`.
        clips: indices of the global batch's clips.
        config: how to make pairs.
        key: ints (seed, stream, step) that fix every random number.
        part: the slice of the batch to load: a rank's share. The random numbers are those of the global batch.
        faults: `faults.Faults` to make, or None.
    """
    rng = np.random.default_rng(key)
    numbers, mix = choose(cache, clips, config, rng)
    shape = (len(clips), 2, config.frames) if config.augment_first else (len(clips), 2)
    augmentation = augment.draw(
        shape, rng, config.crop_scale, config.crop_ratio, config.jitter, config.flip, config.rotate
    )
    about = About(
        distance=torch.from_numpy((numbers.max(1) - numbers.min(1)).astype(np.float32)),
        reach=torch.tensor([min(furthest(cache, clip, config), int(cache.lengths[clip]) - 1) for clip in clips]),
        source=torch.from_numpy(cache.source_numbers[np.asarray(clips)].astype(np.int64)),
    )
    frames, mix = cache.take(np.asarray(clips)[part], numbers[part]), mix[part]
    done = None if faults is None else faults.spoil(cache, clips, key, part, (frames, mix))
    return Batch(*map(torch.from_numpy, (frames, mix, augmentation[part])), about, done)


def furthest(cache, clip, config: Pairs):
    """Largest distance in kept frames between the frames of a pair that the settings allow for a clip's rate."""
    if config.max_seconds and cache.fps[clip] > 0:  # an unknown rate is NaN
        return min(config.max_dist, max(1, int(config.max_seconds * cache.fps[clip])))
    return config.max_dist


def choose(cache, clips, config: Pairs, rng):
    """Frame numbers int64 (n, K) and convex weights float32 (n, 2, K) of a pair of each clip.

    Where a clip has fewer frames than K, they are repeated, with the weight 0.
    """
    k = config.frames
    mix = np.zeros((len(clips), 2, k), np.float32)
    chosen = np.zeros((len(clips), k), np.int64)
    for i, clip in enumerate(clips):
        numbers = pairs.choose_frames(int(cache.lengths[clip]), k, furthest(cache, clip, config), rng)
        weights = pairs.mixing_weights(len(numbers), config.mode, config.alpha, config.beta, rng)
        mix[i, :, : len(numbers)] = weights
        chosen[i] = np.resize(numbers, k)
    return chosen, mix


def train_clips(clips, step, batch, seed):
    """The clips of step `step`: each epoch is a fresh random order of all clips; its incomplete end is left out."""
    epoch, i = divmod(step, len(clips) // batch)
    return clips[epoch_order(len(clips), seed, epoch)[i * batch : (i + 1) * batch]]


def balanced_clips(clips, sources, balance, step, batch, seed):
    """The clips of step `step`, each at most once in it, in a random order.

    A source's share of them, on average over the steps, follows its clips ** (1 - balance). One that has fewer clips
    than that gives them all, and the others share what is left.
    """
    _, of, counts = np.unique(sources, return_inverse=True, return_counts=True)
    shares, free = counts ** (1 - float(balance)), np.full(len(counts), True)
    wanted = batch * shares / shares.sum()
    while (over := free & (wanted > counts + 1e-9)).any():
        free &= ~over
        left = batch - counts[~free].sum()
        wanted = np.where(free, left * shares / shares[free].sum(), counts)
    rng = np.random.default_rng((seed, TRAIN, step, ORDER))
    ends = np.floor(np.cumsum(wanted) + rng.random()).astype(int)  # whole numbers that are right on average
    ends[-1] = batch
    numbers = np.diff(ends, prepend=0)
    chosen = [rng.choice(np.flatnonzero(of == i), n, replace=False) for i, n in enumerate(numbers)]
    return clips[rng.permutation(np.concatenate(chosen))]


@lru_cache(maxsize=1)
def epoch_order(n, seed, epoch):
    return np.random.default_rng((seed, ORDER, epoch)).permutation(n)


def meta_clips(clips, step, batch, seed):
    """`batch` random held-out clips; each as often as any other when there are fewer clips than that."""
    rng = np.random.default_rng((seed, META, step, ORDER))
    rounds = [rng.permutation(len(clips)) for _ in range(-(-batch // len(clips)))]
    return clips[np.concatenate(rounds)[:batch]]


def prefetch(make, steps, depth=2):
    """Yield make(step) for every step, prepared by a thread while the caller computes.

    Reading a memory-mapped cache and drawing random numbers is little work: one thread is ahead of any step. An
    exception in `make` is raised here.
    """
    ready, stop = queue.Queue(depth), threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work():
        try:
            for step in steps:
                if stop.is_set():
                    return
                put((make(step), None))
        except BaseException as error:  # handed over to the consumer
            put((None, error))
        else:
            put((None, StopIteration()))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
