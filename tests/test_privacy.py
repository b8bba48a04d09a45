"""Names that must not get out: of a DICOM file's tags nowhere at all, of paths only into what stays on the machine.

What may name a clip by its path below the data's folder: the frame cache (index, report, sheets), the feature table and
its report, and the terminal. What never does: checkpoint, log, TensorBoard, figures, manifest, export.
"""

import json
import zipfile

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from helpers import dicom
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset

from training import config as configs
from training import run
from training.data.ingest import ingest
from training.data.simulate import simulate_clip, write_video
from uscl_hub.cli import main

TAG, PATH = "PLANTED", "DOE_JANE"
TAGS = dict(
    PatientBirthDate="19010203",
    PatientAddress="PLANTED STREET 1",
    InstitutionName="PLANTED HOSPITAL",
    OperatorsName="PLANTED^OPERATOR",
    ImageComments="PLANTED COMMENT",
    StudyDescription="PLANTED STUDY",
    AccessionNumber="PLANTED-1",
)


def planted(path, movie):
    """A DICOM clip with names in ordinary, nested and private tags, and after the pixels."""
    dicom(path, movie, **TAGS, DataSetTrailingPadding=b"PLANTED PADDING ")
    data, nested = pydicom.dcmread(path), Dataset()
    nested.PatientName = nested.PersonName = "PLANTED^NESTED"
    data.ReferencedPatientSequence = [nested]
    data.private_block(0x0011, "PLANTED MAKER", create=True).add_new(1, "LO", "PLANTED PRIVATE")
    data.save_as(path)
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """12 clips in folders named like patients, 4 of them DICOM, and DICOM files that cannot be read."""
    root = tmp_path_factory.mktemp("data") / f"{PATH}_scans"
    for i in range(12):
        folder = root / f"{PATH}{i // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        movie = simulate_clip("lung" if i % 2 else "cyst", 6, 40, seed=i)
        if i % 3:
            write_video(folder / f"{PATH}_{i}.mp4", movie)
        else:
            whole = planted(folder / f"{PATH}_{i}.dcm", movie).read_bytes()
    harmed = {
        "cut": whole[: len(whole) // 2],
        "cut2": whole[:300],
        "photometric": whole.replace(b"MONOCHROME2", b"PLANTED\xffPHO"),
        "bits": whole.replace(b"US\x02\x00\x08\x00", b"US\x02\x00\x11\x00"),
        "syntax": whole.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.PLANTED.2.1\0"),
    }
    for name, content in harmed.items():
        (folder / f"{PATH}_{name}.dcm").write_bytes(content)
    return root


def written(folder):
    """Every file's name and content, what is compressed opened."""
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".png":
                content += repr(Image.open(path).info).encode()
            elif path.suffix == ".parquet":
                table = pq.read_table(path)
                content += repr([table.schema.metadata, table.drop(["feature"]).to_pylist()]).encode()
            elif zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    content += b"".join(archive.read(name) for name in archive.namelist())
            yield path.relative_to(folder), path.name.encode() + b"\n" + content


def test_planted_names(scans, tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configs.Config(
        out=str(tmp_path / "run"),
        data=configs.Data(roots=(str(scans),), group="/(DOE_JANE[0-9]+)/", meta_fraction=0.2, sheets=True, workers=1),
        model=configs.Model(name="test_resnet", size=32),
        optim=configs.Optim(batch=4, steps=2),
        device="cpu",
    )
    run.main(config)
    export, broken = tmp_path / "run" / "export", scans / f"{PATH}5" / f"{PATH}_cut.dcm"
    model = ["--checkpoint", export, "--name", "test_resnet"]
    table = tmp_path / "f.parquet"
    commands = [
        ["embed", scans, "-o", table, *model, "--json"],
        ["search", f"{PATH}_scans/{PATH}0/{PATH}_0.dcm", table, "--sheet", tmp_path / "sheet.png"],
        ["verify", export],
        ["info", export],
        ["export", export, "--name", "test_resnet", "-o", tmp_path / "model.pt2", "--format", "torch-export"],
        ["embed", broken, "-o", tmp_path / "g.parquet", *model],
    ]
    codes = [main([str(word) for word in command]) for command in commands]
    assert codes == [0, 0, 0, 0, 0, 1]
    report = json.loads(next((tmp_path / "run" / "cache").glob("*/report.json")).read_text())
    assert len(report["unreadable"]) == 5 and report["clips"] == 12
    captured = capfd.readouterr()
    said = captured.out + captured.err + caplog.text
    assert [line for line in said.splitlines() if TAG in line or "19010203" in line] == []
    files = dict(written(tmp_path))
    assert len(files) > 15
    for path, content in files.items():
        assert TAG.encode() not in content and b"19010203" not in content, path
    with_paths = {path.as_posix() for path, content in files.items() if PATH.encode() in content}
    cache = next((tmp_path / "run" / "cache").iterdir()).relative_to(tmp_path).as_posix()
    assert with_paths == {
        *(f"{cache}/index.jsonl", f"{cache}/index.arrow", f"{cache}/report.json", f"{cache}/unreadable.json"),
        *("f.parquet", "f.parquet.report.json"),
        "run/config.yaml",  # data.roots and data.group, as the user wrote them
    }


def with_text(frames, text):
    """Moving speckle with letters burned into its middle."""
    canvas = Image.new("L", frames.shape[:0:-1])
    ImageDraw.Draw(canvas).text((60, 60), text, fill=255, font=ImageFont.load_default(20))
    return np.maximum(frames, np.asarray(canvas))


def test_burned_in_text_that_the_crop_leaves_is_reported(tmp_path, tiny_export, capsys):
    speckle = np.random.default_rng(0).integers(30, 120, (8, 160, 240)).astype(np.uint8)
    (tmp_path / "scans").mkdir()
    dicom(tmp_path / "scans" / "text.dcm", with_text(speckle, "DOE JANE 1970"))
    dicom(tmp_path / "scans" / "plain.dcm", speckle)
    cache = ingest([tmp_path / "scans"], tmp_path / "cache", size=32, workers=0)
    assert json.loads((cache.path / "report.json").read_text())["burned_in_text_suspected"] == ["scans/text.dcm"]
    assert "1 may still show burned-in text" in capsys.readouterr().err
    command = ["embed", tmp_path / "scans", "-o", tmp_path / "f.parquet", "--checkpoint", tiny_export]
    command = [*map(str, command), "--name", "test_resnet"]
    for _ in range(2):  # also when the features are there already
        assert main(command) == 0
        out = capsys.readouterr().out
        assert "warning: scans/text.dcm may still show burned-in text" in out and "plain.dcm" not in out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["burned_in_text_suspected"] == ["scans/text.dcm"]
