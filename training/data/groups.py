"""Groups (patients) and splits: train, meta and validation clips never share a group."""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import Sequence

import numpy as np

from uscl_hub.labels.rows import read_rows


def assign_groups(
    ids: Sequence[str], pattern: str | None = None, csv: Path | str | None = None, setting: str = "group pattern"
) -> list[str]:
    """The group (patient) of every clip id.

    pattern: a regular expression searched in the id, whose one group (or the one named 'group') is the clip's group.
    csv: a file with the columns path and group; a path is matched with the id or with its end (whole path
    components, with or without the extension). Neither: every clip is its own group. setting: what errors call the
    pattern.
    Raises ValueError, naming some of them, for ids without a group, and for an ambiguous csv; UserError for a csv
    that cannot be read.
    """
    if pattern is not None and csv is not None:
        raise ValueError("give a group pattern or a group csv, not both")
    if pattern is not None:
        return _by_pattern(ids, pattern, setting)
    if csv is not None:
        return _by_csv(ids, Path(csv))
    return list(ids)


def _by_pattern(ids: Sequence[str], pattern: str, setting: str) -> list[str]:
    try:
        regex = re.compile(unicodedata.normalize("NFC", pattern))  # as the ids are
    except re.error as error:
        raise ValueError(f"{setting} {pattern!r} is not a regular expression: {error}") from error
    if "group" not in regex.groupindex and regex.groups != 1:
        raise ValueError(f"{setting} {pattern!r} has {regex.groups} groups; it needs one, or one named 'group'")
    key = "group" if "group" in regex.groupindex else 1
    matches = [regex.search(clip) for clip in ids]
    groups = [match[key] if match else None for match in matches]
    _refuse_missing(ids, groups, f"{setting} {pattern!r}")
    return groups


def _by_csv(ids: Sequence[str], path: Path) -> list[str]:
    rows = read_rows(path)
    if missing := {"path", "group"} - set(rows[0]):
        raise ValueError(f"{path}: no column {' or '.join(sorted(missing))}; its header needs path and group")
    groups = {}
    for number, row in enumerate(rows, start=1):
        key, group = row["path"].replace("\\", "/").strip("/"), row["group"]
        key = unicodedata.normalize("NFC", key)  # as the ids are
        if not key or not group:
            raise ValueError(f"{path}, row {number}: path or group is empty")
        if groups.setdefault(key, group) != group:
            raise ValueError(f"{path}, row {number}: {key} is in two groups, {groups[key]} and {group}")
    found = [_lookup(clip, groups) for clip in ids]
    _refuse_missing(ids, found, str(path))
    return found


def _lookup(clip: str, groups: dict[str, str]) -> str | None:
    """The longest end of the id that the csv has: 'a/b/c.mp4', 'b/c.mp4', 'c.mp4', then the same without '.mp4'."""
    suffix = Path(clip).suffix
    stem = clip[: -len(suffix)] if suffix else clip
    for i in range(clip.count("/") + 1):
        for text in (clip, stem):
            key = text.split("/", i)[-1]
            if key in groups:
                return groups[key]
    return None


def _refuse_missing(ids: Sequence[str], groups: Sequence[str | None], where: str):
    without = [clip for clip, group in zip(ids, groups) if not group]
    if without:
        some = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
        raise ValueError(f"{where} finds nothing for {len(without)} of {len(ids)} clips: {some}")


def split_groups(
    groups: Sequence[str], fractions: dict[str, float], seed: int, strata: Sequence[str] | None = None
) -> list[str]:
    """The split of every clip, by whole groups.

    fractions: wanted share of the clips for each split, e.g. {'train': .8, 'meta': .1, 'val': .1}; they are
    normalised. strata: a label a clip (its source, its class); each split gets its share of every stratum as nearly
    as whole groups allow. Groups in a seeded random order, large ones first, go where most is missing. The same
    groups, fractions, seed and strata always give the same splits, whatever the order of the clips.
    Raises ValueError if a split would be empty.
    """
    if not fractions or any(not fraction > 0 for fraction in fractions.values()):
        raise ValueError(f"every split needs a fraction above 0, got {fractions}")
    strata = ["all"] * len(groups) if strata is None else list(strata)
    if len(strata) != len(groups):
        raise ValueError(f"{len(strata)} strata for {len(groups)} clips")
    names = list(fractions)
    counts = defaultdict(Counter)
    for group, stratum in zip(groups, strata):
        counts[group][stratum] += 1
    if len(counts) < len(names):
        raise ValueError(
            f"{len(counts)} groups cannot fill the {len(names)} splits {', '.join(names)}: every split "
            "needs at least one group of its own"
        )
    kinds = sorted(set(strata))
    order = sorted(counts)
    table = np.array([[counts[group][kind] for kind in kinds] for group in order], dtype=float)
    share = np.array([fractions[name] for name in names], dtype=float)
    share /= share.sum()
    missing = share[:, None] * table.sum(0)  # clips of each stratum that a split still wants
    weight = table / table.sum(0)
    shuffled = np.random.default_rng(seed).permutation(len(order))
    shuffled = shuffled[np.argsort(-table[shuffled].sum(1), kind="stable")]
    empty, home = set(range(len(names))), {}
    for left, i in zip(range(len(order), 0, -1), shuffled):
        # a group goes where most clips of its strata are still missing
        need = (missing @ weight[i]).tolist()
        choice = max(empty if left <= len(empty) else range(len(names)), key=lambda s: (need[s], share[s], -s))
        missing[choice] -= table[i]
        empty.discard(choice)
        home[order[i]] = names[choice]
    return [home[group] for group in groups]


def fingerprint(name: str) -> str:
    """Identifies a group or clip without naming it: paths may hold what must not be published. 16 hex digits."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]
