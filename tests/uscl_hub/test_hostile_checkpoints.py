"""Checkpoints that ask for the impossible: refused by name in one line, at once, before anything is allocated."""

import errno
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
import zipfile

import fresh
import pytest
import timm
import torch
from helpers import ROOT
from safetensors.torch import save_file

import uscl_hub
from uscl_hub import checkpoints, models, registry, tensors
from uscl_hub.checkpoints import check_folder
from uscl_hub.cli import main
from uscl_hub.convert import read_pth
from uscl_hub.errors import CheckpointError

load = uscl_hub.load_meta_uscl_backbone


def state_of(architecture="test_resnet", **options):
    torch.manual_seed(0)
    return timm.create_model(architecture, **{"num_classes": 0, **options}).state_dict()


def export(folder, state=None, architecture="test_resnet", cfg=None, **config):
    cfg = {**models.make_cfg(32, architecture=architecture), **(cfg or {})}
    config = {"architecture": architecture, "num_classes": cfg["num_classes"], "pretrained_cfg": cfg, **config}
    return checkpoints.save_folder(folder, state_of(architecture) if state is None else state, config, "# card\n")


def refused(read, *words):
    """The message of the CheckpointError that `read` raises soon."""
    begin = time.monotonic()
    with pytest.raises(CheckpointError) as error:
        read()
    message = str(error.value)
    assert time.monotonic() - begin < 120 and "\n" not in message
    for word in words:
        assert word in message, message
    return message


# -------------------------------------------------------------------------------------------- values of weights


@pytest.mark.parametrize(
    "name, value, word",
    [
        ("conv1.weight", lambda v: v.double().fill_(1e300), "infinite"),  # finite only before the cast
        ("conv1.weight", lambda v: -v.double().fill_(1e39), "infinite"),
        ("bn1.weight", lambda v: v.fill_(1e30), "absurdly large"),
        ("bn1.bias", lambda v: v.bfloat16().fill_(float("-inf")), "infinite"),
        ("layer1.0.bn1.running_mean", lambda v: v.half().fill_(float("nan")), "NaN"),
        ("bn1.running_var", lambda v: -v, "negative variances"),
        ("layer4.1.bn2.running_var", lambda v: v.double().fill_(-1e-3), "negative variances"),
        ("layer1.0.conv1.weight", lambda v: v.to(torch.int8), "floating point"),
        ("layer1.0.conv1.weight", lambda v: v > 0, "floating point"),
    ],
)
def test_values_that_nothing_can_be_calculated_with(tmp_path, name, value, word):
    state = state_of("resnet18")
    state[name] = value(state[name]).contiguous()
    folder = export(tmp_path / "out", state, "resnet18")
    shutil.copy(folder / "model.safetensors", tmp_path / "lone.safetensors")
    for checkpoint in (folder, tmp_path / "lone.safetensors"):
        for options in ({}, {"num_classes": 3}, {"in_chans": 1}, {"features_only": True}):
            refused(lambda: load(checkpoint=checkpoint, **options), checkpoint.name.split(".")[0], name, word)
    refused(lambda: check_folder(folder), "model.safetensors", name, word)


def test_half_and_double_weights_are_the_same_network(tmp_path):
    state = {k: v.half().float() if v.is_floating_point() else v for k, v in state_of("resnet18").items()}
    x, found = torch.rand(2, 3, 64, 64), []
    for dtype in (torch.float16, torch.float32, torch.float64):
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        found.append(load(checkpoint=export(tmp_path / str(dtype), cast, "resnet18"))(x))
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


# --------------------------------------------------------------------------------- layers that hide, or are too many


@pytest.mark.parametrize("classifier", ["layer4.0.conv1", ["fc", "layer4.0.conv1"], "layer4", "", ["layer1"]])
@pytest.mark.parametrize("architecture", ["resnet18", "test_resnet"])
def test_no_layer_hides_behind_the_classifier(tmp_path, classifier, architecture):
    state = {k: v for k, v in state_of(architecture, num_classes=3).items() if not k.startswith("layer4.0.conv1")}
    cfg = {"classifier": classifier, "num_classes": 3}
    folder, name = (
        export(tmp_path / "out", state, architecture, cfg),
        architecture.replace("resnet18", "meta_uscl_resnet18"),
    )
    for options in ({}, {"num_classes": 3}, {"num_classes": 5}):
        refused(lambda: load(name, checkpoint=folder, **options), "config.json", "classifier", "'fc'")
    refused(lambda: check_folder(folder), "classifier")
    content = json.loads((folder / "config.json").read_text())
    content["pretrained_cfg"]["classifier"] = None  # the architecture's own then
    (folder / "config.json").write_text(json.dumps(content))
    for options in ({}, {"num_classes": 3}, {"num_classes": 5}):
        refused(lambda: load(name, checkpoint=folder, **options), "model.safetensors", "lacks layer4.0.conv1.weight")


