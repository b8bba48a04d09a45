"""Two ways to run a network on both views of a batch: `recorded` (ordinary autograd) and `tangent` (forward mode).

Both normalise each view by its own batch statistics, as if the views were two separate batches, while all other
layers see them as one. `tangent` pushes a direction in weight space through the network without computing again
what the recorded pass has already computed.
"""

import contextlib
import warnings

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from training.method.fast_convolution import conv2d

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
        The network's output (a tuple of tensors), and the tape for `tangent`: outputs of convolutions and max
        pooling, its indices, statistics of batch norms, outputs of ReLUs. It costs no memory while the autograd
        graph is alive, which holds the same tensors.
    """
    with _Recorder(x.device) as recorder:
        output = network(x) if params is None else functional_call(network, params, (x,))
    returned = {o.untyped_storage().data_ptr() for o in output}
    recorder.relus = [None if y.untyped_storage().data_ptr() in returned else y for y in recorder.relus]
    return output, recorder


@contextlib.contextmanager
def same_random_numbers(tape):
    """Replays the random state recorded in the tape's pass (dropout); afterwards the generators are as before."""
    device, state = tape.rng
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        _generator(device).set_state(state)
        yield


def _generator(device):
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


def release(tape):
    """Free the ReLUs' outputs, a third of a graph, until `tangent` needs and restores them.

    A backward pass through the recorded graph must wait until then.
    """
    for y in tape.relus:
        if y is not None:
            y.untyped_storage().resize_(0)


def tangent(network, x, tape, direction):
    """Directional derivative of the network's output along a direction in weight space (forward mode).

    Args:
        network, x: as in `recorded`, with the weights unchanged since.
        tape: the tape of that recorded pass.
        direction: tensors by parameter name, the tangent of each parameter; of one that it leaves out, 0. Before the
            first layer that has a tangent, convolutions and max pooling cost nothing and other layers their forward.

    Returns:
        The tangent of every output of the network, with the outputs' shapes. Running statistics are not touched.
    """
    buffers = scratch_buffers(network)
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no jvp
        params = {k: p.detach() for k, p in network.named_parameters()}
        params |= {k: forward_ad.make_dual(params[k], v) for k, v in direction.items()}
        with _Tangent(tape), same_random_numbers(tape):
            output = functional_call(network, {**params, **buffers}, (x,))
        return tuple(forward_ad.unpack_dual(o).tangent for o in output)


def scratch_buffers(network):
    """Copies of the network's buffers, for passes that must leave the running statistics alone."""
    return {k: b.clone() for k, b in network.named_buffers()}


