"""The training step of Meta-USCL, top to bottom as in the paper (section III).

Shapes: a batch is N clips (over all ranks), two views each. `views` is (2n, C, H, W): this rank's n first views,
then the n second views. Representations h are (2, N, d), projections z are (2, N, 128).
"""

import time
from functools import partial
from typing import NamedTuple

import torch

from training import distributed
from training.method.forward_mode import recorded, release, same_random_numbers, scratch_buffers, tangent
from training.method.loss import info_nce


class Step(NamedTuple):
    """What a step reports: 0-dim tensors, the final step's weights (N,), and the seconds spent on meta-learning."""

    loss: torch.Tensor
    weights: torch.Tensor | None
    meta_loss: torch.Tensor | None = None
    meta_seconds: float = 0.0


def contrastive_step(encoder, optimizer, views, temperature, cmw=None, decoupled=False, anchor=None):
    """One step of SimCLR / USCL: unweighted InfoNCE (or weighted by a CMW-Net that is not updated).

    decoupled, anchor: as in `meta_step`.
    """
    h, z = forward(encoder, views)[:2]  # not the tape: it would keep what the backward pass frees
    weights = None if cmw is None else cmw(h).detach()
    loss = info_nce(z, weights, temperature, decoupled)
    apply_gradients(encoder, optimizer, add(gradients(loss, encoder), anchor))
    return Step(loss.detach(), weights)


def meta_step(
    encoder,
    cmw,
    optimizer,
    cmw_optimizer,
    views,
    meta_views,
    temperature,
    delayed=False,
    direction="exact",
    shuffle=False,
    decoupled=False,
    anchor=None,
):
    """One step of Meta-USCL: look ahead, learn the weights from clean pairs, step with the new weights.

    The meta-loss depends on CMW-Net only through the looked-ahead weights theta' = theta - lr (dL/dtheta + ...),
    so its gradient with respect to CMW-Net is that of <dL/dtheta, v>, with v = -lr dL_meta/dtheta'. That is the
    derivative of the weighted loss L along v: forward mode gives it, and no second-order graph is ever built.

    Args:
        encoder, cmw: `model.Encoder` and `model.CMWNet`.
        optimizer: SGD of the encoder; cmw_optimizer: of CMW-Net.
        views: (2n, C, H, W); meta_views: (2m, C, H, W), clean pairs of held-out clips.
        temperature: of InfoNCE.
        delayed: step with the weights from before CMW-Net's update, taken as constants in the look-ahead too:
            the look-ahead's gradient then serves as the final one.
        direction: 'exact' (forward mode) or 'difference' (central difference of two forward passes).
        shuffle: a control: in the final step every pair has the weight of the pair before it in the batch.
        decoupled: of InfoNCE, see `loss.info_nce`.
        anchor: gradient of another loss that the encoder descends beside the contrastive one (a list in the order of
            its parameters), in the look-ahead and in the final step alike, or None.
    """
    # 1. Forward at the current weights, kept for the look-ahead and for the final backward pass.
    h, z, tape = forward(encoder, views)

    start = time.perf_counter()

    # 2. Look ahead: the step the optimiser would take with the present CMW-Net.
    weights = cmw(h.detach() if delayed else h)
    loss = info_nce(z, weights.detach() if delayed else weights, temperature, decoupled)
    grads = add(gradients(loss, encoder, retain_graph=not delayed), anchor)
    ahead = look_ahead(encoder, optimizer, grads)
    if direction == "exact":  # memory is scarcest in 3
        release(tape)
    if not delayed:
        del grads

    # 3. Unweighted loss of the clean pairs there, and its gradient.
    meta_z = forward(encoder, meta_views, {**ahead, **scratch_buffers(encoder)})[1]
    meta_loss = info_nce(meta_z, None, temperature, decoupled)
    free_in_backward(ahead.values())
    meta_grads = distributed.sum_(list(torch.autograd.grad(meta_loss, list(ahead.values()))))
    del ahead, meta_z

    # 4. Descend the meta-loss with respect to CMW-Net.
    v = look_ahead_direction(encoder, optimizer, meta_grads)
    dh, dz = push_forward(encoder, views, tape, v, direction)
    del meta_grads, v, tape
    cmw_grads = directional_gradient(cmw, h, z, None if delayed else dh, dz, temperature, decoupled)
    for p, g in zip(cmw.parameters(), cmw_grads):
        p.grad = g
    cmw_optimizer.step()

    seconds = time.perf_counter() - start

    # 5. Step the encoder with the new weights.
    if not delayed:
        weights = cmw(h).detach()
        loss = info_nce(z, weights.roll(1) if shuffle else weights, temperature, decoupled)
        grads = add(gradients(loss, encoder), anchor)
    apply_gradients(encoder, optimizer, grads)
    return Step(loss.detach(), weights.detach(), meta_loss.detach(), seconds)