@pytest.mark.parametrize("harm", [lambda s: s.pop("fc.bias"), lambda s: s.update({"fc.weight": torch.zeros(4, 512)})])
@pytest.mark.parametrize("num_classes", [0, 3, 7])
def test_a_classifier_is_whole_or_absent(tmp_path, harm, num_classes):
    state = state_of("resnet18", num_classes=3)
    harm(state)
    folder = export(tmp_path / "out", state, "resnet18", {"num_classes": 3})
    refused(lambda: load(checkpoint=folder, num_classes=num_classes), "model.safetensors", "fc.")


@pytest.mark.parametrize(
    "architecture, arguments",
    [
        ("resnet18", {"layers": [1_000_000, 1, 1, 1]}),
        ("resnet18", {"layers": [60_000, 2, 2, 2]}),
        ("resnet18", {"channels": [10**9] * 4}),
        ("resnet18", {"base_width": 10**300}),
        ("vit_tiny_patch16_224", {"depth": 50_000}),
        ("vit_tiny_patch16_224", {"embed_dim": 10**12}),
        ("convnext_atto", {"depths": [60_000] * 4}),
        ("resnet18", {"block_args": [[{"deep": [2**80]}]]}),
    ],
)
def test_a_config_cannot_ask_for_more_than_the_file_holds(tmp_path, architecture, arguments):
    folder = export(tmp_path / "out", state_of(), architecture, model_args=arguments)
    message = refused(lambda: check_folder(folder), "config.json", f"timm cannot make a {architecture}")
    assert len(message) < 500
    assert main(["verify", str(folder)]) == 1


SMALLER = [("resnet18", {"layers": [1, 1, 1, 1]}), ("convnext_atto", {"depths": [1, 1, 1, 1]})]


@pytest.mark.parametrize("options", [{}, {"num_classes": 5}, {"in_chans": 1}, {"num_classes": 2, "in_chans": 1}])
@pytest.mark.parametrize("architecture, arguments", SMALLER)
def test_the_arguments_that_an_architecture_was_made_with(tmp_path, architecture, arguments, options):
    """No layer may stay random because the network is built with others than the file's."""
    state = state_of(architecture, **arguments)
    folder = export(tmp_path / "out", state, architecture, model_args={**arguments, "in_chans": 3, "num_classes": 0})
    model = load(architecture.replace("resnet18", "meta_uscl_resnet18"), checkpoint=folder, **options)
    found, free = model.state_dict(), ("conv1.", "stem.0.", "fc.", "head.fc.")
    kept = [name for name in found if not name.startswith(free)]
    assert len(kept) > 10 and all(torch.equal(found[name], state[name]) for name in kept)
    check_folder(folder)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("pretrained_strict", False),
        ("pretrained_filter_fn", None),
        ("checkpoint_path", "x.pth"),
        ("pretrained_cfg", {}),
        ("pretrained_cfg_overlay", {"file": "x.pth"}),
        ("device", "meta"),
        ("dtype", "float16"),
        ("scriptable", True),
    ],
)
def test_a_config_does_not_decide_how_weights_are_loaded(tmp_path, argument, value):
    for name in ("resnet18", "test_resnet"):
        folder = export(tmp_path / name, state_of(name), name, model_args={argument: value})
        refused(lambda: load(registry.our_name(name), checkpoint=folder), "config.json", "model_args", argument)
        refused(lambda: check_folder(folder), "config.json", argument)


@pytest.mark.parametrize("key", ["in_chans", "img_size", "num_classes"])
@pytest.mark.parametrize("value", ["x", -1, 10**400, 65_537, [1, "x"], {}, 1e9, True])
def test_wrong_values_that_reach_the_config_by_its_model_args(tmp_path, key, value):
    cfg = {"input_size": (3, 160, 160)}
    folder = export(tmp_path / "out", state_of("test_vit"), "test_vit", cfg, model_args={key: value})
    for options in ({}, {"num_classes": 2, "in_chans": 1}):
        try:
            model = load("test_vit", checkpoint=folder, **options)
        except CheckpointError as error:
            assert str(folder) in str(error) and str(error).isprintable()
        else:  # the caller's come first, and the config's own
            assert key == "num_classes" or (key, value) == ("in_chans", True), model