class _BatchNormPerView(torch.autograd.Function):
    """Batch norm over a batch of views, each normalised by its own statistics; also returns those statistics."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        output = torch.empty_like(x)
        mean, rstd = (x if weight is None else weight).new_empty(2, VIEWS, x.shape[1])
        for v, *out in zip(x.chunk(VIEWS), output.chunk(VIEWS), mean, rstd):
            torch.native_batch_norm(v, weight, bias, None, None, True, 0.0, eps, out=out)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, rstd)
        return output, mean, rstd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _mean, _rstd):
        x, weight, mean, rstd = ctx.saved_tensors
        views = zip(grad.chunk(VIEWS), x.chunk(VIEWS), zip(mean, rstd))
        dx, dweight, dbias = zip(*(_batch_norm_backward(*v, weight, ctx.eps, [True, True, True]) for v in views))
        affine = weight is not None
        return torch.cat(dx), sum(dweight) if affine else None, sum(dbias) if affine else None, None


def _batch_norm_backward(grad, x, statistics, weight, eps, wanted):
    """Those `wanted` of the gradients of x, weight (= sum of grad times the normalised x) and bias (sum of grad).

    statistics: x's mean and 1 / standard deviation.
    """
    return torch.ops.aten.native_batch_norm_backward(grad, x, weight, None, None, *statistics, True, eps, wanted)


class _Recorder(TorchFunctionMode):
    """The tape: what each kind of layer computed, in the order of the calls, and the random numbers' state before."""

    def __init__(self, device):
        super().__init__()
        self.rng = device, _generator(device).get_state()
        self.outputs, self.statistics, self.relus = [], [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self.batch_norm(*args, **kwargs)
        indices = None
        if func is F.max_pool2d:
            output, indices = func(*args, **{**kwargs, "return_indices": True})
        elif func is F.conv2d:
            output = conv2d(*args, **kwargs)
        else:
            output = func(*args, **kwargs)
        if func in CONVOLUTIONS or func is F.max_pool2d:
            self.outputs.append((output.detach(), output._version, indices))
        elif func is F.relu:
            self.relus.append(output.data)  # to be written to behind autograd's back
        return output

    # 8 arguments: torch.nn.functional.batch_norm's, in whose place it is called
    def batch_norm(self, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        output, mean, rstd = _BatchNormPerView.apply(x, weight, bias, eps)
        self.statistics.append((mean, rstd))
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
        self.outputs, self.statistics, self.relus = iter(tape.outputs), iter(tape.statistics), iter(tape.relus)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            return self.convolution(func, *args, **kwargs)
        if func is F.batch_norm:
            return self.batch_norm(*args, **kwargs)
        if func is F.max_pool2d:
            return self.max_pool(*args, **kwargs)
        if func is F.relu:
            return self.relu(*args, **kwargs)
        return func(*args, **kwargs)

    def convolution(self, func, x, weight, bias=None, *rest, **kwargs):
        y, version, _ = next(self.outputs)
        x, dx = forward_ad.unpack_dual(x)
        weight, dweight = forward_ad.unpack_dual(weight)
        bias, dbias = (None, None) if bias is None else forward_ad.unpack_dual(bias)
        if y._version != version:  # overwritten by what came next, an activation in place
            y = func(x, weight, bias, *rest, **kwargs)
        if dweight is None and dx is None:
            return y
        if dweight is None:
            return forward_ad.make_dual(y, func(dx, weight, None, *rest, **kwargs))
        dy = func(x, dweight, dbias, *rest, **kwargs)
        if dx is not None:  # the images have no tangent
            dy += func(dx, weight, None, *rest, **kwargs)
        return forward_ad.make_dual(y, dy)

    # 8 arguments: torch.nn.functional.batch_norm's, in whose place it is called
    def batch_norm(self, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        mean, rstd = next(self.statistics)
        x, dx = forward_ad.unpack_dual(x)
        weight, dweight = (1.0, None) if weight is None else forward_ad.unpack_dual(weight)
        bias, dbias = (0.0, None) if bias is None else forward_ad.unpack_dual(bias)
        shape = [VIEWS, 1, -1] + [1] * (x.ndim - 2)
        scale = weight * rstd
        shift = bias - scale * mean
        v = x.unflatten(0, (VIEWS, -1))
        y = torch.addcmul(shift.view(shape), v, scale.view(shape)).flatten(0, 1).to(x.dtype)
        if dx is None and dweight is None:
            return y
        dx = torch.zeros_like(x) if dx is None else dx
        dweight, dbias = (0.0 if d is None else d for d in (dweight, dbias))

        # y = weight x^ + bias, x^ = (x - mean) rstd, dx^ = rstd (dx - average of dx - x^ average of x^ dx), where
        # the normalisation's backward pass has the two sums. Two fused passes over x and dx do the rest.
        one, n = torch.ones_like(mean[0]), x.numel() // x.shape[1] // VIEWS
        views = zip(dx.chunk(VIEWS), x.chunk(VIEWS), zip(mean, rstd))
        sums = [_batch_norm_backward(*v, one, eps, [False, True, True])[1:] for v in views]
        along, total = (torch.stack(s) / n for s in zip(*sums))
        slope = (dweight - scale * along) * rstd
        drift = dbias - scale * total - slope * mean
        scale, slope, drift = (t.view(shape) for t in (scale, slope, drift))
        dy = torch.addcmul(drift, dx.unflatten(0, (VIEWS, -1)), scale).addcmul_(v, slope)
        return forward_ad.make_dual(y, dy.flatten(0, 1).to(x.dtype))

    def relu(self, x, inplace=False):
        kept, output = next(self.relus), F.relu(x, inplace)
        if kept is not None and kept.untyped_storage().size() == 0:  # see `release`
            kept.untyped_storage().resize_(kept.numel() * kept.element_size())
            kept.copy_(forward_ad.unpack_dual(output).primal)
        return output

    def max_pool(self, x, *args, **kwargs):
        y, version, indices = next(self.outputs)
        x, dx = forward_ad.unpack_dual(x)
        if y._version != version:
            y = F.max_pool2d(x, *args, **kwargs)
        if dx is None:
            return y
        # as (N, H W, C): there, channels_last needs no copies
        dx, indices = (t.movedim(1, -1).flatten(1, 2) for t in (dx, indices))
        return forward_ad.make_dual(y, dx.gather(1, indices).view_as(y.movedim(1, -1)).movedim(-1, 1))
