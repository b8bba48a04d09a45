"""README, the model card and docs/: their length, their links, files and settings, their Python and their commands."""

import argparse
import configparser
import contextlib
import dataclasses
import importlib
import inspect
import io
import re
import runpy
import shlex
import sys
import typing
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import tyro
import yaml
from helpers import ROOT
from huggingface_hub import ModelCard
from PIL import Image

import uscl_hub
from training.config import Config
from training.data.provenance import Provenance
from training.engine.export import export
from uscl_hub import cli, models

PAGES = sorted(p for p in ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LONGEST = {"README.md": 179, "MODEL_CARD.md": 249, "CONTRIBUTING.md": 100}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def inline(text):
    """What stands between single backticks outside of blocks, line breaks as spaces."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"(?ms)^```.*?^```", "", text))]


def commands(text):
    """Word lists of the commands in bash blocks, and of those inline that start one of this project's programs."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    lines += [code for code in inline(text) if re.match(r"(python (training|docs)/|uscl-hub \w+ \S)", code)]
    for line in lines:
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


# ----------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("name", LONGEST)
def test_length(name):
    assert len(read(name).splitlines()) <= LONGEST[name]


@pytest.mark.parametrize("name", NAMES)
def test_links_and_files_exist(name):
    text, folder = read(name), (ROOT / name).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        assert (folder / path).exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)", (folder / path).read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target
    for code in inline(text):
        if re.fullmatch(r"(uscl_hub|training|tests|docs)/[\w./-]+", code):
            assert (ROOT / code).exists(), code
    assert "" not in re.findall(r"^```(\w*)$", text, flags=re.M)[::2], "a block without a language is not checked"


@pytest.mark.parametrize("name", [name for name in NAMES if "results" not in name])
def test_settings_exist(name):
    groups = {key: kind for key, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}
    for group, setting in re.findall(rf"`(?:--)?({'|'.join(groups)})\.(?!safetensors)([a-z_]+)", read(name)):
        assert setting in {field.name for field in dataclasses.fields(groups[group])}, f"{group}.{setting}"


def test_generated_tables_have_their_commands():
    for name in NAMES:
        text = read(name)
        for section in re.findall(r"^<!-- (results\S*?):begin -->", text, flags=re.M):
            begin, end = (text.index(f"<!-- {section}:{part} -->") for part in ("begin", "end"))
            assert "python training/" in text[begin:end] and "95 %" in text[begin:end], section
            assert name.startswith("docs/results/"), "tables are generated into docs/results, not here"


def test_model_card_and_citation():
    card = ModelCard.load(ROOT / "MODEL_CARD.md", ignore_metadata_errors=False)
    assert card.data.library_name == "timm" and card.data.license and card.data.datasets and card.data.metrics
    assert {"timm", "ultrasound"} <= set(card.data.tags)
    template = Path(huggingface_hub.__file__).parent / "templates" / "modelcard_template.md"  # the card guide
    for level, head in re.findall(r"^(##+) (.+)", template.read_text(encoding="utf-8"), flags=re.M):
        if "[optional]" not in head and level in ("##", "###"):
            assert f"\n{level} {head}\n" in card.text, f"the card guide's section {head}"
    assert "Not a medical device" in card.text and all(name in card.text for name in models.releases())
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == uscl_hub.__version__ and citation["cff-version"] == "1.2.0"
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Chen", "Zhang", "Ding", "Liu"]
    assert paper["identifiers"][0]["value"] == "arXiv:2212.04097"


# ------------------------------------------------------------------------------------------------------- commands


class Parsed(BaseException):
    """Raised in place of what a program does once it has read its command line."""


@pytest.fixture
def stops_when_parsed(monkeypatch):
    """Programs run in this process end with Parsed when their arguments are right, else with SystemExit."""

    def stopping(parse):
        def stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return stop

    monkeypatch.setattr(tyro, "cli", stopping(tyro.cli))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))
    monkeypatch.chdir(ROOT)  # --config names a file of the checkout


