"""Tables and resumed trainings from elsewhere: feature tables for `uscl-hub search`, tables of labels, checkpoint.pt.
Changed in their bytes, or well-formed with wrong values; each is refused in one line, or read. Nothing else, and soon.

USCL_FUZZ is the number of each:

    USCL_FUZZ=10000 pytest -s tests/test_fuzz_tables.py
"""

import copy
import json
import os
import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_fuzz import mutate
from test_fuzz_checkpoints import VALUES

from training.engine import state as states
from uscl_hub.errors import UserError
from uscl_hub.features.embed import embed
from uscl_hub.features.search import search
from uscl_hub.labels import read_labels

COUNT = int(os.environ.get("USCL_FUZZ", 60))
SECONDS = 60  # of one file: ends what hangs, on a busy machine too


def attempt(act, *names) -> bool:
    """Whether it was taken; if not, the error is one line that names the file."""
    start = time.monotonic()
    try:
        act()
    except (UserError, FileNotFoundError) as error:
        assert "\n" not in str(error) and any(name in str(error) for name in names), error
        return False
    finally:
        assert time.monotonic() - start < SECONDS
    return True


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("labelled") / "scans"
    root.mkdir()
    rng = np.random.default_rng(0)
    for name in "abcdefghijkl":
        Image.fromarray(rng.integers(0, 255, (40, 40), dtype=np.uint8)).save(root / f"{name}.png")
    return root


# ---------------------------------------------------------------------------------------------- feature tables


def hostile_settings(table, rng: random.Random):
    """The table with other settings, without some, or with other things in their place."""
    found = json.loads(table.schema.metadata[b"uscl_hub"])
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*found, "checkpoint", "weights", "more"])
        if rng.random() < 0.2:
            found.pop(key, None)
        else:
            found[key] = rng.choice(VALUES)
    whole = found if rng.random() < 0.95 else rng.choice(VALUES)
    return table.replace_schema_metadata({"uscl_hub": json.dumps(whole)})


def hostile_columns(table, rng: random.Random):
    """The table with a column less, of another type, with gaps, or without rows."""
    name, kind = rng.choice(table.column_names), rng.choice(["drop", "retype", "gaps", "rename", "fewer", "thumbnails"])
    place = table.column_names.index(name)
    if kind == "drop":
        return table.drop_columns([name])
    if kind == "retype":
        other = rng.choice([["x"] * len(table), [1] * len(table), [0.5] * len(table), [[1.0, 2.0]] * len(table)])
        return table.set_column(place, name, pa.array(other))
    if kind == "gaps":
        values = [value if rng.random() < 0.7 else None for value in table[name].to_pylist()]
        return table.set_column(
            place, pa.field(name, table.schema.field(name).type), pa.array(values, table.schema.field(name).type)
        )
    if kind == "rename":
        return table.rename_columns([c if c != name else rng.choice(["level", "x", ""]) for c in table.column_names])
    if kind == "fewer":
        return table.slice(0, rng.randrange(len(table)))
    pngs = [rng.choice([b"", b"%!PS-Adobe", b"\x89PNG\r\n\x1a\n", bytes(200)]) for _ in range(len(table))]
    return table.set_column(table.column_names.index("thumbnail"), "thumbnail", pa.array(pngs, pa.binary()))


def test_feature_tables(pictures, tiny_export, tmp_path):
    path = tmp_path / "f.parquet"
    embed([pictures], path, name="test_resnet", checkpoint=tiny_export, progress=False)
    original, table, rng, taken = path.read_bytes(), pq.read_table(path), random.Random(2), 0
    damage = (
        lambda: path.write_bytes(mutate(original, rng, [original])),
        lambda: pq.write_table(hostile_settings(table, rng), path),
        lambda: pq.write_table(hostile_columns(table, rng), path),
    )
    names = str(path), "the feature table", str(tiny_export), "a.png", "a/b"  # a/b: hf-hub:a/b of VALUES
    for i in range(COUNT):
        damage[i % 3]()
        query = "scans/a.png" if i % 2 else pictures / "a.png"
        taken += attempt(lambda: search(query, path, sheet=tmp_path / "s.png"), *names)
    print(f"{COUNT} feature tables: {COUNT - taken} refused, {taken} taken")
    assert taken < 0.6 * COUNT


