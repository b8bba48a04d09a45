from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.groups import assign_groups, split_groups
from uscl_hub.errors import UserError

FRACTIONS = {"train": 0.8, "meta": 0.1, "val": 0.1}


def test_pattern():
    ids = ["blues/v/patient_1_L1.mp4", "blues/v/patient_12_R2.mp4", "blues/v/patient_1_R1_2.mp4"]
    assert assign_groups(ids, r"patient_(\d+)_") == ["1", "12", "1"]
    assert assign_groups(ids, r"(v)/patient_(?P<group>\d+)") == ["1", "12", "1"]
    assert assign_groups(ids) == ids


def test_pattern_errors():
    with pytest.raises(ValueError, match=r"1 of 2 clips: b/scan\.mp4"):
        assign_groups(["a/patient_1.mp4", "b/scan.mp4"], r"patient_(\d+)")
    with pytest.raises(ValueError, match="2 groups"):
        assign_groups(["a"], r"(a)(b)?")
    with pytest.raises(ValueError, match="not a regular expression"):
        assign_groups(["a"], r"(a")
    with pytest.raises(ValueError, match="not both"):
        assign_groups(["a"], r"(a)", "x.csv")


def test_csv_matches_the_id_or_its_end(tmp_path):
    table = tmp_path / "groups.csv"
    table.write_text("group,path\nann,x/one.mp4\nbob,two.mp4\neve,three\n")
    ids = ["root/x/one.mp4", "root/deep/two.mp4", "root/three.avi"]
    assert assign_groups(ids, csv=table) == ["ann", "bob", "eve"]
    with pytest.raises(ValueError, match="root/y/zone.mp4"):  # whole path components only
        assign_groups([*ids, "root/y/zone.mp4"], csv=table)


@pytest.mark.parametrize(
    "text, message",
    [
        ("path,patient\na,1\n", "no column group"),
        ("path,group\na,1\na,2\n", "two groups"),
        ("path,group\na,\n", "empty"),
    ],
)
def test_csv_errors(tmp_path, text, message):
    table = tmp_path / "groups.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        assign_groups(["a"], csv=table)


ROWS = "path,group\na.mp4,gr\u00fcn\nb.mp4,blau\n"


@pytest.mark.parametrize(
    "content, said",
    [
        (ROWS.encode("cp1252"), "line 2: byte 0xfc is not UTF-8"),
        (ROWS.encode("utf-16"), "is UTF-16"),
        (ROWS.replace("a.mp4", '"a.mp4').encode(), "quotation mark"),
        (b"path,group\n", "has no rows"),
    ],
)
def test_a_table_that_a_spreadsheet_has_made_otherwise_is_named(tmp_path, content, said):
    table = tmp_path / "groups.csv"
    table.write_bytes(content)
    with pytest.raises(UserError, match=f"{table}.*{said}"):
        assign_groups(["a.mp4"], csv=table)


def test_a_german_spreadsheet_puts_semicolons(tmp_path):
    table = tmp_path / "groups.csv"
    table.write_bytes(ROWS.replace(",", ";").encode("utf-8-sig"))
    assert assign_groups(["a.mp4", "x/b.mp4"], csv=table) == ["gr\u00fcn", "blau"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), st.integers(0, 5))
def test_no_group_in_two_splits(numbers, seed):
    groups = [f"p{n}" for n in numbers]
    if len(set(groups)) < 3:
        with pytest.raises(ValueError, match="every split needs"):
            split_groups(groups, FRACTIONS, seed)
        return
    splits = split_groups(groups, FRACTIONS, seed)
    homes = {}
    for group, split in zip(groups, splits):
        assert homes.setdefault(group, split) == split
    assert set(splits) == set(FRACTIONS)
    assert split_groups(groups[::-1], FRACTIONS, seed) == splits[::-1]


def test_fractions_strata_and_seed():
    groups = [f"p{i // 5}" for i in range(1000)]
    strata = ["lung" if i < 800 else "eye" for i in range(1000)]
    splits = split_groups(groups, FRACTIONS, 0, strata)
    counts = Counter(zip(strata, splits))
    for stratum, total in (("lung", 800), ("eye", 200)):
        for split, share in FRACTIONS.items():
            assert abs(counts[stratum, split] - share * total) <= 5
    assert split_groups(groups, FRACTIONS, 1, strata) != splits


def test_a_hundred_thousand_clips_are_quick():
    import time

    groups = [f"p{i // 4}" for i in range(100_000)]
    start = time.perf_counter()
    split_groups(groups, FRACTIONS, 0)
    assert time.perf_counter() - start < 60
