"""Convolutions with few output pixels, their weight's gradient a matrix product.

The deep layers of a backbone on small images are such convolutions, and without AVX-512 oneDNN's kernel for their
weights' gradient takes up to 8 times as long as the product (512 channels, 2 x 2 pixels: 80 ms against 10 ms).
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

PIXELS = 64  # of the output, at most; above it oneDNN is as fast and the unfolded input is large


class FastWeightGradients(TorchFunctionMode):
    """Within it, `F.conv2d` (so every nn.Conv2d) is `conv2d` below: the same values, gradients to rounding."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return conv2d(*args, **(kwargs or {})) if func is F.conv2d else func(*args, **(kwargs or {}))


# 7 arguments: torch.nn.functional.conv2d's, in whose place it is called
def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """`F.conv2d`, once differentiable. What the product does not serve (a GPU, groups, autocast) is torch's own."""
    ours = (
        x.device.type == "cpu"
        and x.ndim == 4
        and groups == 1
        and not isinstance(padding, str)
        and torch.is_grad_enabled()
        and weight.requires_grad
        and not torch.is_autocast_enabled("cpu")
    )
    if ours:
        stride, padding, dilation = ((v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation))
        sides = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation)
        ]
        if 0 < sides[0] * sides[1] <= PIXELS and min(sides) > 0:
            return ConvolutionByProduct.apply(x, weight, bias, (stride, padding, dilation))
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


class ConvolutionByProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(x, grad, weight.shape[2:], stride, padding, dilation)
        if ctx.needs_input_grad[2]:
            dbias = grad.sum((0, 2, 3))
        return dx, dweight, dbias, None


def _weight_gradient(x, grad, kernel, stride, padding, dilation):
    """(out, in, *kernel): the output's gradient times the patches that each output pixel saw, channels last."""
    n, channels = x.shape[:2]
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1)
    of_image, of_row, of_column, of_channel = x.stride()
    patches = x.as_strided(
        (n, *grad.shape[2:], *kernel, channels),
        (
            of_image,
            of_row * stride[0],
            of_column * stride[1],
            of_row * dilation[0],
            of_column * dilation[1],
            of_channel,
        ),
        x.storage_offset(),
    ).reshape(-1, kernel[0] * kernel[1] * channels)
    product = grad.permute(0, 2, 3, 1).reshape(len(patches), -1).T @ patches
    return product.view(-1, *kernel, channels).permute(0, 3, 1, 2)
