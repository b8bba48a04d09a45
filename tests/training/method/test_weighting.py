"""The variants of the weights: their gradients against double backward, and what they are."""

import pytest
import torch
from meta_problem import TEMPERATURE, build, naive_info_nce, per_view, relative

from training.method import step
from training.method.networks import StatisticsNet
from training.method.weighting import About, Weighting, falling, statistics, within_sources

ABOUT = About(torch.tensor([0.0, 7.0, 31.0, 2.0]), torch.tensor([9, 9, 40, 5]), torch.tensor([3, 0, 3, 0]))
VARIANTS = [Weighting("statistics"), Weighting("representation", True), Weighting("statistics", True)]


def problem(weighting, **options):
    encoder, cmw, optimizer, cmw_optimizer, views, clean = build("test_resnet")
    if weighting.input == "statistics":
        cmw = StatisticsNet().double()
        cmw_optimizer = torch.optim.Adam(cmw.parameters(), lr=1e-3)
    return (
        step.Learner(encoder, optimizer, cmw, cmw_optimizer, TEMPERATURE, weighting=weighting, **options),
        views,
        clean,
    )


def naive_weights(cmw, h, z, weighting):
    """The weights pair by pair, in the same symbols as the documentation."""
    n = h.shape[1]
    if weighting.input == "statistics":
        h, z = h.detach(), z.detach()
        losses = [naive_info_nce(z, torch.eye(n, dtype=z.dtype)[i] + 1e-300) for i in range(n)]
        similarity = [h[0, i] @ h[1, i] / h[0, i].norm() / h[1, i].norm() for i in range(n)]
        columns = [torch.stack(similarity), (ABOUT.distance.double() + 1).log(), torch.stack(losses)]
        w = cmw(torch.stack([(c - c.mean()) / c.var(correction=0).sqrt() for c in columns], dim=1))
    else:
        w = cmw(h)
    if not weighting.by_source:
        return w
    mean = {int(s): w[ABOUT.source == s].mean() for s in ABOUT.source}
    return torch.stack([w[i] / mean[int(ABOUT.source[i])] for i in range(n)])


def oracle(learner, views, clean, delayed):
    """CMW-Net's gradient by plain double backward through the unrolled step."""
    params, state = dict(learner.encoder.named_parameters()), learner.optimizer.state
    h, z = per_view(learner.encoder, views)
    weights = naive_weights(learner.cmw, h.detach() if delayed else h, z, learner.weighting)
    grads = torch.autograd.grad(naive_info_nce(z, weights), list(params.values()), create_graph=True)
    ahead = {
        name: p - 0.1 * (0.9 * state[p]["momentum_buffer"] + g + 1e-2 * p)
        for (name, p), g in zip(params.items(), grads)
    }
    meta_z = per_view(learner.encoder, clean, ahead)[1]
    return torch.autograd.grad(naive_info_nce(meta_z), list(learner.cmw.parameters()))


@pytest.mark.parametrize("weighting", VARIANTS)
@pytest.mark.parametrize("delayed", [False, True])
def test_meta_gradient_of_every_variant_equals_double_backward(weighting, delayed):
    learner, views, clean = problem(weighting)
    expected = oracle(learner, views, clean, delayed)
    reference, *_ = problem(weighting)
    result = (step.delayed_step if delayed else step.exact_step)(learner, views, clean, about=ABOUT)
    assert min(g.norm() for g in expected) > 0
    assert relative([p.grad for p in learner.cmw.parameters()], expected) < 1e-9

    h, z = per_view(reference.encoder, views)  # the step itself: the weights are constants
    weigh = reference.cmw if delayed else learner.cmw  # before, or after its update
    weights = naive_weights(weigh, h, z, weighting).detach()
    torch.testing.assert_close(result.weights, weights)
    naive_info_nce(z, weights).backward()
    reference.optimizer.step()
    assert relative(list(learner.encoder.parameters()), list(reference.encoder.parameters())) < 1e-12


def test_the_closed_form_weighs_a_plain_step():
    learner, views, _ = problem(Weighting(by_distance=True))
    reference, *_ = problem(Weighting())
    learner.cmw = None
    result = step.contrastive_step(learner, views, about=ABOUT)
    expected = torch.tensor([1, 3 / 10, 10 / 41, 4 / 6], dtype=torch.float64)
    torch.testing.assert_close(result.weights, expected, rtol=1e-6, atol=0)
    h, z = per_view(reference.encoder, views)
    naive_info_nce(z, expected).backward()
    reference.optimizer.step()
    assert relative(list(learner.encoder.parameters()), list(reference.encoder.parameters())) < 1e-7
    torch.testing.assert_close(result.similarity, torch.cosine_similarity(h[0], h[1]))
    torch.testing.assert_close(result.losses.mean(), naive_info_nce(z))


def test_a_step_of_single_images_has_finite_statistics():
    learner, views, _ = problem(VARIANTS[0])
    h, z = per_view(learner.encoder, views)
    same = torch.zeros(4)
    x = statistics(learner, h, z, About(same, same.long(), same.long()))
    assert torch.isfinite(x).all() and not x[:, 1].any() and not x.requires_grad
    torch.testing.assert_close(x[:, [0, 2]].mean(0), torch.zeros(2, dtype=x.dtype), atol=1e-12, rtol=0)
    assert falling(About(same, same.long(), same.long())).tolist() == [1, 1, 1, 1]


def test_within_sources_every_source_has_the_mean_weight_1():
    w, source = torch.rand(50), torch.randint(0, 5, (50,))
    scaled = within_sources(w, source)
    for s in range(5):
        torch.testing.assert_close(scaled[source == s].mean(), torch.tensor(1.0))
        torch.testing.assert_close(scaled[source == s], w[source == s] / w[source == s].mean())