def test_maps_of_a_network_whose_last_layers_are_left_out(tmp_path):
    name = "meta_uscl_efficientnet_lite0"
    for classes in (0, 3):
        state, cfg = state_of("tf_efficientnet_lite0", num_classes=classes), {"num_classes": classes}
        model = load(
            name, checkpoint=export(tmp_path / f"{classes}", state, "tf_efficientnet_lite0", cfg), features_only=True
        )
        found = model.state_dict()
        assert len(found) > 200 and all(torch.equal(value, state[key]) for key, value in found.items())


@pytest.mark.parametrize("shape", [[64, 200_000_000, 0, 7], [64, 2**40, 7, 0], [64, 0, 7, 7], [0], [], [64, 3, 7]])
@pytest.mark.parametrize("name", ["conv1.weight", "fc.weight"])
def test_a_header_is_not_believed(tmp_path, name, shape):
    content = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0 if 0 in shape else 4 * 64 * 3 * 7]}}
    text = json.dumps(content).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(content[name]["data_offsets"][1]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: load(checkpoint=path), "x.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # kB


def test_channels_and_classes_of_a_config_are_those_of_the_file(tmp_path):
    for i, cfg in enumerate(
        ({"num_classes": 1_000_000}, {"input_size": [65_536, 64, 64]}, {"input_size": [1, 64, 64]})
    ):
        folder = export(tmp_path / str(i), state_of("resnet18"), "resnet18", cfg)
        refused(lambda: load(checkpoint=folder, num_classes=2), "model.safetensors")
        refused(lambda: check_folder(folder), "model.safetensors")


def test_more_tensors_than_any_network_has(tmp_path):
    save_file({f"{i}": torch.zeros(0) for i in range(tensors.MAX_TENSORS + 1)}, tmp_path / "x.safetensors")
    refused(lambda: load(checkpoint=tmp_path / "x.safetensors"), "x.safetensors", "20001 tensors")


# ------------------------------------------------------------------------------------------ what is no regular file


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/full", "folder", "socket"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_only_regular_files_are_opened(tmp_path, name, kind):
    """In a process of its own, with its time and memory limited: it could wait, or read for ever."""
    folder = export(tmp_path / "out")
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    elif kind == "socket":
        code = "import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, name], cwd=folder, check=True)
    else:
        (folder / name).symlink_to(kind)
    code = """
import resource, signal, sys, uscl_hub.cli, uscl_hub.load
signal.alarm(300)
resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
raise SystemExit(uscl_hub.cli.main(["verify", sys.argv[1]]) + 10 * uscl_hub.cli.main(["info", sys.argv[1]]))
"""
    run = fresh.run(code, folder, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 11 and "Traceback" not in run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("uscl-hub: ")]
    assert len(lines) == 2 and all(f"{name}: is a" in line and "not a regular file" in line for line in lines)


def test_a_lone_pipe_and_a_pickle_of_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "x")
    refused(lambda: load(checkpoint=tmp_path / "x"), "x: is a named pipe")
    refused(lambda: read_pth(tmp_path / "x"), "x: is a named pipe")


# ---------------------------------------------------------------------------------------------------- config.json

WRONG = [None, True, -1, 1.5, 10**400, float("nan"), "x", "", [], [None], {}, {"a": 1}, [[1]], [1, 2, 3], "\x1b[2J\n"]


def whole(tmp_path):
    folder = export(tmp_path / "out", uscl_hub={"method": "test"})
    return folder, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("place", ["top", "pretrained_cfg", "uscl_hub"])