def forward(encoder, views, params=None):
    """Representations (2, N, d) and projections (2, N, 128) of all ranks, and the tape of this rank's pass."""
    (h, z), tape = recorded(encoder, views, params)
    return global_pairs(h), global_pairs(z), tape


def global_pairs(x):
    """(2n, d) of this rank -> (2, N, d) of all ranks, at least float32 (the head is too small for less)."""
    x = x if x.dtype == torch.float64 else x.float()
    return distributed.gather(x.unflatten(0, (2, -1)))


def gradients(loss, encoder, retain_graph=False):
    """Gradient of the global loss for every parameter of the encoder (a list, summed over ranks)."""
    return distributed.sum_(list(torch.autograd.grad(loss, list(encoder.parameters()), retain_graph=retain_graph)))


def add(grads, anchor):
    """Add another loss's gradient, in place, where there is one."""
    if anchor is not None:
        torch._foreach_add_(grads, anchor)
    return grads


def apply_gradients(encoder, optimizer, grads):
    for p, g in zip(encoder.parameters(), grads):
        p.grad = g
    optimizer.step()
    optimizer.zero_grad()


def look_ahead(encoder, optimizer, grads):
    """Weights after the SGD step that `optimizer` would take with `grads`: new leaf tensors by name.

    Learning rate, momentum buffer and weight decay are the optimiser's own; nothing of it changes.
    """
    ahead = {}
    grads = dict(zip(encoder.parameters(), grads))
    names = {p: name for name, p in encoder.named_parameters()}
    for group in optimizer.param_groups:
        params, lr = group["params"], group["lr"]
        moved = torch._foreach_mul([p.detach() for p in params], 1 - lr * group["weight_decay"])
        torch._foreach_add_(moved, [grads[p] for p in params], alpha=-lr)
        buffers = [optimizer.state[p].get("momentum_buffer") for p in params]
        if group["momentum"] and buffers[0] is not None:
            torch._foreach_add_(moved, buffers, alpha=-lr * group["momentum"])
        ahead.update({names[p]: t.requires_grad_() for p, t in zip(params, moved)})
    return {name: ahead[name] for name in names.values()}


def free_in_backward(leaves):
    """Free each leaf's memory as soon as the backward pass has its whole gradient: nobody needs it from there on."""
    for leaf in leaves:
        leaf.register_hook(partial(_free, leaf.untyped_storage()))


def _free(storage, _gradient):
    storage.resize_(0)


def look_ahead_direction(encoder, optimizer, meta_grads):
    """The transposed derivative of `look_ahead` in its gradient, applied to `meta_grads` in place: -lr x, by name."""
    lr = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: g.mul_(-lr[p]) for (name, p), g in zip(encoder.named_parameters(), meta_grads)}


def push_forward(encoder, views, tape, direction, how="exact"):
    """Derivatives of representations and projections, (2, N, d) and (2, N, 128), along `direction` (by name)."""
    if how == "exact":
        dh, dz = tangent(encoder, views, tape, direction)
    elif how == "difference":
        # Far enough for float32 rounding, near enough to cross few of the ReLUs' kinks (test_step.py).
        params = dict(encoder.named_parameters())
        norms = [torch.stack(torch._foreach_norm(list(d.values()))).norm() for d in (params, direction)]
        eps = 5e-6 * norms[0] / norms[1].clamp_min(torch.finfo(norms[1].dtype).tiny)
        outputs = []
        for sign in (1, -1):
            moved = {k: p + sign * eps * direction[k] for k, p in params.items()}
            with torch.no_grad(), same_random_numbers(tape):
                outputs.append(recorded(encoder, views, {**moved, **scratch_buffers(encoder)})[0])
        dh, dz = ((p.float() - m.float()) / (2 * eps) for p, m in zip(*outputs))
    else:
        raise ValueError(f"meta.tangent: 'exact' or 'difference', not {how!r}")
    return global_pairs(dh), global_pairs(dz)


def directional_gradient(cmw, h, z, dh, dz, temperature, decoupled=False):
    """Gradient, with respect to CMW-Net, of the weighted loss's derivative along (dh, dz).

    Args:
        h, z, dh, dz: representations (2, N, d), projections (2, N, 128) and their derivatives. dh None: the
            weights are constants in the look-ahead, not functions of the encoder.

    Returns:
        A list of tensors, in the order of `cmw.parameters()`.
    """
    h, z = h.detach().requires_grad_(), z.detach().requires_grad_()
    loss = info_nce(z, cmw(h), temperature, decoupled)
    if dh is None:
        (loss_z,) = torch.autograd.grad(loss, [z], create_graph=True)
        slope = (loss_z * dz).sum()
    else:
        loss_h, loss_z = torch.autograd.grad(loss, [h, z], create_graph=True)
        slope = (loss_h * dh).sum() + (loss_z * dz).sum()
    return torch.autograd.grad(slope, list(cmw.parameters()))
