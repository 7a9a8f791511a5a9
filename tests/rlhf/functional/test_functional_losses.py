import math

import pytest
import torch
import torch.nn.functional as F

from rlhf.functional.losses import (
    explained_variance,
    explained_variance_from_moments,
    kl_loss,
    max_ratio_deviation,
    policy_loss,
    value_loss,
)
from rlhf.functional.masked import moments

ONE_BT = torch.ones(1, 1, dtype=torch.bool)


def one(x: float) -> torch.Tensor:
    return torch.tensor([[x]], dtype=torch.float64)


def ragged_batch(seed: int = 0):
    """Four rows with 5, 2, 1 and 0 actions: log-probabilities, old ones, advantages, mask."""
    generator = torch.Generator().manual_seed(seed)
    old_BT, noise_BT, advantages_BT = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    return old_BT + 0.3 * noise_BT, old_BT, advantages_BT, mask_BT


def gradient(loss_of, x: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss_of(leaf), leaf)[0]


def policy_of(old_BT, advantages_BT, mask_BT, **settings):
    settings = {"clip_range": 0.2, "denominator": 8, **settings}
    return lambda logprobs_BT: policy_loss(logprobs_BT, old_BT, advantages_BT, mask_BT, **settings)[0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.1, 2.0, -2.2, -2.2, 0),  # inside of the range: d loss / d logprob = -A ratio
        (1.5, 2.0, -2.4, 0.0, 1),  # already much likelier and good: clipped at 1.2
        (0.5, 2.0, -1.0, -1.0, 0),  # less likely but good: not clipped
        (0.5, -2.0, 1.6, 0.0, 1),  # already much less likely and bad: clipped at 0.8
        (1.5, -2.0, 3.0, 3.0, 0),  # likelier but bad: not clipped
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, slope, clipped):
    old_BT, logprobs_BT = one(-1.0), one(-1.0 + math.log(ratio))
    got, stats = policy_loss(logprobs_BT, old_BT, one(advantage), ONE_BT, clip_range=0.2, denominator=1)
    assert got.item() == pytest.approx(loss)
    assert gradient(policy_of(old_BT, one(advantage), ONE_BT, denominator=1), logprobs_BT).item() == pytest.approx(
        slope
    )
    assert stats["clipfrac"].item() == clipped
    assert stats["ratio"].item() == pytest.approx(ratio)
    assert stats["approxkl"].item() == pytest.approx(0.5 * math.log(ratio) ** 2)
    assert stats["tokens"].item() == 1


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [(10.0, -2.0, 6.0, 0.0), (2.0, -2.0, 4.0, 4.0), (10.0, 2.0, -2.4, 0.0), (0.1, -2.0, 1.6, 0.0)],
)
def test_dual_clip_bounds_the_loss_of_bad_actions_only(ratio, advantage, loss, slope):
    loss_of = policy_of(one(-3.0), one(advantage), ONE_BT, denominator=1, dual_clip=3.0)
    logprobs_BT = one(-3.0 + math.log(ratio))
    assert loss_of(logprobs_BT).item() == pytest.approx(loss)
    assert gradient(loss_of, logprobs_BT).item() == pytest.approx(slope)


def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient():
    _, old_BT, advantages_BT, mask_BT = ragged_batch()
    ppo = gradient(policy_of(old_BT, advantages_BT, mask_BT), old_BT)
    plain = gradient(lambda lp: -(advantages_BT * lp)[mask_BT].sum() / 8, old_BT)
    torch.testing.assert_close(ppo, plain)
    _, stats = policy_loss(old_BT, old_BT, advantages_BT, mask_BT, clip_range=0.2, denominator=8)
    assert {name: value.item() for name, value in stats.items()} == {
        "approxkl": 0,
        "clipfrac": 0,
        "ratio": 8,
        "tokens": 8,
    }


def test_the_log_ratio_is_clamped_before_it_overflows():
    for log_ratio, advantage, loss in [(500.0, -1.0, math.exp(20)), (-500.0, 1.0, -math.exp(-20))]:
        logprobs_BT = torch.tensor([[log_ratio]])
        zero_BT = torch.zeros(1, 1)
        got, stats = policy_loss(
            logprobs_BT, zero_BT, torch.tensor([[advantage]]), ONE_BT, clip_range=0.2, denominator=1
        )
        assert got.item() == pytest.approx(loss)
        assert stats["approxkl"].item() == 200