@pytest.mark.slow
def test_wrong_types_anywhere_in_a_config(tmp_path, capsys, place):
    """Either it does not matter and all works, or one line of error names the file; for programs, JSON."""
    folder, config = whole(tmp_path)
    keys = {
        "top": [*config, "model_args", "more"],
        "pretrained_cfg": [*models.make_cfg(), "label_offset", "test_input_size", "license", "tag", "architecture"],
        "uscl_hub": ["method", "sha256", "clips", "metrics"],
    }[place]
    for key in keys:
        for value in WRONG:
            changed = json.loads(json.dumps(config))
            (changed if place == "top" else changed[place])[key] = value
            (folder / "config.json").write_text(json.dumps(changed))
            for command in ("info", "verify"):
                status = main([command, str(folder)])
                out, error = capsys.readouterr()
                assert "\x1b" not in out + error
                assert (status, error.count("\n")) in ((0, 0), (1, 1)), error
                assert status == 0 or str(folder) in error
            try:
                model = load("test_resnet", checkpoint=folder, num_classes=2)
            except CheckpointError as failure:
                assert str(folder) in str(failure) and str(failure).isprintable()
            else:
                assert uscl_hub.create_transform(model)(torch.rand(40, 40)).shape == (3, 32, 32), (key, value)


@pytest.mark.parametrize("key", ["input_size", "mean", "std"])
@pytest.mark.parametrize("absent", [True, False])
def test_what_timm_would_make_imagenets_is_needed(tmp_path, key, absent):
    folder, config = whole(tmp_path)
    config["pretrained_cfg"][key] = None
    if absent:
        del config["pretrained_cfg"][key]
    (folder / "config.json").write_text(json.dumps(config))
    refused(lambda: load("test_resnet", checkpoint=folder), "config.json", f"pretrained_cfg.{key} is null, expected")


@pytest.mark.parametrize("mean, std", [(0.3, 0.2), ([0.3], [0.2]), ([0.3] * 3, 0.2), (0.3, [0.2] * 4)])
def test_one_number_for_all_channels(tmp_path, capsys, mean, std):
    folder, config = whole(tmp_path)
    config["pretrained_cfg"].update(mean=mean, std=std)
    (folder / "config.json").write_text(json.dumps(config))
    transform = uscl_hub.create_transform(load("test_resnet", checkpoint=folder))
    assert torch.allclose(transform(torch.ones(9, 9)), torch.full((3, 32, 32), 0.7 / 0.2))
    assert main(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] == [0.3] * 3


@pytest.mark.parametrize("key", ["mean", "std"])
@pytest.mark.parametrize("values", [[0.5, 0.6], [0.5, 0.5, 0.5, 0.4], []])
def test_as_many_numbers_as_channels(tmp_path, key, values):
    folder, config = whole(tmp_path)
    config["pretrained_cfg"][key] = values
    (folder / "config.json").write_text(json.dumps(config))
    refused(lambda: load("test_resnet", checkpoint=folder), "config.json", f"pretrained_cfg.{key}", "one")


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'"x"', b"\xff\xfe{}", b"[" * 100_000, b"{}", b'{"a": 1'])
def test_files_that_are_no_config(tmp_path, content):
    folder, _ = whole(tmp_path)
    (folder / "config.json").write_bytes(content)
    refused(lambda: load("test_resnet", checkpoint=folder), "config.json", "Export the folder again")


def test_a_config_that_cannot_be_read_is_no_matter_of_json(tmp_path):
    folder, _ = whole(tmp_path)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    message = refused(lambda: load("test_resnet", checkpoint=folder), "config.json", "cannot be read")
    assert "JSON" not in message


@pytest.mark.parametrize("checkpoint", ["", "x" * 5000, "a\x00b", "\x1b[2J", "~nobody/x", "/", "\ud800"])
def test_names_of_nothing(tmp_path, checkpoint):
    message = refused(lambda: load(checkpoint=checkpoint))
    assert message.isprintable() and len(message) < 600


@pytest.mark.parametrize("argument", ["num_classes", "in_chans"])
@pytest.mark.parametrize("value", [-1, "3", 2.0, None, [3]])
def test_numbers_that_are_none(argument, value):
    for options in ({"pretrained": False}, {}, {"checkpoint": "nc"}):
        with pytest.raises(ValueError, match=argument):
            load(**options, **{argument: value})


@pytest.mark.parametrize("checkpoint", [5, b"nc", ["nc"], {}, 0.5])
def test_checkpoints_that_have_no_name(checkpoint):
    with pytest.raises(TypeError, match="checkpoint is .*, expected a released tag"):
        load(checkpoint=checkpoint)


