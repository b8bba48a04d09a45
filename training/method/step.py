"""The training step of Meta-USCL (paper, section III), with its gradient for CMW-Net in forward mode.

In the paper's symbols: the encoder (backbone and projector) has the weights theta, CMW-Net V the weights phi. A pair i
with representations h_i and projections z_i has the weight w_i = V(h_i; phi), and the weighted contrastive loss is
L(theta, phi) = sum_i w_i l_i(z) / sum_i w_i. L_meta is the unweighted loss of clean pairs. One step is

    theta' = theta - lr (dL/dtheta(theta, phi) + a + terms without phi)    look ahead by SGD (momentum, weight decay)
    phi    <- Adam(phi, dL_meta(theta')/dphi)                              learn the weights from clean pairs
    theta  <- SGD(theta, dL/dtheta(theta, phi) + a)                        step with the new weights as constants

where a, the anchor, is the gradient of another loss, or 0. phi enters L_meta through dL/dtheta in theta' alone, so

    dL_meta(theta')/dphi = d/dphi <dL/dtheta(theta, phi), v>    with v = -lr dL_meta/dtheta'(theta') held constant
                         = d/dphi [<dL/dh, dh> + <dL/dz, dz>],

where dh and dz are the derivatives of all h and z along v. One forward-mode pass gives these two; what remains to be
differentiated by phi is the loss and CMW-Net, behind the encoder. No second-order graph of the encoder is ever built.

Passes, in forward passes of 2N views (a backward pass, and a tangent pass, are two):

    forward, backward for theta', clean forward and backward, tangent pass, backward    1 + 2 + 1 + 2 + 2 + 2 = 10
    `delayed_step`: the look-ahead's backward pass is also the step's                                             8
    `contrastive_step`                                                                                            3

With `Learner.depth` d, theta' moves the last d stages and the projector only; all else in theta' is theta, and v is 0
there. This is another, partial look-ahead, whose gradient is exact. Where the moved part has the share r of a forward
pass, three passes end or begin at it: 1 + 2r + 1 + 2r + 2r + 2 = 4 + 6r (delayed 4 + 4r). ResNet-18: r = 0.23 for one
stage and 0.45 for two, so 5.4 and 6.7, that is 1.8 and 2.2 steps of SimCLR instead of 3.3. With m clean pairs instead
of N, their part, 1 + 2r, is m / N of that. With CMW-Net's update at every k-th step, k - 1 of k steps cost 3.

CMW-Net may see statistics of a pair, as constants, instead of its representations: then L depends on h through z alone,
and <dL/dh, dh> is 0 (`weighting`).

Shapes: a batch is N clips (over all ranks), two views each. `views` is (2n, C, H, W): this rank's n first views,
then the n second views. Representations h are (2, N, d), projections z are (2, N, 128). Gradients and directions are
dicts of tensors by the encoder's parameter names.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from training import distributed
from training.method import forward_mode
from training.method.loss import info_nce
from training.method.weighting import Weighting, scores


@dataclass
class Learner:
    """What learns, and its objective.

    Args:
        encoder: `networks.Encoder`; optimizer: its SGD.
        cmw: `networks.CMWNet`, or None where pairs are not weighted; cmw_optimizer: its Adam.
        temperature, decoupled: of InfoNCE, see `loss.info_nce`.
        tangent: how outputs are derived along v: 'exact' (forward mode) or 'difference' (of two forward passes).
        depth: the look-ahead moves the last so many stages and the projector; 0: the whole encoder.
        weighting: what makes a weight of a pair.
        bf16: the encoder's passes are under autocast; the loss and CMW-Net, which are small, stay in float32.
    """

    encoder: nn.Module
    optimizer: torch.optim.Optimizer
    cmw: nn.Module | None = None
    cmw_optimizer: torch.optim.Optimizer | None = None
    temperature: float = 0.5
    decoupled: bool = False
    tangent: str = "exact"
    depth: int = 0
    weighting: Weighting = Weighting()
    bf16: bool = False

    def weigh(self, h, z, about=None):
        """Weights of the pairs, (N,), or None for weights of 1; see `weighting.Weighting`."""
        return self.weighting.weigh(self, h, z, about)

    def loss(self, z, weights=None):
        return info_nce(z, weights, self.temperature, self.decoupled)

    @property
    def parameters(self):
        return dict(self.encoder.named_parameters())

    @property
    def moved(self):
        """The parameters that the look-ahead moves, by name."""
        return self.encoder.last(self.depth)


class Step(NamedTuple):
    """What a step reports: 0-dim tensors; the final step's weights, and the pairs' similarities and losses before it,
    (N,) each."""

    loss: torch.Tensor
    weights: torch.Tensor | None
    meta_loss: torch.Tensor | None = None
    similarity: torch.Tensor | None = None
    losses: torch.Tensor | None = None


def contrastive_step(learner, views, anchor=None, about=None):
    """One step of SimCLR / USCL: InfoNCE, unweighted, or weighted by a closed form or a CMW-Net that is not updated.

    anchor, about: as in `exact_step`.
    """
    # not the tape: it would keep what the backward pass frees
    h, z = forward(learner.encoder, views, bf16=learner.bf16)[:2]
    weights = learner.weigh(h, z, about)
    weights = None if weights is None else weights.detach()
    loss = learner.loss(z, weights)
    apply_gradients(learner, gradients(loss, learner.parameters, anchor))
    return Step(loss.detach(), weights, None, *scores(learner, h, z))


def exact_step(learner, views, clean, anchor=None, shuffle=False, about=None):
    """One step of Meta-USCL as in the paper: look ahead, learn the weights, step with the new weights.

    Args:
        learner: a `Learner` with a CMW-Net.
        views: (2n, C, H, W); clean: (2m, C, H, W), clean pairs of held-out clips.
        anchor: gradient of another loss that the encoder descends beside the contrastive one, or None.
        shuffle: a control: in the final step every pair has the weight of the pair before it in the batch.
        about: `weighting.About` of the pairs, where `Learner.weighting` asks for it.

    Returns:
        A `Step`.
    """
    # the graph serves the look-ahead and the final step
    h, z, tape = forward(learner.encoder, views, bf16=learner.bf16)

    weights = learner.weigh(h, z, about)
    grads = gradients(learner.loss(z, weights), learner.moved, anchor, retain_graph=True)
    ahead = look_ahead(learner, grads)
    del weights, grads
    if learner.tangent == "exact":  # memory is scarcest in the clean pairs' passes
        forward_mode.release(tape)
    meta_loss, meta_grads = clean_gradients(learner, clean, ahead)
    del ahead

    dh, dz = push_forward(learner, views, tape, look_ahead_direction(learner, meta_grads))
    del meta_grads, tape
    update_cmw(learner, (h, z), (dh, dz), about)

    weights = learner.weigh(h, z, about).detach()
    loss = learner.loss(z, weights.roll(1) if shuffle else weights)
    apply_gradients(learner, gradients(loss, learner.parameters, anchor))
    return Step(loss.detach(), weights, meta_loss, *scores(learner, h, z))


def delayed_step(learner, views, clean, anchor=None, about=None):
    """`exact_step` with one backward pass less: the weights are those from before CMW-Net's update, and constants in
    the look-ahead, too, so that the look-ahead's gradient is also the final one. Arguments as there."""
    h, z, tape = forward(learner.encoder, views, bf16=learner.bf16)

    weights = learner.weigh(h.detach(), z.detach(), about).detach()
    loss = learner.loss(z, weights)
    grads = gradients(loss, learner.parameters, anchor)
    ahead = look_ahead(learner, grads)
    if learner.tangent == "exact":
        forward_mode.release(tape)
    meta_loss, meta_grads = clean_gradients(learner, clean, ahead)
    del ahead

    _, dz = push_forward(learner, views, tape, look_ahead_direction(learner, meta_grads))
    del meta_grads, tape
    update_cmw(learner, (h, z), (None, dz), about)

    apply_gradients(learner, grads)
    return Step(loss.detach(), weights, meta_loss, *scores(learner, h, z))


