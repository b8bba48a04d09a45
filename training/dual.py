"""Two ways to run a network on both views of a batch: `recorded` (ordinary autograd) and `tangent` (forward mode).

Both normalise each view by its own batch statistics, as if the views were two separate batches, while all other
layers see them as one. `tangent` pushes a direction in weight space through the network without computing again
what the recorded pass has already computed.
"""

import warnings

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

VIEWS = 2
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)

with warnings.catch_warnings():  # the first use of forward mode compiles rules of torch's own, by torch.jit.script
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def recorded(network, x, params=None):
    """Run `network` on a batch of two views under autograd.

    Args:
        network: a module in train mode; its batch norms' running statistics are updated once, by the mean of
            the two views' statistics.
        x: (2N, ...), the N samples of view 0, then those of view 1.
        params: tensors by parameter (and buffer) name to use in place of the network's own, or None.

    Returns:
        The network's output, and the tape of convolution outputs for `tangent`. The tape costs no memory while
        the autograd graph is alive: the batch norm behind a convolution keeps the same tensor.
    """
    with _Recorder() as recorder:
        output = network(x) if params is None else functional_call(network, params, (x,))
    return output, recorder.tape


def tangent(network, x, tape, direction):
    """Directional derivative of the network's output along a direction in weight space (forward mode).

    Args:
        network, x: as in `recorded`, with the weights unchanged since.
        tape: the tape of that recorded pass.
        direction: tensors by parameter name, the tangent of each parameter.

    Returns:
        The tangent of every output of the network, with the outputs' shapes. Running statistics are not touched.
    """
    buffers = scratch_buffers(network)
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no jvp
        params = {k: forward_ad.make_dual(p.detach(), direction[k]) for k, p in network.named_parameters()}
        with _Tangent(tape):
            output = functional_call(network, {**params, **buffers}, (x,))
        return tuple(forward_ad.unpack_dual(o).tangent for o in output)


def scratch_buffers(network):
    """Copies of the network's buffers, for passes that must leave the running statistics alone."""
    return {k: b.clone() for k, b in network.named_buffers()}


class _BatchNormPerView(torch.autograd.Function):
    """Batch norm over a batch of views, each normalised by its own statistics; also returns those statistics."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        outputs, means, rstds = zip(
            *(torch.native_batch_norm(v, weight, bias, None, None, True, 0.0, eps) for v in x.chunk(VIEWS))
        )
        ctx.save_for_backward(x, weight, *means, *rstds)
        ctx.eps = eps
        mean, rstd = torch.stack(means), torch.stack(rstds)
        ctx.mark_non_differentiable(mean, rstd)
        return torch.cat(outputs), mean, rstd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _mean, _rstd):
        x, weight, *statistics = ctx.saved_tensors
        dx, dweight, dbias = zip(
            *(
                torch.ops.aten.native_batch_norm_backward(
                    g, v, weight, None, None, mean, rstd, True, ctx.eps, [True, True, True]
                )
                for g, v, mean, rstd in zip(grad.chunk(VIEWS), x.chunk(VIEWS), statistics[:VIEWS], statistics[VIEWS:])
            )
        )
        affine = weight is not None
        return torch.cat(dx), sum(dweight) if affine else None, sum(dbias) if affine else None, None


class _Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.tape = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self.batch_norm(*args, **kwargs)
        output = func(*args, **kwargs)
        if func in CONVOLUTIONS:
            self.tape.append(output.detach())
        return output

    @staticmethod
    def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        output, mean, rstd = _BatchNormPerView.apply(x, weight, bias, eps)
        if running_mean is not None:
            n = x.numel() // x.shape[1] // VIEWS
            variance = (rstd.pow(-2) - eps) * (n / max(n - 1, 1))  # unbiased, as in nn.BatchNorm2d
            running_mean.lerp_(mean.mean(0).to(running_mean.dtype), momentum)
            running_var.lerp_(variance.mean(0).to(running_var.dtype), momentum)
        return output


class _Tangent(TorchFunctionMode):
    """Forward-mode rules for the layers that cost the time; torch's own rules serve all others."""

    def __init__(self, tape):
        super().__init__()
        self.tape = iter(tape)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            return self.convolution(func, *args, **kwargs)
        if func is F.batch_norm:
            return self.batch_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def convolution(self, func, x, weight, bias=None, *rest, **kwargs):
        y = next(self.tape)
        x, dx = forward_ad.unpack_dual(x)
        weight, dweight = forward_ad.unpack_dual(weight)
        dbias = None if bias is None else forward_ad.unpack_dual(bias).tangent
        dy = func(x, dweight, dbias, *rest, **kwargs)
        if dx is not None:  # the images have no tangent
            dy += func(dx, weight, None, *rest, **kwargs)
        return forward_ad.make_dual(y, dy)

    @staticmethod
    def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        x, dx = forward_ad.unpack_dual(x)
        weight, dweight = (None, None) if weight is None else forward_ad.unpack_dual(weight)
        bias, dbias = (None, None) if bias is None else forward_ad.unpack_dual(bias)
        ys, dys = [], []
        for v, dv in zip(x.chunk(VIEWS), dx.chunk(VIEWS)):
            y, mean, rstd = torch.native_batch_norm(v, weight, bias, None, None, True, 0.0, eps)
            # The Jacobian of the normalisation is symmetric: its backward is its forward-mode derivative, too.
            dy = torch.ops.aten.native_batch_norm_backward(
                dv, v, weight, None, None, mean, rstd, True, eps, [True, False, False]
            )[0]
            if dweight is not None:  # + dweight * (v - mean) * rstd + dbias
                shape = [1, -1] + [1] * (v.ndim - 2)
                slope = rstd * dweight
                dy.addcmul_(v, slope.view(shape).to(v.dtype)).add_((dbias - mean * slope).view(shape))
            ys.append(y)
            dys.append(dy)
        return forward_ad.make_dual(torch.cat(ys), torch.cat(dys))
