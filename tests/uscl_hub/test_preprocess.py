"""One definition of preprocessing: every kind of image, against PIL, torchvision and timm."""

import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.utils import prune
from torchvision.transforms import Resize

import uscl_hub
from uscl_hub.preprocess import create_transform, normalise, resize, to_grey


def picture(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "LA", "YCbCr", "1"])
def test_every_pil_mode_is_pil_luma(mode):
    image = Image.fromarray(picture((31, 47, 3))).convert(mode)
    assert np.array_equal(to_grey(image), np.array(image.convert("L")))


def test_sixteen_bit_rounds_over_the_whole_range():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    want = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(to_grey(values), want)
    assert np.array_equal(to_grey(Image.fromarray(values)), want)  # I;16
    assert np.array_equal(to_grey(Image.fromarray(values.astype(np.int32))), want)  # I
    assert np.array_equal(to_grey(values.astype(">u2")), want)
    assert np.array_equal(to_grey(torch.from_numpy(values)), want)


@pytest.mark.parametrize("image", [np.uint16, Image.fromarray, torch.from_numpy], ids=["array", "PIL", "tensor"])
def test_twelve_of_sixteen_bits_are_said(image):
    with pytest.warns(UserWarning, match="no value above 4095: of 65535, that is nearly black"):
        assert to_grey(image(np.full((4, 4), 4095, np.uint16))).max() == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_grey(image(np.full((4, 4), 4096, np.uint16)))
        to_grey(image(np.zeros((4, 4), np.uint16)))


@pytest.mark.parametrize("mode, source", [("La", "LA"), ("LAB", "LAB")])
def test_a_mode_without_grey_is_named(mode, source):
    image = Image.new(source, (4, 4)).convert(mode)
    with pytest.raises(ValueError, match=f"image of mode {mode} has no grey: convert it to L or RGB first"):
        to_grey(image)


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_arrays_and_tensors_agree(channels):
    array = picture((20, 30) if channels is None else (20, 30, channels))
    grey = to_grey(array)
    assert grey.shape == (20, 30) and grey.dtype == np.uint8
    tensor = torch.from_numpy(array if channels is None else array.transpose(2, 0, 1).copy())
    assert np.array_equal(to_grey(tensor), grey)
    assert np.array_equal(to_grey(tensor.float() / 255), grey)
    assert np.array_equal(to_grey(array.astype(np.float64) / 255), grey)
    if channels == 3:
        assert np.array_equal(grey, np.array(Image.fromarray(array).convert("L")))


@pytest.mark.parametrize(
    "image, message",
    [
        (np.full((4, 4), np.nan, np.float32), "NaN"),
        (np.array([[0, np.inf]]), "NaN"),
        (np.full((4, 4), 255.0), r"expected \[0, 1\]"),
        (np.full((4, 4), -0.5), r"expected \[0, 1\]"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
        (np.zeros((3, 40, 40), np.uint8), r"\(3, 40, 40\)"),
        (np.zeros((0, 4), np.uint8), "no pixels"),
        (np.zeros(4, np.uint8), r"\(4,\)"),
        (torch.zeros(2, 4, 4), r"\(2, 4, 4\)"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), "70000"),
        (Image.fromarray(np.full((4, 4), 200.0, np.float32)), r"expected \[0, 1\]"),
    ],
)
def test_bad_images_are_named(image, message):
    with pytest.raises(ValueError, match=message):
        to_grey(image)


def test_not_an_image():
    with pytest.raises(TypeError, match="str"):
        to_grey("scan.png")


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 70), seed=st.integers(0, 99))
def test_resize_is_torchvisions(height, width, size, seed):
    grey = picture((height, width), seed)
    assert np.array_equal(resize(grey, size), np.array(Resize((size, size))(Image.fromarray(grey))))


def test_normalise_shapes_and_values():
    clip = picture((5, 8, 8))
    x = normalise(clip)
    assert x.shape == (5, 3, 8, 8) and x.dtype == torch.float32
    assert torch.equal(x[2], normalise(clip[2]))
    assert torch.allclose(x[:, 1], (torch.from_numpy(clip) / 255 - 0.18) / 0.24, atol=1e-6)
    assert torch.equal(
        normalise(clip, 3, (0.1, 0.2, 0.3), (1.0, 1.0, 2.0))[0, 2],
        (torch.from_numpy(clip[0]) / 255 - 0.3) / 2,
    )


@pytest.mark.parametrize("name", ["meta_uscl_resnet18", "meta_uscl_resnet50"])
@pytest.mark.parametrize("shape", [(64, 64), (123, 201), (30, 17)])
def test_the_same_as_timms_transform(name, shape):
    model = timm.create_model(name)
    image = Image.fromarray(picture(shape))
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    assert torch.equal(uscl_hub.create_transform(model)(image), theirs(image.convert("RGB")))


