import numpy as np
import pytest
import timm
import torch

from training.method import crops
from training.method.distillation import Distiller, Teachers


def pictures(count=6, size=40):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, size, size), dtype=np.uint8))


def parameters(count, **changes):
    """Crops of whole pictures, with nothing else done to them, but for `changes`."""
    names = "x y w h angle mirror upside_down gamma contrast gain blur share".split()
    plain = dict(x=0.5, y=0.5, w=1, h=1, angle=0, mirror=1, upside_down=1, gamma=1, contrast=1, gain=0, blur=0, share=1)
    values = [torch.as_tensor(changes.get(name, plain[name]), dtype=torch.float32).expand(count) for name in names]
    return torch.stack(values, 1)


def test_a_crop_that_does_nothing_is_the_picture():
    found = crops.make(pictures(), parameters(6), 40)
    assert torch.allclose(found[:, 0], pictures() / 255, atol=1e-3)


@pytest.mark.parametrize("name, value, flipped", [("mirror", -1, [-1]), ("upside_down", -1, [-2])])
def test_flips(name, value, flipped):
    found = crops.make(pictures(), parameters(6, **{name: value}), 40)
    assert torch.allclose(found[:, 0], (pictures() / 255).flip(flipped), atol=1e-3)


def test_mixing_blur_gain_and_gamma():
    plain = crops.make(pictures(), parameters(6), 40)
    mixed = crops.make(pictures(), parameters(6, share=0.25), 40)
    assert torch.allclose(mixed, 0.25 * plain + 0.75 * plain.roll(1, 0), atol=1e-5)
    blurred = crops.make(pictures(), parameters(6, blur=[0, 0, 0, 2, 2, 2]), 40)
    assert (
        torch.allclose(blurred[:3], plain[:3], atol=1e-5)
        and (blurred[3:].var((2, 3)) < 0.2 * plain[3:].var((2, 3))).all()
    )
    bright = crops.make(torch.full((1, 8, 8), 128, dtype=torch.uint8), parameters(1, gain=0.7), 8)[0, 0, :, 0]
    assert (bright.diff() > 0).all() and bright[-1] / bright[0] == pytest.approx(np.exp(0.7), rel=1e-3)
    dark = crops.make(torch.full((1, 8, 8), 51, dtype=torch.uint8), parameters(1, gamma=2), 8)
    assert torch.allclose(dark, torch.tensor(0.04), atol=1e-4)


def test_drawn_crops_lie_in_the_picture_and_follow_the_seed():
    drawn = crops.draw(2000, np.random.default_rng(1), scale=(0.2, 0.9), mixup=0.3)
    x, y, w, h = drawn[:, :4].T
    assert (x - w / 2 > -1e-6).all() and (x + w / 2 < 1 + 1e-6).all() and (y + h / 2 < 1 + 1e-6).all()
    assert 0.15 < (w * h).min() and (w * h).max() < 0.91
    assert (drawn[:, -1] < 1).mean() == pytest.approx(0.3, abs=0.04)
    assert np.array_equal(drawn, crops.draw(2000, np.random.default_rng(1), scale=(0.2, 0.9), mixup=0.3))


def test_fewer_pixels_are_those_of_the_preprocessing():
    from uscl_hub.preprocess import resize

    small = crops.smaller(pictures()[:, None] / 255, 20)
    expected = np.stack([resize(p, 20) for p in pictures().numpy()])
    assert np.abs(small[:, 0].numpy() * 255 - expected).max() < 1.01  # PIL rounds to whole grey levels


def networks():
    torch.manual_seed(0)
    return [(timm.create_model(name, num_classes=0), 0.5, 0.5) for name in ("test_resnet", "test_efficientnet")]


def test_teachers_are_frozen_and_side_by_side():
    teachers = Teachers(networks()).train()
    x = torch.rand(3, 1, 32, 32)
    pooled, maps = teachers(x, cells=2)
    single = [model.eval()(((x - 0.5) / 0.5).expand(-1, 3, -1, -1)) for model, _, _ in networks()]
    assert torch.allclose(pooled, torch.cat(single, 1), atol=1e-5)
    assert maps.shape == (3, pooled.shape[1], 2, 2)
    assert not any(p.requires_grad for p in teachers.parameters()) and not any(m.training for m in teachers.networks)


def test_no_maps_of_a_network_without():
    model = timm.create_model("test_vit", num_classes=0, img_size=32)
    assert Teachers([(model, 0.5, 0.5)])(torch.rand(2, 1, 32, 32), 2)[1] is None


def test_targets_are_half_whitened_components():
    torch.manual_seed(0)
    mixing = torch.randn(20, 20, dtype=torch.float64) * torch.logspace(0, -2, 20, dtype=torch.float64)
    features = (torch.randn(4000, 20, dtype=torch.float64) @ mixing.T + 3).float()
    distiller = Distiller(8, 20, components=10)
    distiller.fit(features)
    targets = distiller.targets(features, features[:, :, None, None].expand(-1, -1, 2, 2))
    covariance = torch.cov(targets[0].T.double())
    variances = covariance.diagonal()
    assert variances.mean() == pytest.approx(1, rel=1e-3) and (variances.diff() < 0).all()
    assert (covariance - variances.diag()).abs().max() < 1e-2  # components
    standardised = (features - features.mean(0)) / features.std(0)
    values = torch.linalg.eigvalsh(torch.cov(standardised.T.double())).flip(0)[:10]
    assert torch.allclose(variances / variances[0], (values / values[0]).sqrt(), rtol=1e-3)
    assert torch.allclose(targets[1][:, :, 0, 1], targets[0], atol=1e-4)


def test_the_loss_is_the_unexplained_variance():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0).eval()
    distiller = Distiller(model.num_features, 12, components=5)
    x, targets, maps = torch.rand(4, 3, 32, 32), torch.randn(4, 5), torch.randn(4, 5, 1, 1)
    predicted = distiller.head(model(x))
    assert torch.allclose(distiller(model, x, targets), ((predicted - targets) ** 2).mean())
    both = distiller(model, x, targets, maps, dense=0.5)  # over 1 x 1 places a map is its mean
    expected = ((predicted - targets) ** 2).mean() + 0.5 * ((predicted - maps[:, :, 0, 0]) ** 2).mean() / maps.var()
    assert torch.allclose(both, expected, rtol=1e-4)
