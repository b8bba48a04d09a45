"""Settings from YAML and from the command line."""

import dataclasses
import functools
import inspect
from operator import attrgetter

import pytest
import yaml

from training.config import Config, Data, Optim, Pairs, cache_folders, cli, dump, load
from uscl_hub.errors import UserError


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def fields(kind, prefix=""):
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kind


@pytest.mark.parametrize(
    "named, folders",
    [((), ["run/cache"]), ("", ["run/cache"]), (("",), ["run/cache"]), ("a/b", ["a/b"]), (("a", "b"), ["a", "b"])],
)
def test_the_folders_of_the_frame_cache(tmp_path, named, folders):
    """Also of config.yaml and scripts from before there could be several: a text is one folder, not its letters."""
    config = Config(data=Data(cache=named))
    dump(config, tmp_path / "c.yaml")
    for known in (config, load(Config, tmp_path / "c.yaml")):
        assert [folder.as_posix() for folder in cache_folders(known, "run")] == folders


def test_yaml_round_trip(tmp_path):
    changed = Config(
        out="änders",
        resume=True,
        data=Data(roots=("a", "b c"), group=r"'/(subj\d+)", licences={"a": "CC BY 4.0"}, val_fraction=1e-9),
        pairs=Pairs(crop_scale=(0.25, 0.5), augment_first=True),
        optim=Optim(lr=6e-5, warmup_epochs=3),
    )
    for settings in (Config(), changed):
        dump(settings, tmp_path / "c.yaml")
        again = load(Config, tmp_path / "c.yaml")
        assert again == settings and again.data.roots == settings.data.roots
        assert cli(Config, args=["--config", str(tmp_path / "c.yaml")]) == settings


@pytest.mark.parametrize("name", ["demo", "open_data", "paper", "permissive"])
def test_shipped_presets_load(name):
    from training.run import DEMO

    load(Config, DEMO.with_name(f"{name}.yaml"))


def test_the_defaults_are_the_papers():
    from training.run import DEMO

    paper = load(Config, DEMO.with_name("paper.yaml"))
    assert dataclasses.replace(paper, model=Config().model) == Config()
    assert (paper.optim.lr, paper.optim.batch, paper.optim.epochs, paper.optim.momentum) == (0.1, 32, 300, 0.9)
    assert (paper.optim.weight_decay, paper.meta.lr, paper.model.size) == (1e-4, 6e-5, 224)


def test_what_yaml_may_write_in_another_way(tmp_path):
    text = (
        "optim: {lr: 6e-5, warmup_epochs: 2}\ndata: {roots: one, licences: {one: CC0}}\npairs: {crop_scale: [1, 1]}\n"
    )
    settings = load(Config, write(tmp_path, text))
    assert settings.optim.lr == 6e-5 and settings.optim.warmup_epochs == 2.0
    assert settings.data.roots == ("one",) and settings.pairs.crop_scale == (1.0, 1.0)
    assert load(Config, write(tmp_path, "")) == Config()


