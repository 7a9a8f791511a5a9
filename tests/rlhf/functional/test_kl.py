"""Expectations are enumerated over a small vocabulary, never sampled."""

import math

import pytest
import torch

from rlhf.functional.kl import ESTIMATORS, categorical_kl, k1, k2, k3, sequence_kl

LOGITS_V = torch.tensor([0.4, -1.1, 0.9, 0.0, -0.3], dtype=torch.float64)
REF_LOGP_V = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64).log()


def expected_gradient(estimator) -> torch.Tensor:
    """Gradient of the estimator as a loss, averaged over every token the policy can sample."""
    logits_V = LOGITS_V.clone().requires_grad_()
    logp_V = logits_V.log_softmax(-1)
    sampling_V = logp_V.detach().exp()
    return torch.autograd.grad((sampling_V * estimator(logp_V, REF_LOGP_V)).sum(), logits_V)[0]


def exact_gradient(divergence) -> torch.Tensor:
    logits_V = LOGITS_V.clone().requires_grad_()
    return torch.autograd.grad(divergence(logits_V.log_softmax(-1)), logits_V)[0]


def test_estimators_by_hand():
    logp, ref = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    assert k1(logp, ref).item() == pytest.approx(math.log(2))
    assert k2(logp, ref).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(logp, ref).item() == pytest.approx(0.5 - 1 + math.log(2))
    assert {"k1": k1, "k2": k2, "k3": k3} == ESTIMATORS


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_vanishes_where_the_policies_agree(name):
    assert not ESTIMATORS[name](REF_LOGP_V, REF_LOGP_V).any()


@pytest.mark.parametrize("estimator", [k2, k3])
def test_k2_and_k3_are_never_negative(estimator):
    logp_N, ref_N = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    assert (estimator(logp_N, ref_N) >= 0).all()
    assert (estimator(logp_N, logp_N + 1e-4) > 0).all()


def test_categorical_kl_by_hand_and_against_torch():
    p_V, q_V = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    assert categorical_kl(p_V.log(), q_V.log()).item() == pytest.approx(0.5 * math.log(4 / 3))
    logp_V = LOGITS_V.log_softmax(-1)
    expected = torch.nn.functional.kl_div(REF_LOGP_V, logp_V, log_target=True, reduction="sum")
    torch.testing.assert_close(categorical_kl(logp_V, REF_LOGP_V), expected)


def test_categorical_kl_of_zeros():
    half_V, one_V = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([1.0, 0.0, 0.0]).log()
    logp_V = one_V.clone().requires_grad_()
    kl = categorical_kl(logp_V, half_V)
    kl.backward()
    assert kl.item() == pytest.approx(math.log(2))
    assert logp_V.grad.isfinite().all()
    assert categorical_kl(half_V, one_V).item() == math.inf


def test_categorical_kl_keeps_leading_axes():
    logp_BV = torch.randn(3, 4, 5).log_softmax(-1)
    kl_BT = categorical_kl(logp_BV, logp_BV.roll(1, 0))
    assert kl_BT.shape == (3, 4)
    torch.testing.assert_close(kl_BT[1, 2], categorical_kl(logp_BV[1, 2], logp_BV[0, 2]))


@pytest.mark.parametrize("estimator", [k1, k3])
def test_the_mean_of_k1_and_of_k3_is_the_exact_kl(estimator):
    logp_V = LOGITS_V.log_softmax(-1)
    mean = (logp_V.exp() * estimator(logp_V, REF_LOGP_V)).sum()
    torch.testing.assert_close(mean, categorical_kl(logp_V, REF_LOGP_V))


def test_the_mean_of_k2_is_close_to_the_exact_kl_for_close_policies():
    logp_V = (REF_LOGP_V + 0.01 * LOGITS_V).log_softmax(-1)
    mean = (logp_V.exp() * k2(logp_V, REF_LOGP_V)).sum()
    exact = categorical_kl(logp_V, REF_LOGP_V)
    assert mean.item() == pytest.approx(exact.item(), rel=0.02)
    assert mean.item() != pytest.approx(exact.item(), rel=1e-6)


def test_k1_as_a_loss_has_no_expected_gradient():
    torch.testing.assert_close(expected_gradient(k1), torch.zeros_like(LOGITS_V))


def test_k2_as_a_loss_has_the_gradient_of_the_reverse_kl():
    expected = exact_gradient(lambda logp_V: categorical_kl(logp_V, REF_LOGP_V))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(expected_gradient(k2), expected)


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl():
    expected = exact_gradient(lambda logp_V: categorical_kl(REF_LOGP_V, logp_V))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(expected_gradient(k3), expected)


def test_k1_in_the_reward_is_stationary_at_the_regularised_optimum_and_k2_k3_are_not():
    """At pi* = pi_ref exp(r / beta) / Z the policy gradient of r - beta k is E[(r - beta k) grad log pi*]."""
    beta, reward_V = 0.5, torch.tensor([1.0, 0.0, -1.0, 0.5, 0.2], dtype=torch.float64)
    optimum_logits_V = (REF_LOGP_V + reward_V / beta).requires_grad_()
    logp_V = optimum_logits_V.log_softmax(-1)
    size = {}
    for name, estimator in ESTIMATORS.items():
        signal_V = logp_V.exp() * (reward_V - beta * estimator(logp_V, REF_LOGP_V))
        gradient_V = torch.autograd.grad((signal_V.detach() * logp_V).sum(), optimum_logits_V, retain_graph=True)[0]
        size[name] = gradient_V.abs().max().item()
    assert size["k1"] < 1e-12
    assert min(size["k2"], size["k3"]) > 0.01


def test_sequence_kl_sums_over_the_actions():
    kl_BT = torch.tensor([[1.0, 2.0, math.nan], [0.5, -4.0, 0.25]])
    mask_BT = torch.tensor([[True, True, False], [True, False, True]])
    assert sequence_kl(kl_BT, mask_BT).tolist() == [3.0, 0.75]
    assert sequence_kl(kl_BT, torch.zeros_like(mask_BT)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="kl_BT has shape"):
        sequence_kl(kl_BT, mask_BT[:1])


def test_the_expected_sequence_kl_is_the_kl_between_the_distributions_of_responses():
    """Chain rule over two tokens, the second one drawn given the first."""
    generator = torch.Generator().manual_seed(3)
    first_V, ref_first_V = torch.randn(2, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    second_VV, ref_second_VV = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    logp_BT = torch.stack([first_V[pairs[:, 0]], second_VV[pairs[:, 0], pairs[:, 1]]], dim=1)
    ref_BT = torch.stack([ref_first_V[pairs[:, 0]], ref_second_VV[pairs[:, 0], pairs[:, 1]]], dim=1)
    kl_B = sequence_kl(k1(logp_BT, ref_BT), torch.ones(9, 2, dtype=torch.bool))
    exact = categorical_kl(logp_BT.sum(-1), ref_BT.sum(-1))
    torch.testing.assert_close((logp_BT.sum(-1).exp() * kl_B).sum(), exact)