def clean_gradients(learner, clean, ahead):
    """Unweighted loss of the clean pairs at the weights `ahead`, and its gradient there (a dict). Frees `ahead`."""
    rest = {name: p.detach() for name, p in learner.parameters.items()}  # no graph before the first moved layer
    params = {**rest, **ahead, **forward_mode.scratch_buffers(learner.encoder)}
    z = forward(learner.encoder, clean, params, learner.bf16)[1]
    loss = learner.loss(z)
    free_in_backward(ahead.values())
    return loss.detach(), gradients(loss, ahead)


def update_cmw(learner, outputs, derivatives, about):
    """Descend the meta-loss with respect to CMW-Net. Arguments as `directional_gradient`."""
    grads = directional_gradient(learner, outputs, derivatives, about)
    for p, g in zip(learner.cmw.parameters(), grads):
        p.grad = g
    learner.cmw_optimizer.step()


def autocast(views, bf16):
    """Around the encoder's passes alone: it would keep bfloat16 copies of CMW-Net's weights beyond their update."""
    return torch.autocast(views.device.type, torch.bfloat16, enabled=bf16)


def forward(encoder, views, params=None, bf16=False):
    """Representations (2, N, d) and projections (2, N, 128) of all ranks, and the tape of this rank's pass."""
    with autocast(views, bf16):
        (h, z), tape = forward_mode.recorded(encoder, views, params)
    return global_pairs(h), global_pairs(z), tape


def global_pairs(x):
    """(2n, d) of this rank -> (2, N, d) of all ranks, at least float32 (the head is too small for less)."""
    x = x if x.dtype == torch.float64 else x.float()
    return distributed.gather(x.unflatten(0, (2, -1)))


