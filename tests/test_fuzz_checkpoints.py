"""Checkpoints that are well-formed but hostile: a config.json of wrong values, a safetensors header that does not fit,
a pickle of other instructions. Each is refused in one line that names it, or loaded whole. Nothing else, and soon.

USCL_FUZZ is the number of configurations, of headers and of pickles, each:

    USCL_FUZZ=10000 pytest tests/test_fuzz_checkpoints.py
"""

import io
import json
import logging
import os
import pickletools
import random
import time
import zipfile

import pytest
import timm
import torch
from safetensors.torch import load_file

import uscl_hub
from uscl_hub import checkpoints, models
from uscl_hub.cli import main
from uscl_hub.convert import read_pth
from uscl_hub.errors import CheckpointError
from uscl_hub.tensors import clean

COUNT = int(os.environ.get("USCL_FUZZ", 40))
SECONDS = 120  # of one checkpoint: ends what hangs, on a busy machine too
OURS = "meta_uscl_resnet18"
SMALL = ["test_resnet"] * 6 + ["test_vit", "test_convnext", "test_efficientnet"]
VALUES = [
    *(None, True, False, 0, 1, 2, 3, -1, 7, 64, 65_536, 65_537, 10**6, 2**31, 2**63, 10**400, -(10**400)),
    *(0.0, 0.5, 1e-30, 1e30, float("nan"), float("inf"), "", "x", "3", "fc", "conv1", "conv1.0", "layer1", "\x1b[2J\n"),
    *("\ud800", "../x", "x" * 5000, [], [None], {}, {"a": 1}, [[]], [1], [3], [3, 32, 32], [1, 32, 32], [3, 64, 48]),
    *([3, 0, 0], [3, -1, 5], [3, 1e9, 1], ["a", "b", "c"], [0.1, 0.2, 0.3], [0.5] * 7, ["fc", "layer1.0.conv1"]),
    *([2**70] * 3, [True] * 3, "resnet18", OURS, "test_resnet", "test_resnet.r160_in1k", "hf-hub:a/b"),
]
KEYS = [
    *checkpoints.KEYS,
    *(*sorted(checkpoints.SOURCES), "file", "source", "label_names", "label_descriptions", "notes", "description"),
]
TOP = ["architecture", "num_classes", "num_features", "model_args", "uscl_hub", "pretrained_cfg", "label_names"]
ARGUMENTS = [
    *("layers", "channels", "block", "stem_width", "base_width", "cardinality", "in_chans", "num_classes"),
    *("output_stride", "drop_rate", "act_layer", "norm_layer", "aa_layer", "block_args", "zero_init_last", "img_size"),
    *("depth", "depths", "dims", "embed_dim", "patch_size", "num_heads", "dynamic_img_size", "out_indices", "device"),
    *("pretrained", "checkpoint_path", "features_only", "pretrained_cfg", "use_naflex", "strict_img_size", "dtype"),
    *(
        "global_pool",
        "pretrained_filter_fn",
        "pretrained_strict",
        "feature_cls",
        "scriptable",
        "exportable",
        "no_jit",
        "cache_dir",
    ),
]
INSTRUCTIONS = [
    *(b"N", b"K\x05", b"]", b"}", b")", b"(", b"R", b"b", b"\x81", b"Q", b"J\xff\xff\xff\x7f"),
    *(b"\x8a\x09" + bytes(8) + b"\x01", b"G\x7f\xf8" + bytes(6), b"X\x01\x00\x00\x00a", b"ctorch\nSize\n"),
    *(b"ctorch\nFloatStorage\n", b"cbuiltins\nbytearray\n", b"ctorch._utils\n_rebuild_sparse_tensor\n"),
    *(b"cos\nsystem\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch._utils\n_rebuild_qtensor\n"),
    b"ccollections\nCounter\n",
]


def hostile_config(config: dict, rng: random.Random) -> dict:
    """A copy with one to three wrong, missing, or further values at any place."""
    config = json.loads(json.dumps(config))
    for _ in range(rng.randint(1, 3)):
        table, keys = rng.choice([(config, TOP), (config.get("pretrained_cfg"), KEYS), (None, ARGUMENTS)])
        if table is None:
            table = config["model_args"] = config["model_args"] if isinstance(config.get("model_args"), dict) else {}
        if not isinstance(table, dict):
            continue
        if rng.random() < 0.1 and table:
            del table[rng.choice(list(table))]
        else:
            table[rng.choice(keys)] = json.loads(json.dumps(rng.choice(VALUES)))
    return config


