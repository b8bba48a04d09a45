"""A small meta-learning problem in float64, and its plain computations, for the tests of the step."""

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.method.forward_mode import scratch_buffers
from training.method.networks import CMWNet, Encoder

TEMPERATURE = 0.5


def naive_info_nce(z, weights=None, temperature=TEMPERATURE):
    n = z.shape[1]
    z = [v / v.norm() for v in torch.cat([z[0], z[1]])]
    weights = torch.ones(n, dtype=z[0].dtype) if weights is None else weights
    total = 2 * sum(weights)
    loss = 0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        denominator = sum(torch.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i)
        loss = loss - weights[i % n] / total * torch.log(torch.exp(z[i] @ z[j] / temperature) / denominator)
    return loss


def build(name, clips=4, px=32, dtype=torch.float64, seed=0, **kwargs):
    """A small problem in the middle of a training: momentum buffers, weight decay, running statistics."""
    torch.manual_seed(seed)
    encoder = Encoder(name, dim=16, **kwargs).to(dtype).train()
    with torch.no_grad():  # away from the special points of the initialisation (zero biases, zero gains)
        for p in encoder.parameters():
            p += 0.02 * torch.randn_like(p)
    cmw = CMWNet(encoder.num_features).to(dtype)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    cmw_optimizer = torch.optim.Adam(cmw.parameters(), lr=1e-3)
    for p in encoder.parameters():
        p.grad = 0.05 * torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    batch = [torch.randn(2 * clips, 3, px, px, dtype=dtype) for _ in range(2)]
    return encoder, cmw, optimizer, cmw_optimizer, *batch


def per_view(encoder, x, params=None):
    """The plain network on one view after the other; its buffers are left alone."""
    tensors = {**dict(encoder.named_parameters()), **(params or {})}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        outputs = [functional_call(encoder, {**tensors, **scratch_buffers(encoder)}, (v,)) for v in x.chunk(2)]
    return [torch.stack(o) for o in zip(*outputs)]


def relative(a, b):
    a, b = (torch.cat([t.reshape(-1) for t in x]) for x in (a, b))
    return ((a - b).norm() / b.norm()).item()