@pytest.fixture
def full_disk():
    """No file may grow beyond 1 MB, as where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_by_the_result(tmp_path, full_disk):
    with pytest.raises(OSError) as error:
        export(tmp_path / "out", state_of("resnet18"), "resnet18")
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_a_full_disk_does_not_end_the_program(tmp_path, full_disk, capsys, format):
    """torch's own writers abort, or leave half a file."""
    assert main(["export", "nc", "-o", str(tmp_path / "model"), "--format", format]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("uscl-hub: ") and str(tmp_path / "model") in line
    assert list(tmp_path.iterdir()) == []


def test_a_result_by_a_link_to_an_empty_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    export(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and check_folder(tmp_path / "real")


# ------------------------------------------------------------------------------------------------ prefixes of names


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("options", [{}, {"num_classes": 5}, {"in_chans": 1}, {"in_chans": 1, "num_classes": 2}])
def test_names_of_parallel_and_compiled_models(tmp_path, prefix, options):
    state = state_of("resnet18", **options)
    prefixed = {prefix + name: value for name, value in state.items()}
    save_file(prefixed, tmp_path / "lone.safetensors")
    cfg = models.make_cfg(32, channels=options.get("in_chans", 3), num_classes=options.get("num_classes", 0))
    for checkpoint in (tmp_path / "lone.safetensors", export(tmp_path / "out", prefixed, "resnet18", cfg)):
        found = load(checkpoint=checkpoint, **options).state_dict()
        assert found.keys() == state.keys() and all(torch.equal(found[k], v) for k, v in state.items())
        assert load(checkpoint=checkpoint, in_chans=3, num_classes=4) is not None
    check_folder(tmp_path / "out")


def test_names_twice(tmp_path):
    state = state_of("resnet18")
    save_file({**state, "module.conv1.weight": state["conv1.weight"] + 1}, tmp_path / "x.safetensors")
    refused(lambda: load(checkpoint=tmp_path / "x.safetensors"), "x.safetensors", "names twice")


@pytest.mark.parametrize("name", ["state_dict", "model", "model_ema", "state_dict_ema"])
def test_tensors_named_as_timm_names_its_wrappers(tmp_path, name):
    save_file({**state_of("resnet18"), name: torch.zeros(2)}, tmp_path / "x.safetensors")
    refused(lambda: load(checkpoint=tmp_path / "x.safetensors"), "x.safetensors", f"unknown {name}")


# ------------------------------------------------------------------------------------------------------ .pth files


def pth(path, data):
    """A .pth file of torch.save's format whose pickle is `data`."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, data if entry.filename.endswith("data.pkl") else source.read(entry))
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02.",
        b"\x80\x02}.",
        b"\x80\x02K\x05.",
        b"\x80\x02ccollections\nOrderedDict\nK\x05\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n)R}b.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch\nSize\nK\x05\x85R.",
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (100 << 30).to_bytes(6, "little") + b"\x85R.",
        b"\x80\x02cbuiltins\nbytearray\nK\x08\x85R.",
        b"\x80\x02(" * 1000,
        b"\x80\x02h\x07.",
        b"\x80\x02\x8a\xff.",
        pickle.dumps({"a": 1}),
        pickle.dumps({"state_dict": None}),
        pickle.dumps({"state_dict": {}}),
        pickle.dumps({"state_dict": {1: 2}}),
    ],
)
def test_pickles_that_hold_no_tensors(tmp_path, data, capsys):
    path = pth(tmp_path / "x.pth", data)
    refused(lambda: read_pth(path), "x.pth")
    (tmp_path / "old.pth").write_bytes(data)  # as before PyTorch 1.6: no archive
    refused(lambda: read_pth(tmp_path / "old.pth"), "old.pth")
    assert main(["convert", str(path), str(tmp_path / "out")]) == 1 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.to_sparse(),
        lambda v: v.to("meta"),
        lambda v: v.to(torch.complex64),
        lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
        lambda v: v.double() + 1e300,
        lambda v: v.to(torch.int32),
        lambda v: torch.zeros(1).expand(10**9),
        lambda v: torch.zeros(1).as_strided(v.shape, (0,) * v.dim()).expand(v.shape) * float("nan"),
        lambda v: torch.nested.nested_tensor([v, v]),
        lambda v: v.half() * float("inf"),
    ],
)
def test_tensors_that_are_not_plain_numbers(tmp_path, change):
    stages = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    state = {}
    for name, value in state_of("resnet18").items():
        stage, _, rest = name.partition(".")
        state[f"features.{stages[stage]}.{rest}"] = value
    state["features.0.weight"] = change(state["features.0.weight"])
    torch.save(state, tmp_path / "x.pth")
    assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()