def test_only_the_current_logprobs_receive_a_gradient():
    logprobs_BT, old_BT, advantages_BT, mask_BT = (
        x.requires_grad_() if x.is_floating_point() else x for x in ragged_batch()
    )
    loss, stats = policy_loss(logprobs_BT, old_BT, advantages_BT, mask_BT, clip_range=0.2, denominator=8)
    loss.backward()
    assert logprobs_BT.grad is not None
    assert old_BT.grad is None
    assert advantages_BT.grad is None
    assert not any(value.requires_grad or value.ndim for value in stats.values())


def losses_of_rows(rows) -> dict:
    """Each loss as a function of the trained tensor, on some rows of one batch, with a free denominator."""
    logprobs_BT, old_BT, advantages_BT, mask_BT = (x[rows] for x in ragged_batch())
    return {
        "policy": (
            logprobs_BT,
            lambda x, d: policy_loss(x, old_BT, advantages_BT, mask_BT, clip_range=0.2, denominator=d)[0],
        ),
        "value": (
            logprobs_BT,
            lambda x, d: value_loss(x, old_BT, advantages_BT, mask_BT, clip_range=0.2, denominator=d)[0],
        ),
        "k2": (logprobs_BT, lambda x, d: kl_loss(x, old_BT, mask_BT, estimator="k2", denominator=d)),
        "k3": (logprobs_BT, lambda x, d: kl_loss(x, old_BT, mask_BT, estimator="k3", denominator=d)),
    }


