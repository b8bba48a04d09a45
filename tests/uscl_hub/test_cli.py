"""The command: exit codes, JSON and messages."""

import json
import os
import signal
import time

import fresh
import pytest
import timm

from uscl_hub import checkpoints, models, registry
from uscl_hub.cli import main


@pytest.fixture
def folder(tmp_path):
    model = timm.create_model("resnet18", num_classes=0)
    return checkpoints.save_folder(
        tmp_path / "out",
        model.state_dict(),
        {
            "architecture": "resnet18",
            "num_classes": 0,
            "num_features": 512,
            "pretrained_cfg": models.make_cfg(80),
            "uscl_hub": {"method": "meta_uscl", "steps": 3, "clips": [f"{i:064x}" for i in range(99)]},
        },
        "# card\n",
    )


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_list(capsys, monkeypatch):
    entry = {
        "file": None,
        "sha256": "ab" * 32,
        "px": 96,
        "licence": "cc-by-4.0",
        "data": "muscle",
        "metrics": {"knn": 0.7},
        "hub_id": "org/name",
    }
    monkeypatch.setattr(registry, "releases", lambda: {})
    assert run(capsys, "list")[:2] == (
        0,
        "No checkpoint has been released yet. Train one with training/run.py, or load any exported folder or Hub id.\n",
    )
    assert json.loads(run(capsys, "list", "--json")[1]) == []
    monkeypatch.setattr(registry, "releases", lambda: {"meta_uscl_resnet18.v1": entry})
    code, out, _ = run(capsys, "list")
    for word in ("meta_uscl_resnet18.v1", "resnet18", "96", "muscle", "cc-by-4.0", "0.7", "ab" * 32):
        assert word in out
    (row,) = json.loads(run(capsys, "list", "--json")[1])
    assert row["name"] == "meta_uscl_resnet18.v1" and row["px"] == 96 and row["packaged"] is False


def test_info_and_verify(capsys, folder):
    code, out, _ = run(capsys, "info", folder)
    assert code == 0 and "resnet18" in out and "meta_uscl" in out and "99 entries" in out and len(out) < 2000
    facts = json.loads(run(capsys, "info", folder, "--json")[1])
    assert facts["sha256"] == checkpoints.sha256(folder / "model.safetensors") and facts["input_size"] == [
        3,
        80,
        80,
    ]
    facts = json.loads(run(capsys, "info", folder / "model.safetensors", "--json")[1])
    assert facts["dtypes"] == ["F32", "I64"] and 11_180_000 < facts["values"] < 11_190_000
    assert run(capsys, "info", "meta_uscl_resnet34")[0] == 0
    assert json.loads(run(capsys, "verify", folder, "--json")[1])["warnings"] == []
    assert run(capsys, "verify", folder)[1].endswith("OK (schema, keys, shapes, values, hash)\n")
    (folder / "README.md").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["uscl_hub"]
    (folder / "config.json").write_text(json.dumps(config))
    code, out, _ = run(capsys, "verify", folder)
    assert code == 0 and "model card" in out and "unknown" in out and "no SHA-256" in out
    assert run(capsys, "verify", folder / "model.safetensors")[0] == 0
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    for what in (folder, folder / "model.safetensors"):
        code, out, err = run(capsys, "verify", what)
        assert code == 1 and "model.safetensors" in err and out == ""
    code, out, err = run(capsys, "verify", folder, "--json")
    assert code == 1 and "model.safetensors" in json.loads(out)["error"]


def test_failures_are_one_plain_line(capsys, tmp_path):
    for arguments in (
        ("info", "nothing_here"),
        ("verify", tmp_path / "missing.safetensors"),
        ("push", tmp_path, "org/name"),
        ("push", tmp_path, "not an id"),
    ):
        code, out, err = run(capsys, *arguments)
        assert code == 1 and err.count("\n") == 1 and err.startswith("uscl-hub: ") and "Traceback" not in err


def test_ctrl_c_is_no_traceback(capsys, monkeypatch):
    monkeypatch.setattr(registry, "releases", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    said = "uscl-hub: interrupted; what was finished is kept: start it again to go on\n"
    assert run(capsys, "list") == (130, "", said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_the_same_way(capsys, monkeypatch, number):
    if (before := signal.getsignal(number)) == signal.SIG_IGN:
        pytest.skip("it is ignored here, as nohup has it")
    monkeypatch.setattr(registry, "releases", lambda: os.kill(os.getpid(), number) or time.sleep(60))
    code, _, said = run(capsys, "list")
    assert code == 128 + number and said.startswith("uscl-hub: interrupted") and signal.getsignal(number) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["info"],
        ["convert", "x.pth"],
        ["convert", "a", "b", "--px", "0"],
        ["export", "x", "-o", "y", "--format", "tflite"],
    ],
)
def test_usage_errors_are_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_as_a_process(tmp_path):
    result = fresh.script("uscl_hub.cli", "info", tmp_path)
    assert result.returncode == 1 and "config.json" in result.stderr and "Traceback" not in result.stderr