# ------------------------------------------------------------------------------------------------------ labels


def hostile_cell(rows: list[list[str]], rng: random.Random) -> str:
    """The CSV with other cells: names of other files, other kinds of values, other columns."""
    rows = copy.deepcopy(rows)
    for _ in range(rng.randint(1, 4)):
        row = rng.choice(rows)
        others = [
            "",
            " ",
            "nan",
            "inf",
            "1e400",
            "-0",
            "0",
            "1",
            "x",
            "a.png",
            "../a.png",
            "/dev/zero",
            "c\x00d",
            '"',
            "=1",
        ]
        row[rng.randrange(len(row))] = rng.choice([*others, "\x1b[2J", "é", "x" * 5000, ",", "\n", "path", "group"])
    return "\n".join(",".join(row) for row in rows)


def test_label_tables(pictures, tmp_path):
    names = sorted(p.name for p in pictures.iterdir())
    rows = [["path", "label", "group", "split"]]
    rows += [[f"{pictures}/{n}", "ill" if i % 2 else "well", f"p{i // 2}", "train"] for i, n in enumerate(names)]
    original = "\n".join(",".join(row) for row in rows).encode()
    path, rng, taken = tmp_path / "labels.csv", random.Random(3), 0
    path.write_bytes(original)
    assert len(read_labels(path).items) == len(names)
    for i in range(COUNT):
        content = mutate(original, rng, [original]) if i % 2 else hostile_cell(rows, rng).encode()
        path.write_bytes(content)
        taken += attempt(lambda: read_labels(path), "labels.csv")
    print(f"{COUNT} tables of labels: {COUNT - taken} refused, {taken} taken")
    assert 0 < taken < 0.7 * COUNT


# ----------------------------------------------------------------------------------------- resumed trainings


def new_state():
    torch.manual_seed(0)
    encoder, cmw = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)), torch.nn.Linear(4, 1)
    optimizer, cmw_optimizer = torch.optim.SGD(encoder.parameters(), 0.1, 0.9), torch.optim.Adam(cmw.parameters())
    cmw(encoder(torch.randn(5, 3))).sum().backward()
    optimizer.step()
    cmw_optimizer.step()
    return states.State(encoder, cmw, optimizer, cmw_optimizer, {"seed": 0})


def hostile_content(content: dict, rng: random.Random) -> dict:
    """The checkpoint with another value somewhere in it, or without one."""
    content = copy.deepcopy(content)
    place = content
    while True:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        value = place[key]
        if not (isinstance(value, (dict, list)) and value) or rng.random() < 0.15:
            break
        place = value
    if isinstance(value, torch.Tensor) and rng.random() < 0.6:
        shapes = (value * float("nan"), value[..., None], value.double() * 1e300, value.reshape(-1)[:1], value.int())
        place[key] = rng.choice(shapes)
    elif rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice([v for v in VALUES if not isinstance(v, int) or abs(v) < 2**62])
    return content


def test_resumed_trainings(tmp_path, capsys):
    path, rng, taken = tmp_path / "checkpoint.pt", random.Random(4), 0
    start = new_state()
    states.save(start, path)
    original = path.read_bytes()
    content = torch.load(path, weights_only=True)
    for i in range(COUNT):
        if i % 2:
            path.write_bytes(mutate(original, rng, [original]))
        else:
            torch.save(hostile_content(content, rng), path)
        resumed = new_state()
        if attempt(lambda: states.restore(resumed, path), str(path)):
            states.check_finite(resumed)
            assert resumed.step >= 0
            resumed.cmw(resumed.encoder(torch.randn(5, 3))).sum().backward()
            resumed.optimizer.step()
            resumed.cmw_optimizer.step()
            taken += 1
    with capsys.disabled():
        print(f"{COUNT} checkpoints of trainings: {COUNT - taken} refused, {taken} taken, all of these finite")
    assert taken < 0.5 * COUNT