def gradients(loss, params, anchor=None, retain_graph=False):
    """Gradient of the global loss for `params` (by name), summed over ranks, plus the anchor's where there is one."""
    grads = distributed.sum_(list(torch.autograd.grad(loss, list(params.values()), retain_graph=retain_graph)))
    if anchor is not None:
        torch._foreach_add_(grads, [anchor[name] for name in params])
    return dict(zip(params, grads))


def apply_gradients(learner, grads):
    for name, p in learner.encoder.named_parameters():
        p.grad = grads[name]
    learner.optimizer.step()
    learner.optimizer.zero_grad()


def look_ahead(learner, grads):
    """Weights after the SGD step that the optimizer would take with `grads`: new leaf tensors by name, the moved ones.

    Learning rate, momentum buffer and weight decay are the optimizer's own; nothing of it changes.
    """
    ahead, optimizer = {}, learner.optimizer
    names = {p: name for name, p in learner.moved.items()}
    for group in optimizer.param_groups:
        params, lr = [p for p in group["params"] if p in names], group["lr"]
        if not params:
            continue
        moved = torch._foreach_mul([p.detach() for p in params], 1 - lr * group["weight_decay"])
        torch._foreach_add_(moved, [grads[names[p]] for p in params], alpha=-lr)
        buffers = [optimizer.state[p].get("momentum_buffer") for p in params]
        if group["momentum"] and buffers[0] is not None:
            torch._foreach_add_(moved, buffers, alpha=-lr * group["momentum"])
        ahead.update({names[p]: t.requires_grad_() for p, t in zip(params, moved)})
    return {name: ahead[name] for name in names.values()}


def free_in_backward(leaves):
    """Free each weight's memory in the backward pass once its gradient is complete."""
    for leaf in leaves:
        leaf.register_hook(partial(_free, leaf.untyped_storage()))


def _free(storage, _gradient):
    storage.resize_(0)


def look_ahead_direction(learner, meta_grads):
    """v: the transposed derivative of `look_ahead` in its gradient, applied to `meta_grads` in place: -lr x."""
    lr = {p: group["lr"] for group in learner.optimizer.param_groups for p in group["params"]}
    params = learner.parameters
    return {name: g.mul_(-lr[params[name]]) for name, g in meta_grads.items()}


def push_forward(learner, views, tape, v):
    """Derivatives of representations and projections, (2, N, d) and (2, N, 128), along v (see `Learner.tangent`)."""
    if learner.tangent not in ("exact", "difference"):
        raise ValueError(f"meta.tangent: 'exact' or 'difference', not {learner.tangent!r}")
    with autocast(views, learner.bf16):
        if learner.tangent == "exact":
            dh, dz = forward_mode.tangent(learner.encoder, views, tape, v)
        else:
            dh, dz = difference(learner, views, tape, v)
    return global_pairs(dh), global_pairs(dz)


def difference(learner, views, tape, v):
    """The central difference of the encoder's outputs along v."""
    # Far enough for float32 rounding, near enough to cross few of the ReLUs' kinks (test_step.py).
    encoder, params = learner.encoder, learner.moved
    norms = [torch.stack(torch._foreach_norm(list(d.values()))).norm() for d in (params, v)]
    eps = 5e-6 * norms[0] / norms[1].clamp_min(torch.finfo(norms[1].dtype).tiny)
    outputs = []
    for sign in (1, -1):
        moved = {k: p + sign * eps * v[k] for k, p in params.items()}
        with torch.no_grad(), forward_mode.same_random_numbers(tape):
            moved = {**moved, **forward_mode.scratch_buffers(encoder)}
            outputs.append(forward_mode.recorded(encoder, views, moved)[0])
    return tuple((p.float() - m.float()) / (2 * eps) for p, m in zip(*outputs))


def directional_gradient(learner, outputs, derivatives, about=None):
    """Gradient, with respect to CMW-Net, of the weighted loss's derivative along (dh, dz).

    Args:
        outputs: representations (2, N, d) and projections (2, N, 128); derivatives: theirs. None for that of the
            representations: the weights are constants in the look-ahead, not functions of the encoder.
        about: `weighting.About` of the pairs.

    Returns:
        A list of tensors, in the order of `cmw.parameters()`.
    """
    h, z = (x.detach().requires_grad_() for x in outputs)
    dh, dz = derivatives
    loss = learner.loss(z, learner.weigh(h, z, about))
    if dh is None or learner.weighting.input == "statistics":
        (loss_z,) = torch.autograd.grad(loss, [z], create_graph=True)
        slope = (loss_z * dz).sum()
    else:
        loss_h, loss_z = torch.autograd.grad(loss, [h, z], create_graph=True)
        slope = (loss_h * dh).sum() + (loss_z * dz).sum()
    return torch.autograd.grad(slope, list(learner.cmw.parameters()))
