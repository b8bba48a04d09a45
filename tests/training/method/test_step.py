"""The mathematics of the training step against independent, plain computations."""

import copy

import pytest
import torch
from meta_problem import TEMPERATURE, build, naive_info_nce, per_view, relative
from torch import nn
from torch.func import functional_call, jvp

from training.method import step
from training.method.forward_mode import recorded, release, tangent
from training.method.loss import info_nce
from training.method.networks import CMWNet, Encoder

cosine = nn.CosineSimilarity(dim=0)


def test_info_nce_equals_the_naive_loop():
    torch.manual_seed(0)
    z, w = torch.randn(2, 5, 7, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(info_nce(z, w, TEMPERATURE), naive_info_nce(z, w), rtol=1e-12, atol=0)
    torch.testing.assert_close(info_nce(z, None, TEMPERATURE), naive_info_nce(z), rtol=1e-12, atol=0)
    torch.testing.assert_close(info_nce(z, 9 * w), info_nce(z, w))  # the weights' scale is normalised away
    with pytest.raises(ValueError, match="N >= 2"):
        info_nce(z[:, :1])


def meta_step(problem, delayed=False, tangent="exact", depth=0, bf16=False, **options):
    """A step on a problem that `build` made."""
    encoder, cmw, optimizer, cmw_optimizer, views, clean = problem
    learner = step.Learner(encoder, optimizer, cmw, cmw_optimizer, TEMPERATURE, tangent=tangent, depth=depth, bf16=bf16)
    return (step.delayed_step if delayed else step.exact_step)(learner, views, clean, **options)


def oracle(encoder, cmw, optimizer, views, meta_views, delayed=False, other=None, moved=lambda name: True):
    """CMW-Net's gradient by plain double backward through the unrolled step, and the look-ahead weights.

    other: a second loss beside the contrastive one, a function of the views' representations and projections.
    moved: whether the look-ahead moves the parameter of this name.
    """
    params = {name: p for name, p in encoder.named_parameters() if moved(name)}
    h, z = per_view(encoder, views)
    loss = naive_info_nce(z, cmw(h.detach() if delayed else h)) + (0 if other is None else other(h, z))
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    group = optimizer.param_groups[0]
    ahead = {}
    for (name, p), g in zip(params.items(), grads):
        buffer = group["momentum"] * optimizer.state[p]["momentum_buffer"] + g + group["weight_decay"] * p
        ahead[name] = p - group["lr"] * buffer
    _, meta_z = per_view(encoder, meta_views, ahead)
    return torch.autograd.grad(naive_info_nce(meta_z), list(cmw.parameters())), ahead


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "convnext_atto", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("delayed", [False, True])
def test_meta_gradient_equals_double_backward(name, delayed):
    kwargs = {"img_size": 32} if name.startswith("vit") else {}
    encoder, cmw, optimizer, cmw_optimizer, views, meta_views = build(name, **kwargs)
    expected, ahead = oracle(encoder, cmw, optimizer, views, meta_views, delayed)
    before = copy.deepcopy(encoder.state_dict())
    weights = meta_step((encoder, cmw, optimizer, cmw_optimizer, views, meta_views), delayed).weights
    assert min(g.norm() for g in expected) > 0
    assert relative([p.grad for p in cmw.parameters()], expected) < 1e-9

    if delayed:  # the look-ahead was the real step
        assert relative(list(encoder.parameters()), [ahead[k] for k, _ in encoder.named_parameters()]) < 1e-12
    else:  # the final step is plain SGD on the loss with the new weights as constants
        reference, _, reference_optimizer, *_ = build(name, **kwargs)
        h, z = per_view(reference, views)
        naive_info_nce(z, cmw(h).detach()).backward()
        reference_optimizer.step()
        assert relative(list(encoder.parameters()), list(reference.parameters())) < 1e-12
        torch.testing.assert_close(weights, cmw(h).detach())
    for key, value in encoder.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert value == before[key] + 1  # once a step


TOPS = {  # by depth, what a reader of the architecture would call its last stages
    ("resnet18", 1): ("backbone.layer4.", "projector."),
    ("resnet18", 2): ("backbone.layer4.", "backbone.layer3.", "projector."),
    ("mobilenetv2_050", 1): ("backbone.conv_head.", "backbone.bn2.", "backbone.blocks.6.", "projector."),
    ("densenet121", 1): ("backbone.features.norm5.", "projector."),
    ("vit_tiny_patch16_224", 2): (*(f"backbone.{n}." for n in ("blocks.10", "blocks.11", "norm")), "projector."),
}


QUICK = ("resnet18", 1), ("mobilenetv2_050", 1)


@pytest.mark.parametrize(
    "name, depth", [pytest.param(*top, marks=() if top in QUICK else pytest.mark.slow) for top in TOPS]
)
@pytest.mark.parametrize("delayed", [False, True])
def test_meta_gradient_of_the_last_stages_equals_double_backward(name, depth, delayed):
    kwargs = {"img_size": 32} if name.startswith("vit") else {}
    problem = encoder, cmw, optimizer, _, views, clean = build(name, **kwargs)
    top = TOPS[name, depth]
    expected, ahead = oracle(encoder, cmw, optimizer, views, clean, delayed, moved=lambda name: name.startswith(top))
    assert ahead.keys() == encoder.last(depth).keys()
    whole = oracle(encoder, cmw, optimizer, views, clean, delayed)[0]
    meta_step(problem, delayed, depth=depth)
    assert relative([p.grad for p in cmw.parameters()], expected) < 1e-9 < 1e-2 < relative(whole, expected)
    reference, _, reference_optimizer, *_ = build(name, **kwargs)  # the step itself moves everything
    h, z = per_view(reference, views)
    weigh = build(name, **kwargs)[1] if delayed else cmw  # as it was before its update
    naive_info_nce(z, weigh(h).detach()).backward()
    reference_optimizer.step()
    assert relative(list(encoder.parameters()), list(reference.parameters())) < 1e-12


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_depth_of_all_stages_is_the_whole_step_bit_for_bit(delayed, bf16):
    whole, all_stages = (build("resnet18", dtype=torch.float32) for _ in range(2))
    a = meta_step(whole, delayed, bf16=bf16)
    b = meta_step(all_stages, delayed, depth=len(all_stages[0].stages), bf16=bf16)
    assert torch.equal(a.loss, b.loss) and torch.equal(a.meta_loss, b.meta_loss) and torch.equal(a.weights, b.weights)
    for one, other in zip(whole[:2], all_stages[:2]):
        state = other.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in one.state_dict().items())