def check_script(script, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except Parsed:
        return
    except SystemExit as end:
        if "--help" in arguments and not end.code:
            return
        pytest.fail(f"{shlex.join([script, *arguments])}: {end.code}\n{said.getvalue()}")
    pytest.fail(f"{script} ended without reading its command line")


def check_command(words, monkeypatch):
    """Fails for a command that does not exist or does not take its arguments."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    scripts = [word for word in words if re.fullmatch(r"(training|docs)/(benchmarks/)?\w+\.py", word)]
    if words[0] in ("python", "srun") and scripts:
        if scripts[0] != "docs/walkthrough.py":  # takes no arguments; it has a test of its own
            check_script(scripts[0], words[words.index(scripts[0]) + 1 :], monkeypatch)
    elif words[0] == "uscl-hub":
        check_script("uscl_hub/cli.py", words[1:], monkeypatch)
    elif words[0] == "pip":
        setup = configparser.ConfigParser()
        setup.read_string(read("setup.cfg"))
        for extras in re.findall(r"\[(.+?)\]", " ".join(words)):
            assert set(extras.split(",")) <= set(setup["options.extras_require"]), extras
    elif words[0] == "pytest":
        for path in (word for word in words if word.startswith("tests")):
            assert (ROOT / path).exists(), path
    else:
        assert words[:3] == ["python3", "-m", "venv"] or words[0] in (".", "ruff", "mypy", "tensorboard"), words


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name, stops_when_parsed, monkeypatch):
    for words in commands(read(name)):
        check_command(words, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "python training/run.py --optim.speed 3",
        "python training/run.py --config training/configs/absent.yaml",
        "python training/explain.py",
        "python training/absent.py",
        "uscl-hub embed /scans",
        "uscl-hub absent",
        "pip install '.[absent]'",
        "pytest tests/test_absent.py",
        "absent --help",
    ],
)
def test_a_command_that_is_wrong_is_found(line, stops_when_parsed, monkeypatch):
    with pytest.raises((pytest.fail.Exception, AssertionError, FileNotFoundError)):
        check_command(shlex.split(line), monkeypatch)


def test_readme_names_every_command_of_uscl_hub():
    for name in cli.COMMANDS:
        assert re.search(rf"uscl-hub {name}\b|`{name}`", read("README.md")), name


def test_the_test_command_is_what_ci_runs():
    assert "pip install -e '.[test]' && pytest\n" in read("README.md")
    ci = read(".ci/run")
    for line in ("pip install -q -e '.[test]'", "ruff check", "ruff format --check", "mypy"):
        assert f"\n{line}\n" in ci
    assert ci.endswith('\npytest -m "slow or not slow"\n')  # its closing line is the last one of the output


# --------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("module", ("convert", "deploy", "load", "models", "preprocess", "registry"))
def test_public_functions_have_examples(module):
    """pytest runs them (--doctest-modules)."""
    module = importlib.import_module(f"uscl_hub.{module}")
    public = {name: f for name, f in vars(module).items() if inspect.isfunction(f) and not name.startswith("_")}
    assert [n for n, f in public.items() if f.__module__ == module.__name__ and ">>> " not in f.__doc__] == []


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as the examples take for granted: runs/demo/export, and images of three classes."""
    folder = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    backbone = timm.create_model("resnet18", num_classes=0)
    about = Provenance("meta_uscl", 1, [], "", {})
    export(backbone, "meta_uscl_resnet18", 64, folder / "runs/demo/export", about)
    for i, label in enumerate(("benign", "malignant", "normal") * 2):
        (folder / "images" / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 200), (40 * i,) * 3).save(folder / "images" / label / f"{i}.png")
    return folder, backbone.eval()


def run_examples(name, workplace, monkeypatch):
    """Run a page's Python blocks in order, as in one file; the names that they leave."""
    monkeypatch.chdir(workplace[0])
    namespace = {"__name__": "examples"}
    for block in blocks(read(name), "python"):
        exec(compile(block, name, "exec"), namespace)
    return namespace


def test_readme_python(workplace, monkeypatch):
    left = run_examples("README.md", workplace, monkeypatch)
    assert left["loss"].isfinite() and left["model"].num_classes == 3
    assert left["features"].shape == (6, 512)
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(left["grey"](x), workplace[1](x.expand(-1, 3, -1, -1)))


def test_own_data_python(workplace, monkeypatch):
    left = run_examples("docs/own_data.md", workplace, monkeypatch)
    x = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(left["backbone"](x), workplace[1](x))
        assert left["segmenter"](x).shape == (2, 1, 64, 48)
        assert set(left["detector"].eval()([torch.rand(3, 64, 64)])[0]) == {"boxes", "labels", "scores", "masks"}


def test_model_card_python(workplace, monkeypatch):
    left = run_examples("MODEL_CARD.md", workplace, monkeypatch)
    assert left["transform"](Image.new("L", (90, 70))).shape == left["model"].pretrained_cfg["input_size"]


def test_picture(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["picture.py", str(workplace[0] / "images"), "-o", str(tmp_path / "features.png")])
    runpy.run_path(str(ROOT / "docs/picture.py"), run_name="__main__")
    assert capsys.readouterr().out == f"{tmp_path / 'features.png'}: 6 images\n"
    assert Image.open(tmp_path / "features.png").size == Image.open(ROOT / "docs/features.png").size
