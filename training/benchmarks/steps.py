"""The training step: its time and its memory."""

import statistics
from dataclasses import dataclass
from functools import partial

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from training.benchmarks.measure import (
    Row,
    Settings,
    cpu_has_bf16,
    free_memory,
    fresh_process,
    memory_use,
    ratio,
    spent,
    take_turns,
)
from training.method.forward_mode import scratch_buffers
from training.method.loss import info_nce
from training.method.networks import CMWNet, Encoder, input_channels
from training.method.step import Learner, contrastive_step, delayed_step, exact_step

TEMPERATURE = 0.5
PRODUCT = 2048  # rows and columns of the matrices whose product shows what the machine can do


@dataclass
class Networks:
    """A training in its first steps (momentum buffers filled), and a batch to step on."""

    encoder: torch.nn.Module
    cmw: torch.nn.Module
    optimizer: torch.optim.Optimizer
    cmw_optimizer: torch.optim.Optimizer
    views: torch.Tensor
    clean: torch.Tensor


def problem(name, settings, px, device, batch=None):
    """The problem for the step `name`."""
    torch.manual_seed(0)
    layout = layout_of(name, device)
    encoder = Encoder(settings.model).to(device, memory_format=layout).train()
    cmw = CMWNet(encoder.num_features).to(device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    cmw_optimizer = torch.optim.Adam(cmw.parameters(), lr=6e-5)
    p = Networks(encoder, cmw, optimizer, cmw_optimizer, *images(encoder, batch or settings.batch, px, device, layout))
    plain(p)
    return p


def layout_of(name, device):
    # Second-order convolutions are slower in channels_last on the CPU: each side has its better layout.
    return torch.contiguous_format if name == "double backward" and device.type == "cpu" else torch.channels_last


def images(encoder, batch, px, device, layout):
    shape = 2 * batch, input_channels(encoder), px, px
    return [torch.randn(shape).to(device, memory_format=layout) for _ in range(2)]


def plain(p, **options):
    contrastive_step(Learner(p.encoder, p.optimizer, temperature=TEMPERATURE, **options), p.views)


def meta(p, step=exact_step, clean=1.0, **options):
    """A step with a CMW-Net. clean: the share of the clean pairs that is used; options: of `Learner`."""
    learner = Learner(p.encoder, p.optimizer, p.cmw, p.cmw_optimizer, TEMPERATURE, **options)
    step(learner, p.views, p.clean if clean == 1 else few(p.clean, clean))


def few(pairs, share):
    """The first `share` of the pairs in (2n, ...), n first views and n second ones; at least 2 pairs."""
    n = max(2, int(len(pairs) // 2 * share))
    return torch.cat([view[:n] for view in pairs.chunk(2)])  # keeps channels_last


def double_backward(p):
    """The exact step with a second-order graph: plain modules, one view after the other, the SGD step unrolled."""
    params = dict(p.encoder.named_parameters())
    h, z = per_view(p.encoder, p.views, params)
    grads = torch.autograd.grad(info_nce(z, p.cmw(h), TEMPERATURE), list(params.values()), create_graph=True)
    group, ahead = p.optimizer.param_groups[0], {}
    for (name, param), grad in zip(params.items(), grads):
        momentum = group["momentum"] * p.optimizer.state[param]["momentum_buffer"]
        ahead[name] = param - group["lr"] * (momentum + grad + group["weight_decay"] * param)
    _, clean_z = per_view(p.encoder, p.clean, ahead)
    info_nce(clean_z, None, TEMPERATURE).backward(inputs=list(p.cmw.parameters()))
    p.cmw_optimizer.step()
    p.cmw_optimizer.zero_grad()
    del h, z, grads, grad, ahead, clean_z  # the graph, before the next one is built
    h, z = per_view(p.encoder, p.views)
    info_nce(z, p.cmw(h).detach(), TEMPERATURE).backward()
    p.optimizer.step()
    p.optimizer.zero_grad()


def per_view(encoder, images, params=None):
    """Representations and projections, (2, N, d) each; with `params` the running statistics are left alone."""
    if params is None:
        outputs = [encoder(view) for view in images.chunk(2)]
    else:
        outputs = [functional_call(encoder, {**params, **scratch_buffers(encoder)}, (v,)) for v in images.chunk(2)]
    return [torch.stack(o) for o in zip(*outputs)]


STEPS = {
    "plain": plain,
    "exact": meta,
    "double backward": double_backward,
    "delayed": partial(meta, step=delayed_step),
    "difference": partial(meta, tangent="difference"),
    "plain bf16": partial(plain, bf16=True),
    "exact bf16": partial(meta, bf16=True),
}


def steps(settings, device, folder):
    cuda = device.type == "cuda"
    expected = 0.0
    for i, px in enumerate(settings.sizes):
        if expected > settings.limit:
            yield Row("step", "all", px, note=f"a round would take about {expected:.0f} s (--limit)")
            continue
        # the options' shares of a step are about the same at any size
        names = list(STEPS)[: 3 if i else len(STEPS) if cuda or cpu_has_bf16() else -2]
        try:
            functions = {name: partial(STEPS[name], problem(name, settings, px, device)) for name in names}
            matrix = torch.randn(PRODUCT, PRODUCT, device=device)
            functions["product"] = partial(torch.matmul, matrix, matrix)
            seconds = take_turns(functions, settings, device)
        except torch.OutOfMemoryError:
            yield Row("step", "all", px, note="does not fit into the device's memory")
            continue
        if seconds["plain"] and i + 1 < len(settings.sizes):
            round_ = sum(statistics.median(seconds[name]) for name in list(STEPS)[:3])
            expected = round_ * (settings.sizes[i + 1] / px) ** 2
        if seconds["plain"]:
            work = operations(functions["plain"]) / (2 * PRODUCT**3)  # in products
            share = statistics.median(work * b / a for a, b in zip(seconds["plain"], seconds["product"]))
            yield Row("step", "plain: operations a second / those of a matrix product", px, share)
        goal = "<= 3.5" if cuda or px > 64 else "<= 3.2"
        yield Row("step", "exact / plain", px, ratio(seconds, "exact", "plain"), goal, spent(seconds, "plain"))
        goal, note = "<= 0.35" if cuda else "<= 0.58" if px <= 112 else "", spent(seconds, "double backward")
        yield Row("step", "exact / double backward", px, ratio(seconds, "exact", "double backward"), goal, note)
        for name in names[3:]:
            if name != "plain bf16":
                base, goal = ("plain bf16", "<= 3.5") if name == "exact bf16" else ("plain", "")
                note = f"{name} / float32 {ratio(seconds, name, 'exact'):.3g}" if "bf16" in name else ""
                yield Row("step", f"{name} / {base}", px, ratio(seconds, name, base), goal, note)


def operations(function):
    """Floating-point operations of its convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peaks_of_steps(settings, device, folder):
    peaks, before = {}, None
    for px in settings.sizes:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        if before and peaks["double backward"] * 2**20 * (px / before) ** 2 > 0.9 * free:
            yield Row("memory", "all", px, note=f"would not fit into the {free >> 30} GiB that are free")
            continue
        for name in ("plain", "exact", "double backward"):
            call = f"step_peak({name!r}, {settings.model!r}, {px}, {settings.batch}, {str(device)!r})"
            code = f"from training.benchmarks.steps import step_peak; print({call})"
            # Large blocks come from the system and return to it: the peak is of what is in use, not of what is kept.
            peaks[name] = fresh_process(code, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
        before, note = px, ", ".join(f"{name} {peak:.0f} MiB" for name, peak in peaks.items())
        goal = "<= 0.6" if device.type == "cpu" else ""
        yield Row("memory", "exact / double backward", px, peaks["exact"] / peaks["double backward"], goal, note)


def step_peak(name, model, px, batch, device):
    """MiB that a step needs at its peak beyond what the process, networks and optimizers had after a tiny step."""
    settings, device = Settings(model=model, batch=batch), torch.device(device)
    p = problem(name, settings, 32, device, batch=2)
    STEPS[name](p)
    base = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else memory_use()["now"]
    p.views, p.clean = images(p.encoder, batch, px, device, layout_of(name, device))
    STEPS[name](p)
    return (torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else memory_use()["peak"]) - base
