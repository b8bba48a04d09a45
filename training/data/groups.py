"""Groups (patients) and splits: train, meta and validation clips never share a group."""

import hashlib
import re
import unicodedata
from pathlib import Path
from typing import Callable, Iterable, Sequence

import numpy as np

from uscl_hub.labels.rows import as_id, of_longest_end, read_rows


def assign_groups(
    ids: Iterable[str], pattern: str | None = None, csv: Path | str | None = None, setting: str = "group pattern"
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


def _by_pattern(ids: Iterable[str], pattern: str, setting: str) -> list[str]:
    try:
        regex = re.compile(unicodedata.normalize("NFC", pattern))  # as the ids are
    except re.error as error:
        raise ValueError(f"{setting} {pattern!r} is not a regular expression: {error}") from error
    if "group" not in regex.groupindex and regex.groups != 1:
        raise ValueError(f"{setting} {pattern!r} has {regex.groups} groups; it needs one, or one named 'group'")
    key = "group" if "group" in regex.groupindex else 1
    return _of_each(ids, lambda clip: match[key] if (match := regex.search(clip)) else None, f"{setting} {pattern!r}")


def _by_csv(ids: Iterable[str], path: Path) -> list[str]:
    rows = read_rows(path)
    if missing := {"path", "group"} - set(rows[0]):
        raise ValueError(f"{path}: no column {' or '.join(sorted(missing))}; its header needs path and group")
    groups = {}
    for number, row in enumerate(rows, start=1):
        key, group = as_id(row["path"]), row["group"]
        if not key or not group:
            raise ValueError(f"{path}, row {number}: path or group is empty")
        if groups.setdefault(key, group) != group:
            raise ValueError(f"{path}, row {number}: {key} is in two groups, {groups[key]} and {group}")
    return _of_each(ids, lambda clip: of_longest_end(clip, groups), str(path))


def _of_each(ids: Iterable[str], find: Callable[[str], str | None], where: str) -> list[str]:
    """find(id) of every id. Raises ValueError, naming some, if `where` finds nothing for them."""
    met: dict[str, str] = {}  # many clips of a group share its text
    groups, without = [], []
    for clip in ids:
        if group := find(clip):
            groups.append(met.setdefault(group, group))
        else:
            without.append(clip)
    if without:
        some = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
        raise ValueError(f"{where} finds nothing for {len(without)} of {len(groups) + len(without)} clips: {some}")
    return groups


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
    strata = ["all"] * len(groups) if strata is None else list(strata)
    if len(strata) != len(groups):
        raise ValueError(f"{len(strata)} strata for {len(groups)} clips")
    names = list(fractions)
    return [names[i] for i in split_numbers(numbered(groups)[0], fractions, seed, numbered(strata)[0]).tolist()]


def numbered(texts: Iterable[str]) -> tuple[np.ndarray, list[str]]:
    """int32 (n,): each text's place among the different ones, sorted; and these.

    >>> numbered(["b", "a", "b"])
    (array([1, 0, 1], dtype=int32), ['a', 'b'])
    """
    met: dict[str, int] = {}
    numbers = np.fromiter((met.setdefault(text, len(met)) for text in texts), np.int32)
    names = sorted(met)
    rank = np.empty(len(names), np.int32)
    rank[np.fromiter((met[name] for name in names), np.int32, len(names))] = np.arange(len(names))
    return rank[numbers], names


def split_numbers(groups: np.ndarray, fractions: dict[str, float], seed: int, strata: np.ndarray) -> np.ndarray:
    """`split_groups` of what is `numbered`: int8 (clips,), each clip's split by its place in `fractions`."""
    if not fractions or any(not fraction > 0 for fraction in fractions.values()):
        raise ValueError(f"every split needs a fraction above 0, got {fractions}")
    names = list(fractions)
    shape = int(groups.max(initial=-1)) + 1, int(strata.max(initial=0)) + 1
    if shape[0] < len(names):
        raise ValueError(
            f"{shape[0]} groups cannot fill the {len(names)} splits {', '.join(names)}: every split "
            "needs at least one group of its own"
        )
    table = (
        np.bincount(groups.astype(np.int64) * shape[1] + strata, minlength=shape[0] * shape[1])
        .reshape(shape)
        .astype(float)
    )
    share = np.array([fractions[name] for name in names], dtype=float)
    shuffled = np.random.default_rng(seed).permutation(shape[0])
    shuffled = shuffled[np.argsort(-table[shuffled].sum(1), kind="stable")]
    return _homes(table, share / share.sum(), shuffled)[groups]


def _homes(table: np.ndarray, share: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Each group's split: in `order`, a group goes where most clips of its strata are still missing.

    table: clips of every group and stratum; share: of the splits.
    """
    missing = (share[:, None] * table.sum(0)).tolist()
    weight = table / table.sum(0)
    sole = np.where((table > 0).sum(1) == 1, table.argmax(1), -1).tolist()  # most groups are of one stratum
    shares = share.tolist()
    everywhere, empty, home = range(len(shares)), set(range(len(shares))), np.empty(len(table), np.int8)
    for left, i in zip(range(len(order), 0, -1), order.tolist()):
        if (k := sole[i]) >= 0:
            clips, w = table.item(i, k), weight.item(i, k)
            need = [row[k] * w for row in missing]
        else:
            need = (np.array(missing) @ weight[i]).tolist()
        choice = max(empty if left <= len(empty) else everywhere, key=lambda s: (need[s], shares[s], -s))
        if k >= 0:
            missing[choice][k] -= clips
        else:
            missing[choice] = [m - t for m, t in zip(missing[choice], table[i].tolist())]
        empty.discard(choice)
        home[i] = choice
    return home


def fingerprint(name: str) -> str:
    """Identifies a group or clip without naming it: paths may hold what must not be published. 16 hex digits."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]
