"""Local checkpoints through load_meta_uscl_backbone and timm: good ones agree, every bad one is named."""

import json
import os
import pickle
import shutil

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import uscl_hub
from uscl_hub import checkpoints, hub, models
from uscl_hub.checkpoints import CheckpointError

load = uscl_hub.load_meta_uscl_backbone


def export(folder, architecture="resnet18", num_classes=0, px=80, in_chans=3, harm=None, **config):
    torch.manual_seed(3)
    model = timm.create_model(architecture, num_classes=num_classes, in_chans=in_chans).eval()
    state = model.state_dict()
    cfg = models.make_cfg(px, channels=in_chans, architecture=architecture, num_classes=num_classes)
    if harm:
        harm(state)
    checkpoints.save_folder(
        folder,
        state,
        {
            "architecture": architecture,
            "num_classes": num_classes,
            "num_features": 512,
            "pretrained_cfg": cfg,
            "uscl_hub": {"method": "test"},
            **config,
        },
        "# card\n",
    )
    return model


def test_every_door_gives_the_same_features(tmp_path):
    model, x = export(tmp_path / "out"), torch.randn(2, 3, 80, 80)
    y = model(x)
    plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(plain(x), y) and plain.pretrained_cfg["mean"] == [0.18] * 3
    for checkpoint in (tmp_path / "out", str(tmp_path / "out"), tmp_path / "out/model.safetensors"):
        loaded = load(checkpoint=checkpoint)
        assert torch.equal(loaded(x), y) and not loaded.training
        assert uscl_hub.create_transform(loaded)(torch.zeros(9, 9)).shape == (3, 80, 80)
    shutil.copy(tmp_path / "out/model.safetensors", tmp_path / "lone.safetensors")
    assert torch.equal(load(checkpoint=tmp_path / "lone.safetensors")(x), y)
    assert torch.equal(
        timm.create_model("meta_uscl_resnet18", checkpoint_path=tmp_path / "lone.safetensors").eval()(x), y
    )
    assert torch.equal(
        timm.create_model(
            "meta_uscl_resnet18",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(tmp_path / "lone.safetensors")},
        ).eval()(x),
        y,
    )


def test_options_of_load(tmp_path):
    model, x = export(tmp_path / "out"), torch.randn(2, 3, 80, 80)
    assert load(checkpoint=tmp_path / "out", num_classes=7)(x).shape == (2, 7)
    assert [f.shape[1] for f in load(checkpoint=tmp_path / "out", features_only=True)(x)] == [
        64,
        64,
        128,
        256,
        512,
    ]
    maps = load(checkpoint=tmp_path / "out", features_only=True, out_indices=(4,))(x)
    assert torch.equal(maps[0], model.forward_features(x))
    grey = load(checkpoint=tmp_path / "out", in_chans=1)
    torch.testing.assert_close(grey(x[:, :1]), model(x[:, :1].expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-5)
    assert load(pretrained=False)(x).shape == (2, 512)
    for arguments in (
        {"pretrained": False, "checkpoint": tmp_path},
        {"features_only": True, "num_classes": 3},
        {"name": "no_such_model"},
        {"revision": "v1"},
        {"name": "resnet18"},
        {"checkpoint": tmp_path / "out", "revision": "v1"},
    ):
        with pytest.raises(ValueError):
            load(**arguments)


def test_checkpoint_with_a_classifier(tmp_path):
    model, x = export(tmp_path / "out", num_classes=4), torch.randn(2, 3, 80, 80)
    assert torch.equal(load(checkpoint=tmp_path / "out", num_classes=4)(x), model(x))
    assert torch.equal(
        load(checkpoint=tmp_path / "out")(x), model.forward_head(model.forward_features(x), pre_logits=True)
    )
    shutil.copy(tmp_path / "out/model.safetensors", tmp_path / "lone.safetensors")
    assert torch.equal(load(checkpoint=tmp_path / "lone.safetensors", num_classes=4)(x), model(x))
    assert load(checkpoint=tmp_path / "out", num_classes=5)(x).shape == (2, 5)


def test_one_channel_checkpoint_and_other_backbone(tmp_path):
    model = export(tmp_path / "grey", in_chans=1)
    x = torch.randn(2, 1, 80, 80)
    assert torch.equal(load(checkpoint=tmp_path / "grey", in_chans=1)(x), model(x))
    other = export(tmp_path / "other", "resnet10t")
    x = torch.randn(2, 3, 80, 80)
    with pytest.raises(CheckpointError, match="name='resnet10t'"):
        load(checkpoint=tmp_path / "other")
    # this one's stem is not conv1: the exporter would have said so
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["pretrained_cfg"]["first_conv"] = "conv1.0"
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    assert torch.equal(load("resnet10t", checkpoint=tmp_path / "other")(x), other(x))
    export(tmp_path / "fifty", "resnet50")
    with pytest.raises(CheckpointError, match="name='meta_uscl_resnet50'"):
        load(checkpoint=tmp_path / "fifty")
    assert load("meta_uscl_resnet50", checkpoint=tmp_path / "fifty")(x).shape == (2, 2048)


def rename(state, old, new):
    state[new] = state.pop(old)


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda s: s.pop("layer3.0.conv1.weight"), "lacks layer3.0.conv1.weight"),
        (lambda s: s.update(surprise=torch.zeros(2)), "unknown surprise"),
        (lambda s: s.update({"fc.weight": torch.zeros(2, 512)}), "unknown fc.weight"),
        (
            lambda s: s.update({"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}),
            r"layer1.0.conv1.weight \(64, 64, 1, 1\)",
        ),
        (lambda s: s.update({"conv1.weight": torch.zeros(64, 2, 7, 7)}), r"conv1.weight"),
        (lambda s: s["bn1.weight"].fill_(float("nan")), "NaN.*bn1.weight"),
        (lambda s: s["conv1.weight"][0, 0].fill_(float("inf")), "infinite.*conv1.weight"),
        (lambda s: rename(s, "conv1.weight", "features.0.weight"), "uscl-hub convert"),
    ],
)
@pytest.mark.parametrize("num_classes", [0, 3])  # timm loads non-strictly when it replaces the head
def test_weights_that_do_not_fit(tmp_path, harm, message, num_classes):
    export(tmp_path / "out", harm=harm)
    for checkpoint in ("out", "out/model.safetensors"):
        with pytest.raises(CheckpointError, match=message) as error:
            load(checkpoint=tmp_path / checkpoint, num_classes=num_classes)
        assert "model.safetensors" in str(error.value)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.check_folder(tmp_path / "out")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/uscl_hub_bomb",)