@pytest.mark.parametrize("name", ["policy", "value", "k2", "k3"])
@pytest.mark.parametrize("split", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 1, 2], [3]], [[3, 1], [0, 2]]])
def test_micro_batches_of_a_ragged_batch_give_the_gradient_of_the_whole(name, split):
    """Gradients are averaged over micro-batches, each divided by the mean action count per micro-batch."""
    trained_BT, loss_of = losses_of_rows(slice(None))[name]
    whole_BT = gradient(lambda x: loss_of(x, 8), trained_BT)
    averaged_BT = torch.zeros_like(whole_BT)
    for rows in split:
        micro_trained_BT, micro_loss_of = losses_of_rows(rows)[name]
        denominator = torch.tensor(8 / len(split))
        averaged_BT[rows] = gradient(lambda x, f=micro_loss_of, d=denominator: f(x, d), micro_trained_BT) / len(split)
    torch.testing.assert_close(averaged_BT, whole_BT, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rows", [[0, 1], [0], [1, 3]])
def test_statistics_add_up_over_micro_batches(rows):
    logprobs_BT, old_BT, advantages_BT, mask_BT = ragged_batch()
    rest = [row for row in range(4) if row not in rows]

    def statistics(part):
        args = (logprobs_BT[part], old_BT[part], advantages_BT[part], mask_BT[part])
        of_policy = policy_loss(*args, clip_range=0.2, denominator=3)[1]
        of_values = value_loss(*args, clip_range=0.2, denominator=3)[1]
        return [*of_policy.values(), *of_values.values()]

    parts = [a + b for a, b in zip(statistics(rows), statistics(rest), strict=True)]
    torch.testing.assert_close(parts, statistics(slice(None)), check_dtype=False)


@pytest.mark.parametrize("pad", [(3, 0), (0, 3), (1, 2)])
@pytest.mark.parametrize("junk", [1e9, math.nan, -math.inf])
def test_padding_of_any_kind_changes_neither_loss_nor_gradient(pad, junk):
    logprobs_BT, old_BT, advantages_BT, mask_BT = ragged_batch()
    padded_mask_BT = F.pad(mask_BT, pad)

    def padded(x_BT):
        return F.pad(torch.where(mask_BT, x_BT, junk), pad, value=junk)

    plain = (old_BT, advantages_BT)
    dirty = (padded(old_BT), padded(advantages_BT))
    pairs = [
        (policy_of(*plain, mask_BT, dual_clip=2.0), policy_of(*dirty, padded_mask_BT, dual_clip=2.0)),
        (
            lambda x: value_loss(x, *plain, mask_BT, clip_range=0.2, denominator=8)[0],
            lambda x: value_loss(x, *dirty, padded_mask_BT, clip_range=0.2, denominator=8)[0],
        ),
    ]
    for name in ("k2", "k3"):
        settings = {"estimator": name, "denominator": 8}
        pairs.append(
            (
                lambda x, s=settings: kl_loss(x, old_BT, mask_BT, **s),
                lambda x, s=settings: kl_loss(x, padded(old_BT), padded_mask_BT, **s),
            )
        )
    for clean_loss, dirty_loss in pairs:
        assert dirty_loss(padded(logprobs_BT)).item() == pytest.approx(clean_loss(logprobs_BT).item(), rel=1e-12)
        dirty_gradient_BT = gradient(dirty_loss, padded(logprobs_BT))
        torch.testing.assert_close(dirty_gradient_BT, F.pad(gradient(clean_loss, logprobs_BT), pad))
    assert max_ratio_deviation(padded(logprobs_BT), padded(old_BT), padded_mask_BT) == max_ratio_deviation(
        logprobs_BT, old_BT, mask_BT
    )


def test_a_micro_batch_without_actions_has_loss_zero_and_a_graph():
    logprobs_BT, old_BT, advantages_BT, mask_BT = (x[3:] for x in ragged_batch())
    assert not gradient(policy_of(old_BT, advantages_BT, mask_BT), logprobs_BT).any()


def test_max_ratio_deviation_by_hand():
    logprobs_BT = torch.tensor([[1.1, 0.7, 9.0]]).log()
    mask_BT = torch.tensor([[True, True, False]])
    zero_BT = torch.zeros(1, 3)
    assert max_ratio_deviation(logprobs_BT, zero_BT, mask_BT).item() == pytest.approx(0.3)
    assert max_ratio_deviation(logprobs_BT, logprobs_BT, mask_BT) == 0
    assert max_ratio_deviation(logprobs_BT, zero_BT, torch.zeros_like(mask_BT)) == 0
    assert max_ratio_deviation(zero_BT[:0], zero_BT[:0], mask_BT[:0]) == 0
    assert max_ratio_deviation(logprobs_BT * math.nan, zero_BT, mask_BT).isnan()


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope", "clipped"),
    [
        (1.1, 1.0, 2.0, 0.405, -0.9, 0),  # within the range
        (1.5, 1.0, 2.0, 0.32, 0.0, 1),  # moved beyond 1.2 towards the target: error of 1.2 counts
        (0.5, 1.0, 2.0, 1.125, -1.5, 0),  # moved away from the target: its own error is the larger one
    ],
)
def test_value_loss_by_hand(value, old, target, loss, slope, clipped):
    def loss_of(x):
        return value_loss(x, one(old), one(target), ONE_BT, clip_range=0.2, denominator=1)[0]

    _, stats = value_loss(one(value), one(old), one(target), ONE_BT, clip_range=0.2, denominator=1)
    assert loss_of(one(value)).item() == pytest.approx(loss)
    assert gradient(loss_of, one(value)).item() == pytest.approx(slope)
    assert stats["clipfrac"] == clipped
    assert stats["squared_error"].item() == pytest.approx((value - target) ** 2)


