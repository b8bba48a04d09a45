"""Weight gradients by a matrix product against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training.method.fast_convolution import PIXELS, ConvolutionByProduct, FastWeightGradients, conv2d


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        ((4, 4), (3, 3), {"padding": 1}),
        ((2, 2), (3, 3), {"padding": (1, 1)}),
        ((9, 7), (5, 3), {"stride": (2, 1), "padding": (2, 0)}),
        ((8, 8), (1, 1), {"stride": 2}),
        ((12, 12), (3, 2), {"stride": 3, "padding": (0, 1), "dilation": (2, 1)}),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_torchs(size, kernel, options, bias, layout):
    torch.manual_seed(0)
    x = torch.randn(5, 6, *size, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    weight = torch.randn(7, 6, *kernel, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    inputs = [x, weight, *([torch.randn(7, dtype=torch.float64, requires_grad=True)] if bias else [])]
    ours, theirs = conv2d(*inputs, **options), F.conv2d(*inputs, **options)
    assert type(ours.grad_fn).__name__ == "ConvolutionByProductBackward"  # else this test compares torch with itself
    assert torch.equal(ours, theirs)
    cotangent = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(theirs, inputs, cotangent)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_channel_slice_of_a_larger_tensor_keeps_its_offset():
    whole = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    weight = torch.randn(2, 4, 1, 1, dtype=torch.float64, requires_grad=True)  # 1 x 1: the padding makes no copy
    grads = [torch.autograd.grad(f(whole[:, 4:], weight).pow(2).sum(), weight)[0] for f in (conv2d, F.conv2d)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_what_the_product_does_not_serve_is_torchs_own(monkeypatch):
    monkeypatch.setattr(ConvolutionByProduct, "apply", None)  # calling it would raise
    x, weight = torch.randn(2, 4, 4, 4), torch.randn(4, 4, 3, 3, requires_grad=True)
    large = torch.randn(2, 4, 10, 10)
    assert 10 * 10 > PIXELS
    assert torch.equal(conv2d(large, weight, padding=1), F.conv2d(large, weight, padding=1))
    assert torch.equal(conv2d(x, weight[:, :1], groups=4), F.conv2d(x, weight[:, :1], groups=4))
    assert torch.equal(conv2d(x, weight, padding="same"), F.conv2d(x, weight, padding="same"))
    assert torch.equal(conv2d(x[0], weight), F.conv2d(x[0], weight))
    with torch.no_grad():
        assert torch.equal(conv2d(x, weight), F.conv2d(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d(x, weight).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="[Kk]ernel size"):  # torch's own message
        conv2d(x[..., :1, :1], weight)


def test_within_the_mode_every_convolution_of_a_network_is_ours():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).double()
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    network(x).pow(2).sum().backward()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    with FastWeightGradients():
        y = network(x)
    assert type(y.grad_fn).__name__ == "ConvolutionByProductBackward"
    y.pow(2).sum().backward()
    for p, grad in zip(network.parameters(), expected):
        torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-12)