def hostile_header(header: dict, rng: random.Random) -> dict:
    """A copy with other names, dtypes, shapes or places."""
    header = json.loads(json.dumps(header))
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([k for k in header if k != "__metadata__"] or ["x"])
        entry = header.get(name) or {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        kind = rng.randrange(8)
        if kind == 0:
            entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "F4", "C64", 3, None])
        elif kind == 1 and isinstance(entry.get("shape"), list):
            entry["shape"] = rng.choice([[], [0, *entry["shape"]], entry["shape"][::-1], [*entry["shape"], 1], [2**63]])
        elif kind == 2:
            entry["shape"] = rng.choice(VALUES)
        elif kind == 3:
            entry["data_offsets"] = rng.choice([[0, 0], [0, 4], [4, 0], [0, 2**63], [-4, 0], None, [0], "x", [0.5, 1]])
        elif kind == 4:
            header.pop(name, None)
            continue
        elif kind == 5:
            header[rng.choice(["module.", "_orig_mod.", "features.", "", "\x1b[2J", "é" * 300]) + name] = entry
            continue
        elif kind == 6:
            header["__metadata__"] = rng.choice([{"format": "pt"}, {"format": "tf"}, {}, {"a": 1}, [], None, "x"])
            continue
        else:
            entry.update(rng.choice([{"more": 1}, {"shape": [0], "data_offsets": [0, 0]}]))
        header[name] = entry
    return header


def hostile_pickle(data: bytes, rng: random.Random) -> bytes:
    """The pickle with instructions left out, repeated, moved, or with other numbers and names."""
    ops = [(op, arg, at) for op, arg, at in pickletools.genops(data)]
    ends = [at for *_, at in ops[1:]] + [len(data)]
    parts = [data[at:end] for (*_, at), end in zip(ops, ends)]
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(1, len(parts))
        kind = rng.randrange(5)
        if kind == 0:
            del parts[i]
        elif kind == 1:
            parts.insert(i, rng.choice(parts))
        elif kind == 2:
            parts[i] = rng.choice(parts)
        elif kind == 3:
            parts[i] = rng.choice(INSTRUCTIONS)
        else:
            part = bytearray(parts[i])
            part[rng.randrange(len(part))] = rng.randrange(256)
            parts[i] = bytes(part)
    return b"".join(parts)


def attempt(what, act, *places):
    """What `act` returns, or None where it is refused: in one printable line, with one of the places, soon."""
    begin, result = time.monotonic(), None
    try:
        result = act()
    except (CheckpointError, ValueError) as error:
        message = str(error)
        assert message.isprintable() and len(message) < 3000, (what, message)
        assert type(error) is CheckpointError or "the pretrained_cfg's" in message, (what, repr(error))
        assert any(str(place) in message for place in places), (what, message)
    assert time.monotonic() - begin < SECONDS, (what, time.monotonic() - begin)
    return result


def whole(model, file, cfg: dict) -> bool:
    """Whether the model's layers are those of the file, but for the classifier and the first convolution."""
    state, found = clean(load_file(file), file), model.state_dict()
    free = [cfg.get(key) for key in ("first_conv", "classifier")]
    free = [name for names in free for name in ([names] if isinstance(names, str) else names or ())]
    kept = [k for k in found if not any(k.startswith(f"{name}.") for name in free)]
    return len(kept) > 5 and all(torch.equal(found[k], state[k].to(found[k].dtype)) for k in kept)


OPTIONS = [{}, {}, {"num_classes": 2}, {"in_chans": 1}, {"num_classes": 3, "in_chans": 2}, {"features_only": True}]


def try_folder(folder, name, rng, capsys, what) -> bool:
    """Load the folder in one of the ways that it can be, and look at it; whether it could be loaded."""
    options = rng.choice(OPTIONS)
    model = attempt(what, lambda: uscl_hub.load_meta_uscl_backbone(name, checkpoint=folder, **options), folder)
    if model is not None and "features_only" not in options:
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=True).to_dict()
        assert whole(model, folder / "model.safetensors", cfg), (what, options)
        transform = attempt(what, lambda: uscl_hub.create_transform(model, size=8), "pretrained_cfg")
        assert transform is None or transform(torch.rand(9, 9)).shape == (options.get("in_chans", 3), 8, 8), what
    command = rng.choice(["info", "verify"])
    status = main([command, str(folder)])
    out, error = capsys.readouterr()
    assert (status, error.count("\n")) in ((0, 0), (1, 1)) and "\x1b" not in out + error, (what, error)
    assert status == 0 or str(folder) in error, (what, error)
    if command == "verify":
        assert not (status == 0 and options == {} and model is None), what  # what is OK can be loaded
    return model is not None