def test_depth_above_held_stages_with_fewer_clean_pairs_agrees_with_differences():
    *problem, clean = build("resnet18")
    problem[0].hold(2)
    problem = *problem, clean[[0, 1, 4, 5]]
    exact = meta_gradient(problem, depth=2)
    assert cosine(meta_gradient(problem, "difference", depth=2), exact) > 0.9999
    assert cosine(meta_gradient(problem), exact) < 0.9999


@pytest.mark.parametrize("delayed", [False, True])
def test_meta_gradient_beside_another_loss_equals_double_backward(delayed):
    def other(h, z):
        return h.square().mean() + z[0].sin().mean()

    problem = build("test_resnet")
    encoder, cmw, optimizer, _, views, clean = problem
    expected, ahead = oracle(encoder, cmw, optimizer, views, clean, delayed, other)
    without = oracle(encoder, cmw, optimizer, views, clean, delayed)[0]
    params = dict(encoder.named_parameters())
    anchor = dict(zip(params, torch.autograd.grad(other(*per_view(encoder, views)), list(params.values()))))
    meta_step(problem, delayed, anchor=anchor)
    assert relative([p.grad for p in cmw.parameters()], expected) < 1e-9 < 1e-3 < relative(without, expected)
    if delayed:  # the look-ahead was the real step
        assert relative(list(params.values()), [ahead[k] for k in params]) < 1e-12
    else:
        reference, _, reference_optimizer, *_ = build("test_resnet")
        h, z = per_view(reference, views)
        (naive_info_nce(z, cmw(h).detach()) + other(h, z)).backward()
        reference_optimizer.step()
        assert relative(list(params.values()), list(reference.parameters())) < 1e-12