def header(length, text=b"{}"):
    return length.to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "0 bytes"),
        (b"abc", "3 bytes"),
        (header(2**60), "claims a header"),
        (header(2**63), "claims a header"),
        (header(2, b"[]"), "damaged"),
        (header(4, b"\xff\xfe{}"), "damaged"),
        (header(3, b"{a}"), "damaged"),
        (header(2) + b"trailing", "damaged"),
        (header(20000, b"[" * 20000), "damaged"),
        (pickle.dumps({"conv1.weight": Bomb()}), "pickle"),
        (None, "pickle"),  # torch.save's zip
    ],
)
def test_files_that_are_not_safetensors(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    if content is None:
        torch.save({"conv1.weight": Bomb()}, path)
    else:
        path.write_bytes(content)
    for name in ("meta_uscl_resnet18", "meta_uscl_resnet34"):
        with pytest.raises(CheckpointError, match=message) as error:
            load(name, checkpoint=path)
        assert str(path) in str(error.value)
    assert not os.path.exists("/tmp/uscl_hub_bomb")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        "nothing",
        {"dtype": "F32", "shape": [2], "data_offsets": ["a", "b"]},
        {"dtype": "F32", "shape": [[2]], "data_offsets": [0, 8]},
        {"dtype": [], "shape": [2], "data_offsets": [0, 8]},
    ],
)
def test_headers_that_lie(tmp_path, entry):
    path, text = tmp_path / "x.safetensors", json.dumps({"conv1.weight": entry}).encode()
    path.write_bytes(header(len(text), text) + bytes(8))
    with pytest.raises(CheckpointError, match="damaged|gaps") as error:
        load(checkpoint=path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("length", [0x180, 0x4B50])  # little-endian, a pickle's first byte, and a zip's first two
def test_a_header_whose_length_looks_like_a_pickle(tmp_path, length):
    text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    (tmp_path / "x.safetensors").write_bytes(header(length, text) + bytes(4))
    assert checkpoints.load_tensors(tmp_path / "x.safetensors")["a"].item() == 0


def test_truncated_anywhere(tmp_path):
    export(tmp_path / "out")
    data = (tmp_path / "out/model.safetensors").read_bytes()
    for size in (7, 8, 100, 5000, 30_000, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="cut.safetensors"):
            load(checkpoint=tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("architecture"), "architecture"),
        (lambda c: c["pretrained_cfg"].update(provenance=1), "provenance"),
        (lambda c: c["pretrained_cfg"].update(input_size="big"), "input_size"),
        (lambda c: c["pretrained_cfg"].update(input_size=[3, 0, 1]), "input_size"),
        (lambda c: c.update(num_classes="many"), "num_classes"),
        (lambda c: c.update(model_args=[1]), "model_args"),
        (lambda c: c.update(model_args={"checkpoint_path": "/x.pth"}), "model_args .* not checkpoint_path"),
        (lambda c: c.update(model_args={"pretrained": True}), "model_args .* not pretrained"),
        (lambda c: c.update(pretrained_cfg=3), "pretrained_cfg"),
        (lambda c: c["pretrained_cfg"].update(mean="dark"), "pretrained_cfg.mean is 'dark'"),
        (lambda c: c["pretrained_cfg"].update(std=[0.2, 0, 0.2]), "pretrained_cfg.std"),
        (lambda c: c["pretrained_cfg"].update(std=float("nan")), "pretrained_cfg.std"),
        (lambda c: c["pretrained_cfg"].update(first_conv=5), "pretrained_cfg.first_conv"),
        (lambda c: c["pretrained_cfg"].update(classifier={"a": 1}), "pretrained_cfg.classifier"),
    ],
)
def test_config_that_timm_would_trip_over(tmp_path, change, message):
    export(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    change(config)
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as error:
        load(checkpoint=tmp_path / "out")
    assert "config.json" in str(error.value)


def test_missing_things_are_named(tmp_path):
    for checkpoint, message in (
        (tmp_path / "nope.safetensors", "nope.safetensors"),
        (tmp_path, "config.json"),
        ("no_such_tag", "no_such_tag"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(checkpoint=checkpoint)
    export(tmp_path / "out")
    (tmp_path / "out/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors: no such file"):
        load(checkpoint=tmp_path / "out")
    os.truncate(tmp_path / "out/config.json", 1 << 30)
    with pytest.raises(CheckpointError, match="config.json: is too large"):
        load(checkpoint=tmp_path / "out")
    (tmp_path / "out/config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: is not readable JSON"):
        load(checkpoint=tmp_path / "out")


def test_pickle_beside_is_never_a_fallback(tmp_path):
    export(tmp_path / "out")
    (tmp_path / "out/model.safetensors").unlink()
    torch.save({"conv1.weight": Bomb()}, tmp_path / "out/pytorch_model.bin")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load(checkpoint=tmp_path / "out")
    with pytest.raises(CheckpointError, match="pickle"):
        timm.create_model(
            "meta_uscl_resnet18",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(tmp_path / "out/pytorch_model.bin")},
        )
    for name in ("meta_uscl_resnet18", "meta_uscl_resnet34"):  # one has a release, the other has none
        with pytest.raises(CheckpointError, match="URL"):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"url": "http://x/y.pth"})
        with pytest.raises(CheckpointError, match="org/name.*HF_HUB_OFFLINE"):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "org/name"})


