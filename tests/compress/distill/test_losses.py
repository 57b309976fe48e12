"""Distillation losses: zero for equal outputs, the papers' formulas, constants for teachers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from noctule.compress.distill import (
    attention_transfer,
    dkd,
    fitnets,
    hinton,
    mutual,
    regressor,
    rkd,
    self_distillation,
)

TARGETS = torch.tensor([0, 2, 4, 1, 3, 0])


def pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    own, taught = (torch.randn(6, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return own.requires_grad_(), taught.requires_grad_()


LOSSES = {
    "hinton": (hinton, (5,)),
    "dkd": (lambda s, t: dkd(s, t, TARGETS), (5,)),
    "fitnets": (fitnets, (3, 4, 4)),
    "attention": (attention_transfer, (3, 4, 4)),
    "rkd": (rkd, (7,)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_equal_outputs_cost_nothing_and_others_something(name):
    loss, shape = LOSSES[name]
    own, taught = pair(*shape)
    assert loss(own, own.detach().clone()).item() == pytest.approx(0.0, abs=1e-12)
    assert loss(own, taught) > 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_teachers_are_constants_and_gradients_are_right(name):
    loss, shape = LOSSES[name]
    own, taught = pair(*shape)
    loss(own, taught).backward()
    assert taught.grad is None
    assert own.grad is not None
    assert own.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda x: loss(x, taught.detach()), own)


def test_hinton_is_the_divergence_of_softened_outputs():
    own, taught = pair(5)
    p, q = (taught / 3).softmax(1), (own / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(hinton(own, taught, temperature=3.0), expected)


def test_dkd_with_the_teacher_s_own_weight_is_hinton():
    # KD = TCKD + (1 - p_target) NCKD for each sample (equation 7 of the paper)
    own, taught = (x[:1] for x in pair(5))
    target = TARGETS[:1]
    rest = 1.0 - (taught.detach() / 4).softmax(1)[0, target].item()
    torch.testing.assert_close(dkd(own, taught, target, alpha=1.0, beta=rest), hinton(own, taught))


def test_dkd_is_that_of_the_authors_code():
    own, taught = pair(5)
    mask = F.one_hot(TARGETS, 5).bool()
    p, q = (taught / 4).softmax(1), (own / 4).softmax(1)

    def binary(x):
        return torch.stack([x[mask], x.masked_fill(mask, 0).sum(1)], 1)

    target = F.kl_div(binary(q).log(), binary(p), reduction="sum") * 16 / 6
    rest = F.kl_div((own / 4 - 1000 * mask).log_softmax(1), (taught / 4 - 1000 * mask).softmax(1), reduction="sum")
    torch.testing.assert_close(dkd(own, taught, TARGETS, alpha=1.0, beta=8.0), target + 8 * rest * 16 / 6)


def test_rkd_is_that_of_the_paper():
    own, taught = pair(7)

    def relations(x):
        d = torch.cdist(x, x)
        e = F.normalize(x[None] - x[:, None], dim=2)
        return d / (d.sum() / 30), torch.einsum("ijd,ikd->ijk", e, e)

    (d, a), (dt, at) = relations(own), relations(taught)
    expected = 25 * F.smooth_l1_loss(d, dt) + 50 * F.smooth_l1_loss(a, at)
    torch.testing.assert_close(rkd(own, taught), expected)


def test_relations_do_not_see_scale_rotation_and_shift():
    own, _ = pair(7)
    turned = 3.0 * own.detach() @ torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q + 2.0
    assert rkd(own, turned).item() == pytest.approx(0.0, abs=1e-10)
    assert torch.isfinite(torch.autograd.grad(rkd(own * 0, turned), own)[0]).all()


def test_attention_does_not_see_channels_and_scale():
    own, _ = pair(3, 4, 4)
    assert attention_transfer(own, 5.0 * own[:, [2, 0, 1]].detach()).item() == pytest.approx(0.0, abs=1e-12)


def test_other_widths_and_sizes():
    own, taught = torch.randn(6, 3, 8, 8), torch.randn(6, 5, 4, 4)
    adapt = regressor(own, taught)
    fitnets(own, taught, adapt).backward()
    assert next(adapt.parameters()).grad is not None
    assert attention_transfer(own, taught) > 0
    flat = regressor(torch.randn(6, 3), torch.randn(6, 9))
    assert isinstance(flat, nn.Linear)
    assert flat.out_features == 9
    assert rkd(torch.randn(6, 3), torch.randn(6, 2, 5)) > 0


def test_mutual_is_symmetric_and_each_learns_from_constants():
    own, other = pair(5)
    torch.testing.assert_close(mutual([own, other], TARGETS), mutual([other, own], TARGETS))
    mutual([own, other], TARGETS).backward()
    expected = torch.autograd.grad(F.cross_entropy(own, TARGETS) + hinton(own, other.detach(), temperature=1.0), own)
    torch.testing.assert_close(own.grad, expected[0])


def test_the_last_exit_learns_from_targets_alone():
    early, last = pair(5)
    self_distillation((early, last), TARGETS).backward()
    torch.testing.assert_close(last.grad, torch.autograd.grad(F.cross_entropy(last, TARGETS), last)[0])
    assert early.grad is not None
    assert self_distillation(early, TARGETS) == F.cross_entropy(early, TARGETS)


def test_what_does_not_fit_is_refused():
    own, taught = pair(5)
    for call, match in (
        (lambda: hinton(own, taught[:3]), "must give"),
        (lambda: hinton(own[:, :1], taught[:, :1]), "at least 2 classes"),
        (lambda: hinton(own, taught, temperature=0.0), "temperature"),
        (lambda: dkd(own, taught, TARGETS[:3]), "one class for each sample"),
        (lambda: dkd(own, taught, taught), "one class for each sample"),
        (lambda: fitnets(own, torch.randn(6, 4)), "give a regressor="),
        (lambda: fitnets(own, torch.randn(6, 4, 2, 2)), "of one kind"),
        (lambda: attention_transfer(own, taught), "tap a convolution"),
        (lambda: rkd(own, taught[:3]), "same batch"),
        (lambda: rkd(own[:1], taught[:1]), "at least 2"),
        (lambda: mutual([own], TARGETS), "at least 2 students"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