@pytest.mark.parametrize("tangent, tolerance", [("exact", 1e-9), ("difference", 1e-3)])
def test_random_layers_draw_the_same_in_every_pass_at_the_same_weights(tangent, tolerance):
    problem = encoder, cmw, optimizer, _, views, meta_views = build("test_convnext", drop_path_rate=0.3, drop_rate=0.2)
    params = dict(encoder.named_parameters())
    torch.manual_seed(3)
    h, z = (t.unflatten(0, (2, -1)) for t in encoder(views))  # layer norm: the views do not touch each other
    grads = torch.autograd.grad(naive_info_nce(z, cmw(h)), list(params.values()), create_graph=True)
    group, state = optimizer.param_groups[0], optimizer.state
    ahead = {
        name: p - group["lr"] * (group["momentum"] * state[p]["momentum_buffer"] + g + group["weight_decay"] * p)
        for (name, p), g in zip(params.items(), grads)
    }
    meta_z = functional_call(encoder, ahead, (meta_views,))[1].unflatten(0, (2, -1))
    expected = torch.autograd.grad(naive_info_nce(meta_z), list(cmw.parameters()))
    torch.manual_seed(3)
    meta_step(problem, tangent=tangent)
    assert relative([p.grad for p in cmw.parameters()], expected) < tolerance


def test_shuffled_weights_go_to_the_next_pair_in_the_final_step_only():
    problem = encoder, cmw, optimizer, _, views, meta_views = build("test_resnet")
    expected = oracle(encoder, cmw, optimizer, views, meta_views)[0]
    result = meta_step(problem, shuffle=True)
    assert relative([p.grad for p in cmw.parameters()], expected) < 1e-9  # CMW-Net learns as ever
    reference, _, reference_optimizer, *_ = build("test_resnet")
    h, z = per_view(reference, views)
    weights = cmw(h).detach()
    torch.testing.assert_close(result.weights, weights)
    naive_info_nce(z, [weights[i - 1] for i in range(len(weights))]).backward()
    reference_optimizer.step()
    assert relative(list(encoder.parameters()), list(reference.parameters())) < 1e-12


def test_running_statistics_move_once_by_the_real_batch():
    problem = encoder, _, _, _, views, _ = build("resnet18")
    bn = encoder.backbone.bn1
    mean, var = bn.running_mean.clone(), bn.running_var.clone()
    x = encoder.backbone.conv1(views).detach()
    v = torch.stack([c.var((0, 2, 3)) for c in x.chunk(2)]).mean(0)
    m = torch.stack([c.mean((0, 2, 3)) for c in x.chunk(2)]).mean(0)
    meta_step(problem)
    torch.testing.assert_close(bn.running_mean, 0.9 * mean + 0.1 * m)
    torch.testing.assert_close(bn.running_var, 0.9 * var + 0.1 * v)


def test_look_ahead_equals_the_optimizer():
    encoder, _, optimizer, *_ = build("resnet18")
    learner = step.Learner(encoder, optimizer)
    grads = {name: torch.randn_like(p) for name, p in encoder.named_parameters()}
    ahead = step.look_ahead(learner, grads)
    before = [p.clone() for p in encoder.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), before))
    step.apply_gradients(learner, grads)
    for name, p in encoder.named_parameters():
        torch.testing.assert_close(ahead[name], p, rtol=1e-14, atol=1e-14)