def test_weights_that_are_not_those_of_the_provenance(tmp_path):
    export(tmp_path / "out", uscl_hub={"method": "test", "sha256": "0" * 64})
    for read in (checkpoints.check_folder, lambda folder: load(checkpoint=folder)):
        with pytest.raises(CheckpointError, match="model.safetensors: its SHA-256"):
            read(tmp_path / "out")


def test_model_args_that_make_no_model(tmp_path):
    for i, arguments in enumerate(({"layers": "abc"}, {"nothing": 1}, {"channels": [10**12] * 4}, {"block": "x"})):
        export(tmp_path / str(i), model_args=arguments)
        with pytest.raises(CheckpointError, match="config.json: timm cannot make a resnet18"):
            checkpoints.check_folder(tmp_path / str(i))


def test_a_config_does_not_say_where_weights_come_from(tmp_path):
    model, x = export(tmp_path / "out"), torch.randn(2, 3, 80, 80)
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["pretrained_cfg"].update(
        file="../../etc/passwd", url="http://127.0.0.1:9/x.pth", hf_hub_id="org/other", custom_load="hf", source="url"
    )
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    assert torch.equal(load(checkpoint=tmp_path / "out")(x), model(x))


@pytest.mark.parametrize(
    "name", ["../out", "org/../../out", "..", "org/..", "/etc/passwd", "org/a\\..\\b", "a/b/c", ""]
)
def test_names_that_lead_elsewhere(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError):
        load(checkpoint=name)
    assert not hub.is_repo_id(name)


def test_a_tensor_named_like_a_path_is_only_an_unknown_name(tmp_path):
    export(tmp_path / "in/out", harm=lambda s: s.update({"../../../evil": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="unknown ../../../evil"):
        load(checkpoint=tmp_path / "in/out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(
            st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
            st.lists(st.integers(0, 5), max_size=4),
        ),
        max_size=6,
    )
)
def test_any_safetensors_file_is_read_as_it_was_written(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    state = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in entries.items()}
    checkpoints.save_tensors(state, path)
    assert {k: tuple(e["shape"]) for k, e in checkpoints.read_header(path).items()} == {
        k: tuple(v.shape) for k, v in state.items()
    }
    found = checkpoints.load_tensors(path)
    assert found.keys() == state.keys() and all(torch.equal(found[k], v) for k, v in state.items())


def test_save_folder_is_whole_or_not_at_all(tmp_path):
    with pytest.raises(TypeError):
        checkpoints.save_folder(tmp_path / "out", {"a": torch.zeros(1)}, {"bad": object()}, "")
    assert list(tmp_path.iterdir()) == []
    export(tmp_path / "out")
    with pytest.raises(FileExistsError, match="out"):
        export(tmp_path / "out")