@pytest.fixture(autouse=True)
def no_warnings_of_timm(monkeypatch):
    monkeypatch.setattr(logging.getLogger("timm"), "level", logging.ERROR)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """architecture -> (its exported folder, config)."""
    found = {}
    for name in [*dict.fromkeys(SMALL), OURS]:
        torch.manual_seed(0)
        timms = "resnet18" if name == OURS else name
        px = 160 if name == "test_vit" else 32
        cfg = models.make_cfg(px, architecture=timms)
        config = {"architecture": timms, "num_classes": 0, "pretrained_cfg": cfg, "uscl_hub": {"method": "test"}}
        state = timm.create_model(timms, num_classes=0).state_dict()
        folder = checkpoints.save_folder(tmp_path_factory.mktemp("fuzz") / name, state, config, "# card\n")
        text = (folder / "config.json").read_text(encoding="utf-8")
        found[name] = folder, {k: v for k, v in json.loads(text).items()}
    return found


def architecture(i: int, rng: random.Random) -> str:
    return OURS if i % 8 == 7 else rng.choice(SMALL)


@pytest.mark.filterwarnings("ignore")
def test_configurations(folders, capsys):
    rng, loaded = random.Random(0), 0
    for i in range(COUNT):
        name = architecture(i, rng)
        folder, config = folders[name]
        hostile = hostile_config({k: v for k, v in config.items()}, rng)
        if rng.random() < 0.7 and isinstance(hostile.get("uscl_hub"), dict):
            hostile["uscl_hub"].pop("sha256", None)
        (folder / "config.json").write_text(json.dumps(hostile), encoding="utf-8")
        loaded += try_folder(folder, name, rng, capsys, (i, name, str(hostile)[:2000]))
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    print(f"{COUNT} hostile configurations: {COUNT - loaded} refused, {loaded} loaded, whole")
    assert 0.05 * COUNT < loaded < 0.8 * COUNT


@pytest.mark.filterwarnings("ignore")
def test_headers(folders, capsys):
    rng, loaded = random.Random(1), 0
    for i in range(COUNT):
        name = architecture(i, rng)
        folder, config = folders[name]
        path = folder / "model.safetensors"
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.dumps(hostile_header(json.loads(content[8:end]), rng)).encode()
        plain = {k: v for k, v in config.items() if k != "uscl_hub"}
        (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
        what = (i, name, header[:500])
        loaded += try_folder(folder, name, rng, capsys, what)
        if name == OURS:
            for overlay in ({"file": str(path)}, {"file": str(path), "num_classes": 3}):
                options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
                attempt(what, lambda: timm.create_model(OURS, **options), path)
            attempt(what, lambda: uscl_hub.load_meta_uscl_backbone(checkpoint=path, in_chans=1), path)
        path.write_bytes(content)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    print(f"{COUNT} hostile headers: {COUNT - loaded} refused, {loaded} loaded, whole")
    assert loaded < 0.8 * COUNT


@pytest.mark.filterwarnings("ignore")
def test_pickles(tmp_path, capsys):
    torch.manual_seed(0)
    buffer = io.BytesIO()
    torch.save({"state_dict": timm.create_model("test_resnet", num_classes=0).state_dict(), "epoch": 3}, buffer)
    with zipfile.ZipFile(buffer) as source:
        entries = {entry.filename: source.read(entry) for entry in source.infolist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    path, rng, read = tmp_path / "x.pth", random.Random(2), 0
    for i in range(COUNT):
        with zipfile.ZipFile(path, "w") as archive:
            for entry, data in entries.items():
                archive.writestr(entry, hostile_pickle(data, rng) if entry == pickled else data)
        state = attempt(i, lambda: read_pth(path), path)
        assert state is None or all(isinstance(v, torch.Tensor) and v.layout == torch.strided for v in state.values())
        if i % 10 == 0:
            assert main(["convert", str(path), str(tmp_path / "out")]) == 1 and not (tmp_path / "out").exists()
            assert capsys.readouterr().err.count("\n") == 1
        read += state is not None
    print(f"{COUNT} hostile pickles: {COUNT - read} refused, {read} read")
    assert 0 < read < COUNT