@pytest.mark.parametrize(
    "text, message",
    [
        ("optim: {steps: abc}", "optim.steps must be int, got 'abc'"),
        ("optim: {steps: 1.5}", "optim.steps must be int, got 1.5"),
        ("optim: {steps: true}", "optim.steps must be int, got True"),
        ("optim: {lr: fast}", "optim.lr must be float, got 'fast'"),
        ("optim: {lr: true}", "optim.lr must be float, got True"),
        ("optim: {lr: [1]}", "optim.lr must be float"),
        ("optim: {lr: }", "optim.lr must be float, got None"),
        ("optim: 3", "optim must be a mapping, got 3"),
        ("- 3", "the file must be a mapping"),
        ("resume: 1", "resume must be bool, got 1"),
        ("out: 7", "out must be str, got 7"),
        ("pairs: {crop_scale: [a, b]}", "pairs.crop_scale must be"),
        ("pairs: {crop_scale: [0.5]}", "pairs.crop_scale must be"),
        ("pairs: {crop_scale: 0.5}", "pairs.crop_scale must be"),
        ("data: {roots: 3}", "data.roots must be"),
        ("data: {roots: [a, 3]}", "data.roots must be"),
        ("data: {roots: }", "data.roots must be"),
        ("data: {licences: x}", "data.licences must be"),
        ("data: {licences: {2019: x}}", "data.licences must be"),
        ("optim: {speed: 1}", "unknown setting optim.speed; known here: batch, epochs"),
        ("optims: {lr: 1}", "unknown setting optims"),
        ("optim: {lr: 1", "while parsing"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load(Config, path)
    text = str(error.value)
    assert message in text and str(path) in text and "\n" not in text


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load(Config, tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"out: \xe4\xff")
    with pytest.raises(UserError, match="latin.yaml"):
        load(Config, tmp_path / "latin.yaml")
    with pytest.raises(SystemExit, match="name a YAML file"):
        cli(Config, args=["--config"])


@dataclasses.dataclass
class Outer:
    """Settings with two groups of one kind and different defaults."""

    first: Optim = dataclasses.field(default_factory=lambda: Optim(lr=7.0, batch=3))
    """First."""
    second: Optim = dataclasses.field(default_factory=Optim)
    """Second."""


def test_a_group_keeps_its_own_defaults(tmp_path):
    settings = load(Outer, write(tmp_path, "first: {batch: 4}\nsecond: {batch: 5}"))
    assert (settings.first.lr, settings.first.batch) == (7.0, 4)
    assert (settings.second.lr, settings.second.batch) == (0.1, 5)


def test_the_command_line_beats_the_file(tmp_path):
    path = write(tmp_path, "optim: {lr: 0.5, batch: 4}\nmethod: uscl\n")
    settings = cli(Config, args=["--optim.lr", "0.25", "--config", str(path), "--data.roots", "a", "b"])
    assert (settings.optim.lr, settings.optim.batch, settings.method) == (0.25, 4, "uscl")
    assert settings.data.roots == ("a", "b") and settings.pairs == Pairs()
    assert cli(Config, args=[f"--config={path}", "--resume", "True"]).resume
    assert cli(Config, args=["--optim.steps", "3"], fallback=path).optim == Optim(lr=0.5, batch=4, steps=3)
    assert cli(Config, args=["--config", str(path)], fallback="nowhere.yaml").optim.lr == 0.5


@pytest.mark.parametrize(
    "args, resume, decay, seed",
    [
        ([], True, False, 0),
        (["--resume"], True, False, 0),
        (["--no-resume"], False, False, 0),
        (["--resume", "True"], True, False, 0),
        (["--resume=False", "--seed", "3"], False, False, 3),
        (["--resume", "--optim.decay_norm_and_bias", "True", "--seed", "3"], True, True, 3),
        (["--no-resume", "--optim.decay-norm-and-bias", "--seed=3"], False, True, 3),
        (["--optim.no-decay-norm-and-bias", "--resume", "False"], False, False, 0),
    ],
)
def test_flags_also_with_a_value(tmp_path, args, resume, decay, seed):
    """`--resume True` is how flags were given up to version 0.1; the file says True for one and False for the other."""
    path = write(tmp_path, "resume: true\noptim: {decay_norm_and_bias: false}")
    settings = cli(Config, args=args, fallback=path)
    assert (settings.resume, settings.optim.decay_norm_and_bias, settings.seed) == (resume, decay, seed)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--optim.speed", "1"], "--optim.speed"),
        (["--optim.steps", "abc"], "abc"),
        (["--resume", "perhaps"], "perhaps"),
        (["--pairs.crop-scale", "0.5"], "crop-scale"),
    ],
)
def test_mistakes_on_the_command_line(capsys, args, message):
    with pytest.raises(SystemExit) as error:
        cli(Config, args=args)
    assert error.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_help_documents_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as error:
        cli(Config, "The description.", args=["--help"])
    assert error.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "The description." in text
    for name, kind in fields(Config):
        assert f"--{name.replace('_', '-')}" in text, name
        after = inspect.getsource(kind).split(f"    {name.split('.')[-1]}: ", 1)[1].split("\n", 1)[1].lstrip()
        assert after.startswith('"""'), f"{name} has no documentation"
        words = after[3:].split('"""', 1)[0].split()
        assert " ".join(words[:6]) in text, f"{name}: its documentation is not in --help"


def test_the_dump_names_every_setting(tmp_path):
    dump(Config(), tmp_path / "c.yaml")
    written = yaml.safe_load((tmp_path / "c.yaml").read_text())
    for name, _ in fields(Config):
        value = functools.reduce(lambda group, part: group[part], name.split("."), written)
        expected = attrgetter(name)(Config())
        assert value == (list(expected) if isinstance(expected, tuple) else expected)
