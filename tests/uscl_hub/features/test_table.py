"""Feature tables from elsewhere: every wrong setting and column is one line that names the table."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from uscl_hub.cli import main
from uscl_hub.features.embed import embed
from uscl_hub.features.search import search
from uscl_hub.features.table import TableError


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    root = tmp_path_factory.mktemp("some") / "scans"
    root.mkdir()
    for i, name in enumerate("abc"):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40), dtype=np.uint8)).save(root / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def table(scans, tiny_export, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "f.parquet"
    embed([scans], path, name="test_resnet", checkpoint=tiny_export, progress=False)
    return pq.read_table(path)


def settings(table):
    return json.loads(table.schema.metadata[b"uscl_hub"])


def with_settings(table, path, **changes):
    found = {key: value for key, value in {**settings(table), **changes}.items() if value is not ...}
    pq.write_table(table.replace_schema_metadata({"uscl_hub": json.dumps(found)}), path)
    return path


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"name": 5}, "has name 5, expected a model's name"),
        ({"name": "hf-hub:a/b"}, 'has name "hf-hub:a/b"'),
        ({"name": ...}, "has no name"),
        ({"weights": "ab"}, "expected a SHA-256"),
        ({"px": -1}, "px -1, expected a whole number from 1"),
        ({"px": True}, "px true"),
        ({"px": 64.0}, "px 64.0"),
        ({"px": 10**9}, "px 1000000000"),
        ({"stride": "x"}, 'stride "x"'),
        ({"stride": 0}, "stride 0"),
        ({"crop": "zz"}, "expected one of crop, blank, none"),
        ({"crop": ["crop"]}, "expected one of crop"),
        ({"checkpoint": 3}, "checkpoint 3, expected a text"),
        ({"revision": []}, "revision []"),
        ({"places": {"a": 1}}, "places"),
        ({"px": "\x1b[2J\n" * 200}, "has px"),
        ({"revision": "main"}, "revision only applies to a checkpoint on the Hub"),
    ],
)
def test_wrong_settings(table, scans, tmp_path, changes, said):
    path = with_settings(table, tmp_path / "f.parquet", **changes)
    with pytest.raises(TableError) as error:
        search(scans / "a.png", path)
    assert said in str(error.value) and str(path) in str(error.value) and "\x1b" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.drop_columns(["thumbnail"]), "no column thumbnail of type binary"),
        (lambda t: t.drop_columns(["feature"]), "no column feature"),
        (lambda t: t.set_column(0, "level", pa.array([1] * len(t))), "no column level of type string"),
        (lambda t: t.set_column(len(t.column_names) - 1, "feature", pa.array([[0.1]] * len(t))), "no column feature"),
        (lambda t: t.slice(0, 0), "holds no clips"),
        (lambda t: t.set_column(1, "clip", pa.array([None] * len(t), pa.string())), "values of clip are missing"),
        (lambda t: t.replace_schema_metadata({}), "not a feature table"),
        (lambda t: t.replace_schema_metadata({"uscl_hub": "[1]"}), "not a feature table"),
        (lambda t: t.replace_schema_metadata({"uscl_hub": "[" * 100_000}), "not a feature table"),
    ],
)
def test_wrong_columns(table, scans, tmp_path, change, said):
    path = tmp_path / "f.parquet"
    pq.write_table(change(table), path)
    with pytest.raises(TableError) as error:
        search("scans/a.png", path)
    assert said in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_features_that_are_no_numbers(table, tmp_path, value):
    feature = np.array(table["feature"].to_pylist(), np.float32)
    feature[-2:, 3] = value
    kind = table.schema.field("feature").type
    place = table.column_names.index("feature")
    changed = table.set_column(place, "feature", pa.FixedSizeListArray.from_arrays(feature.ravel(), kind.list_size))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), tmp_path / "f.parquet")
    with pytest.raises(TableError, match="f.parquet: some features are not finite"):
        search("scans/a.png", tmp_path / "f.parquet")


def test_a_model_of_other_features(table, scans, tmp_path):
    feature = pa.array([[0.5, 1.0]] * len(table), pa.list_(pa.float32(), 2))
    changed = table.set_column(table.column_names.index("feature"), "feature", feature)
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), tmp_path / "f.parquet")
    assert len(search("scans/a.png", tmp_path / "f.parquet")) == 2  # needs no model
    with pytest.raises(TableError, match="its features have 2 numbers, the model's"):
        search(scans / "a.png", tmp_path / "f.parquet")


def test_a_relative_checkpoint_is_found_from_elsewhere(scans, tiny_export, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_export.parent)
    embed([scans], tmp_path / "f.parquet", name="test_resnet", checkpoint=tiny_export.name, progress=False)
    assert settings(pq.read_table(tmp_path / "f.parquet"))["checkpoint"] == str(tiny_export)
    monkeypatch.chdir(tmp_path)
    assert search(scans / "a.png", tmp_path / "f.parquet")[0]["similarity"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("stored", ["runs/export", "/somewhere/runs/export", "export", "~/export"])
def test_a_path_is_never_asked_of_the_hub(table, scans, tmp_path, monkeypatch, capsys, stored):
    """Tables of earlier versions hold relative paths, which look like names of repositories."""
    from uscl_hub import hub

    asked = []
    for name in ("fetch", "fetch_folder"):
        monkeypatch.setattr(hub, name, lambda *args: asked.append(args))
    path = with_settings(table, tmp_path / "f.parquet", checkpoint=stored)
    assert main(["search", str(scans / "a.png"), str(path)]) == 1
    said = capsys.readouterr().err
    assert asked == [] and str(path) in said and stored.lstrip("~") in said and "not there" in said


def test_a_text_that_is_not_utf8(table, scans, tmp_path):
    clips = pa.array([b"\xff\xfe"] * len(table), pa.binary()).view(pa.string())
    changed = table.set_column(table.column_names.index("clip"), "clip", clips)
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), tmp_path / "f.parquet")
    with pytest.raises(TableError, match="f.parquet: is not a feature table"):
        search(scans / "a.png", tmp_path / "f.parquet")