def test_transform_follows_the_model():
    image = picture((50, 60))
    one = timm.create_model("meta_uscl_resnet18.nc", in_chans=1)
    assert uscl_hub.create_transform(one)(image).shape == (1, 64, 64)
    maps = timm.create_model("meta_uscl_resnet18.nc", in_chans=1, features_only=True)
    assert uscl_hub.create_transform(maps)(image).shape == (1, 64, 64)
    assert uscl_hub.create_transform(one, size=96)(image).shape == (1, 96, 96)
    assert uscl_hub.create_transform(one.pretrained_cfg)(image).shape == (3, 64, 64)
    imagenet = uscl_hub.create_transform(timm.create_model("resnet18"))(image)
    assert imagenet.shape == (3, 224, 224) and not torch.equal(imagenet[0], imagenet[1])
    transform = uscl_hub.create_transform(one)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), transform(image))  # for data loader workers
    with pytest.raises(ValueError, match="pretrained_cfg"):
        uscl_hub.create_transform(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="1 channel"):
        uscl_hub.create_transform(timm.create_model("resnet18", in_chans=1))


def grey_model(**options):
    return timm.create_model("meta_uscl_resnet18", in_chans=1, **options).eval()


FEATURES = ("list", "dict", "hook", "fx", "getter")


def calibrated(model):
    model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    prepared = torch.ao.quantization.prepare(model)
    prepared(torch.zeros(1, 1, 64, 64))
    return torch.ao.quantization.convert(prepared)


def pruned(model):
    prune.l1_unstructured(model.conv1, "weight", 0.5)
    model.register_forward_hook(lambda *arguments: None)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda: torch.compile(grey_model(), backend="eager"),
        lambda: torch.nn.DataParallel(grey_model()),
        lambda: torch.nn.Sequential(grey_model(), torch.nn.Linear(512, 2)),
        lambda: torch.ao.quantization.quantize_dynamic(grey_model(num_classes=3)),
        lambda: calibrated(grey_model()),
        lambda: pruned(grey_model()),
        lambda: grey_model(scriptable=True, exportable=True),
        *(
            partial(grey_model, features_only=True, feature_cls=kind)
            for kind in ("list", "dict", "hook", "fx", "getter")
        ),
        lambda: timm.create_model("meta_uscl_efficientnet_lite0", in_chans=1, features_only=True),
        lambda: torch.compile(timm.create_model("test_vit", in_chans=1, num_classes=0), backend="eager"),
        lambda: timm.create_model("test_resnet", in_chans=1).half(),
    ],
)
def test_transform_of_a_model_in_a_wrapper(wrap):
    x = uscl_hub.create_transform(wrap())(picture((50, 60)))
    assert x.shape[0] == 1 and x.dtype == torch.float32


SQUARE = {"input_size": (3, 64, 64), "mean": (0.18,) * 3, "std": (0.24,) * 3}


@pytest.mark.parametrize(
    "changes, arguments, named",
    [
        *(({"input_size": value}, {}, "input_size") for value in (None, 64, "x", (3, 64), (3, 64, 48))),
        *(({"mean": value}, {}, "mean") for value in ("x", float("nan"), float("inf"), (0.1, 0.2), (), {})),
        *(({"std": value}, {}, "std") for value in ("x", float("nan"), 0, 0.0, -0.2, (0.2, 0.0, 0.2), ())),
        *(({}, {"size": value}, "size") for value in (0, -1, "64", 64.0)),
        *(({}, {"in_chans": value}, "in_chans") for value in (0, -1, "3", 3.0)),
    ],
)
def test_a_cfg_that_no_transform_can_be_made_of(changes, arguments, named):
    """At once, and not at the first image: or it would give NaN, or a picture of another shape."""
    with pytest.raises(ValueError, match=named):
        create_transform({**SQUARE, **changes}, **arguments)


@pytest.mark.parametrize("value", [0.18, (0.18,), [0.18] * 3, np.float32(0.18), (np.float64(0.18),) * 3, None])
def test_ways_to_write_a_mean(value):
    x = np.arange(64, dtype=np.uint8).reshape(8, 8)
    wanted = create_transform(SQUARE)(x)
    assert torch.allclose(create_transform({**SQUARE, "mean": value})(x), wanted)


@pytest.mark.filterwarnings("ignore")
def test_transform_of_what_has_lost_its_cfg():
    model, x = timm.create_model("test_resnet", in_chans=1).eval(), torch.zeros(1, 1, 64, 64)
    for lost in (torch.export.export(model, (x,)).module(), torch.jit.trace(model, x)):
        with pytest.raises(ValueError, match="pretrained_cfg .*in_chans="):
            uscl_hub.create_transform(lost)
        transform = uscl_hub.create_transform(model.pretrained_cfg, size=64, in_chans=1)
        assert lost(transform(picture((50, 60)))[None]).shape == (1, 1000)


@pytest.mark.parametrize("options", [{}, {"in_chans": 1}, {"num_classes": 3}, {"features_only": True}])
def test_double_precision_by_default(options):
    torch.set_default_dtype(torch.float64)
    try:
        for model in (
            timm.create_model("meta_uscl_resnet18", pretrained=True, **options).eval(),
            uscl_hub.load_meta_uscl_backbone(**options),
        ):
            transform = uscl_hub.create_transform(model)
            out = model(transform(picture((50, 60)))[None])
            out = out[-1] if isinstance(out, list) else out
            assert out.dtype == torch.float64 and out.isfinite().all()
            assert normalise(picture((8, 8))).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert pickle.loads(pickle.dumps(transform))(picture((50, 60))).dtype == torch.float64  # in a worker too