class Awkward(nn.Module):
    """Layers that overwrite what the tape holds, a batch norm without weights, a ReLU's output that is returned."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.b, self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1, groups=2)

    def forward(self, x):
        x = nn.functional.relu(self.norm(nn.functional.silu(self.a(x), inplace=True)), inplace=True)
        x = nn.functional.relu(nn.functional.max_pool2d(self.b(x), 3, 2, 1), inplace=True)
        x = x + nn.functional.relu(self.c(x))
        h = nn.functional.relu(self.d(x).mean((2, 3)), inplace=True)
        return h, h.square()


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "awkward"])
def test_tangent_and_the_restored_graph_are_exact(name):
    torch.manual_seed(0)
    network = (Awkward() if name == "awkward" else Encoder(name, dim=16)).double().train()
    x = torch.randn(8, 3, 64, 64, dtype=torch.float64)
    params = dict(network.named_parameters())
    direction = {k: torch.randn_like(p) for k, p in params.items()}
    _, expected = jvp(lambda p: tuple(per_view(network, x, p)), (params,), (direction,))

    (h, z), tape = recorded(network, x)
    loss = (h.sin().sum() + z.cos().sum()) / len(x)
    before = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
    copies = h.clone(), z.clone()
    release(tape)
    assert torch.equal(h, copies[0]) and torch.equal(z, copies[1])
    assert relative(tangent(network, x, tape, direction), [e.flatten(0, 1) for e in expected]) < 1e-11
    after = torch.autograd.grad(loss, list(params.values()))
    assert relative(after, before) < 1e-11


def meta_gradient(problem, tangent="exact", bf16=False, depth=0):
    """CMW-Net's gradient in a step on a copy of the problem."""
    problem = copy.deepcopy(problem)
    meta_step(problem, tangent=tangent, depth=depth, bf16=bf16)
    return torch.cat([p.grad.flatten() for p in problem[1].parameters()]).double()


@pytest.mark.parametrize("delayed", [False, True])
def test_in_bf16_the_step_has_the_weights_and_the_loss_of_float32(delayed, monkeypatch):
    encoder, cmw, optimizer, cmw_optimizer, *batch = build("test_resnet", dtype=torch.float32)
    cmw_optimizer.param_groups[0]["lr"] = 0.5  # so far that weights of before the update would show
    outputs, kept = [], step.global_pairs
    monkeypatch.setattr(step, "global_pairs", lambda x: outputs.append(kept(x)) or outputs[-1])
    before = copy.deepcopy(cmw)
    result = meta_step((encoder, cmw, optimizer, cmw_optimizer, *batch), delayed, bf16=True)
    h, z = (x.detach() for x in outputs[:2])
    expected = (before if delayed else cmw)(h).detach()
    assert torch.equal(result.weights, expected) and (before(h) - cmw(h)).abs().max() > 0.01
    assert torch.equal(result.loss, step.info_nce(z, expected, TEMPERATURE))  # to the bit: nothing of it is in bf16


@pytest.mark.slow
def test_cheaper_arithmetic_keeps_the_direction():
    single = build("resnet18", clips=16, px=64, dtype=torch.float32)
    encoder, cmw, optimizer, cmw_optimizer, *batch = copy.deepcopy(single)
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    double = encoder.double(), cmw.double(), optimizer, cmw_optimizer, *(b.double() for b in batch)
    exact = meta_gradient(double)
    assert cosine(meta_gradient(single), exact) > 0.9999
    assert cosine(meta_gradient(single, tangent="difference"), exact) > 0.999


def test_bf16_keeps_the_direction_in_a_settled_training():
    """At initialisation it does not: early steps are sensitive to rounding (benchmark.py, accuracy)."""
    torch.manual_seed(0)
    encoder = Encoder("test_resnet", dim=16).train()
    cmw = CMWNet(encoder.num_features)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    cmw_optimizer = torch.optim.Adam(cmw.parameters(), lr=1e-3)
    scenes = [nn.functional.interpolate(torch.randn(16, 3, 8, 8), size=32, mode="bilinear") for _ in range(2)]
    rough = exact = 0  # over four steps: Adam averages over more
    for i in range(28):
        batch = [torch.cat([s, s]) + 0.1 * torch.randn(32, 3, 32, 32) for s in scenes]
        problem = encoder, cmw, optimizer, cmw_optimizer, *batch
        if i >= 24:
            rough, exact = rough + meta_gradient(problem, bf16=True), exact + meta_gradient(problem)
        meta_step(problem)
    assert 0.99 < cosine(rough, exact) < 0.999999  # it is no float32