@pytest.mark.parametrize("clip_range", [0.2, math.inf])
def test_values_within_the_range_never_count_as_clipped(clip_range):
    values_BT, old_BT, returns_BT = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    values_BT, old_BT = 0.1 * values_BT.clamp(-1, 1), 0.1 * old_BT.clamp(-1, 1)
    all_BT = torch.ones(20, 50, dtype=torch.bool)
    loss, stats = value_loss(values_BT, old_BT, returns_BT, all_BT, clip_range=clip_range, denominator=1000)
    assert stats["clipfrac"] == 0
    torch.testing.assert_close(loss, 0.5 * F.mse_loss(values_BT, returns_BT))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_expected_gradient_of_the_kl_loss_on_the_policys_own_samples(estimator):
    """pi = 1/8, 3/8, 4/8 and a batch with exactly these frequencies, so the mean is the expectation."""
    tokens_B = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2])
    logits_V = torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64).log().requires_grad_()
    ref_V = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    logp_V = logits_V.log_softmax(-1)
    mask_BT = torch.ones(8, 1, dtype=torch.bool)
    loss = kl_loss(logp_V[tokens_B, None], ref_V[tokens_B, None], mask_BT, estimator=estimator, denominator=8)
    reverse, forward = (logp_V.exp() * (logp_V - ref_V)).sum(), (ref_V.exp() * (ref_V - logp_V)).sum()
    exact = {"k2": reverse, "k3": forward}[estimator]
    got, expected = (torch.autograd.grad(x, logits_V, retain_graph=True)[0] for x in (loss, exact))
    torch.testing.assert_close(got, expected)


def test_kl_loss_refuses_k1_and_says_why():
    with pytest.raises(ValueError, match=r"does not regularise.*expectation under the policy is zero"):
        kl_loss(one(0.0), one(0.0), ONE_BT, estimator="k1", denominator=1)
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'"):
        kl_loss(one(0.0), one(0.0), ONE_BT, estimator="k4", denominator=1)


def test_kl_loss_trains_the_policy_only():
    ref_BT = one(-1.0).requires_grad_()
    logprobs_BT = one(-2.0).requires_grad_()
    kl_loss(logprobs_BT, ref_BT, ONE_BT, estimator="k3", denominator=1).backward()
    assert ref_BT.grad is None
    assert logprobs_BT.grad.item() == pytest.approx(1 - math.e)


def test_explained_variance():
    returns_BT = torch.tensor([[1.0, 2.0, 3.0, math.nan]])
    mask_BT = torch.tensor([[True, True, True, False]])
    assert explained_variance(returns_BT + 5, returns_BT, mask_BT).item() == pytest.approx(1)
    assert explained_variance(torch.full((1, 4), 9.0), returns_BT, mask_BT).item() == pytest.approx(0)
    assert explained_variance(-returns_BT, returns_BT, mask_BT).item() == pytest.approx(-3)
    assert explained_variance(returns_BT / 2, returns_BT, mask_BT).item() == pytest.approx(0.75)


def test_explained_variance_of_constant_returns_is_undefined():
    all_BT = torch.ones(1, 77, dtype=torch.bool)
    assert explained_variance(torch.randn(1, 77), torch.full((1, 77), 0.1), all_BT).isnan()


def test_explained_variance_does_not_depend_on_the_split_over_ranks():
    values_BT, returns_BT, _, mask_BT = ragged_batch()
    ranks = [slice(0, 1), slice(1, 4)]
    errors = sum(moments((returns_BT - values_BT)[rows], mask_BT[rows]) for rows in ranks)
    spread = sum(moments(returns_BT[rows], mask_BT[rows]) for rows in ranks)
    whole = explained_variance(values_BT, returns_BT, mask_BT)
    torch.testing.assert_close(explained_variance_from_moments(errors, spread), whole)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("name", ["clip_range", "denominator"])
def test_clip_range_and_denominator_must_be_positive(name, bad):
    batch = ragged_batch()
    for loss in (policy_loss, value_loss):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            loss(*batch, **{"clip_range": 0.2, "denominator": 1, name: bad})
    if name == "denominator":
        with pytest.raises(ValueError, match="denominator must be positive"):
            kl_loss(one(0.0), one(0.0), ONE_BT, estimator="k2", denominator=torch.tensor(bad))


@pytest.mark.parametrize("bad", [1.0, 0.5, math.nan])
def test_dual_clip_must_be_above_one(bad):
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        policy_loss(*ragged_batch(), clip_range=0.2, denominator=1, dual_clip=bad)


@pytest.mark.parametrize("which", range(3))
def test_other_shapes_are_refused(which):
    batch = list(ragged_batch())
    batch[which] = batch[which][:, :4]
    for loss in (policy_loss, value_loss):
        with pytest.raises(ValueError, match=r"_BT has shape \(4, 4\), its mask \(4, 5\)"):
            loss(*batch, clip_range=0.2, denominator=1)
