"""Losses of a reward model, as pure functions of its scores.

Every loss is a 0-d mean to minimise, in float32 (float64 stays); without anything to learn from it is 0, with
its graph. Letters: B prompts (or pairs), K completions ranked per prompt. K-way losses take the K scores of a
prompt at once, so K completions cost K forwards, not K (K - 1). What a mask leaves out never counts, not even
a NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    chosen_B: Tensor,
    rejected_B: Tensor,
    *,
    margin_B: Tensor | None = None,
    target_B: Tensor | None = None,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of pairwise preferences.

        d = chosen - rejected
        loss = mean of -target log sigmoid(d - margin) - (1 - target) log sigmoid(-d - margin)

    `target_B` is the probability that chosen is the better one (default 1; .5 is a tie, label noise lies
    between). `margin_B` is asked of whichever side wins, so the loss does not depend on which of two tied
    responses was called chosen. `weight_B` makes the mean a weighted one.

    Raises ValueError if the shapes differ or a target lies outside of [0, 1].
    Source: Bradley & Terry 1952; Ouyang et al. 2022 (arXiv:2203.02155), equation 1; margins: Touvron et al.
    2023 (arXiv:2307.09288), equation 2.
    """
    _check_shapes("B", chosen_B=chosen_B, rejected_B=rejected_B, margin_B=margin_B)
    _check_shapes("B", chosen_B=chosen_B, target_B=target_B, weight_B=weight_B)
    difference_B = _at_least_float32(chosen_B) - _at_least_float32(rejected_B)
    target_B = torch.ones_like(difference_B) if target_B is None else target_B.to(difference_B.dtype)
    margin_B = torch.zeros_like(difference_B) if margin_B is None else margin_B
    _check_probabilities(target_B)
    return _weighted_mean(_pair_loss(difference_B, target_B, margin_B), weight_B)


def all_pairs(scores_BK: Tensor, target_BKK: Tensor, mask_BKK: Tensor, *, weight_B: Tensor | None = None) -> Tensor:
    """Bradley-Terry over all pairs of K ranked completions.

        loss_b = mean over pairs i < j of -t_ij log sigmoid(s_i - s_j) - (1 - t_ij) log sigmoid(s_j - s_i)
        loss   = mean of loss_b

    `target_BKK[b, i, j]` is the probability that i beats j, `mask_BKK` is True for the pairs that count. Only
    i < j is read, so each pair counts once. The mean is taken per prompt first: a prompt weighs the same
    however many of its pairs were labeled. Prompts without a pair are left out. `weight_B` makes the mean over
    prompts a weighted one.

    Raises ValueError if the shapes do not fit [B, K] and [B, K, K], the mask is not boolean, or a target that
    counts lies outside of [0, 1].
    Source: Ouyang et al. 2022 (arXiv:2203.02155), section 3.5 and equation 1.
    """
    _check_shapes("BK", scores_BK=scores_BK)
    _check_shapes("BKK", target_BKK=target_BKK, mask_BKK=mask_BKK)
    if target_BKK.shape != (*scores_BK.shape, scores_BK.shape[1]):
        shapes = f"scores_BK {tuple(scores_BK.shape)}, target_BKK {tuple(target_BKK.shape)}"
        raise ValueError(f"scores and targets disagree on B or K: {shapes}")
    _check_mask(mask_BKK)
    scores_BK = _at_least_float32(scores_BK)
    pairs_BKK = mask_BKK.triu(diagonal=1)
    difference_BKK = (scores_BK.unsqueeze(2) - scores_BK.unsqueeze(1)).masked_fill(~pairs_BKK, 0.0)
    target_BKK = target_BKK.to(scores_BK.dtype).masked_fill(~pairs_BKK, 0.0)
    _check_probabilities(target_BKK)
    loss_BKK = _pair_loss(difference_BKK, target_BKK, torch.zeros_like(target_BKK))
    return _mean_over_pairs(loss_BKK, pairs_BKK, weight_B)


def plackett_luce(scores_BK: Tensor, ranks_BK: Tensor, mask_BK: Tensor, *, weight_B: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of whole rankings, mean over prompts.

        loss_b = sum over items i of log(sum over j ranked i or worse of exp s_j) - s_i

    `ranks_BK` is 1 for the best; only the order of the numbers matters. `mask_BK` is False at padded items.
    Prompts with fewer than two items are left out; `weight_B` makes the mean over the others a weighted one. For
    K = 2 without a tie this is `bradley_terry`.

    Ties, by Efron's rule: for the l-th (l = 0..m-1) of m items of one rank, the m items enter the sum with
    weight 1 - l/m, as if each were gone already with probability l/m. At equal scores this is the likelihood
    of any one order of the tied items; its minimum keeps tied scores equal.

    Raises ValueError if the shapes differ or the mask is not boolean.
    Source: Plackett 1975; Luce 1959; ties: Efron 1977, "The efficiency of Cox's likelihood function".
    """
    _check_shapes("BK", scores_BK=scores_BK, ranks_BK=ranks_BK, mask_BK=mask_BK)
    _check_mask(mask_BK)
    scores_BK = _at_least_float32(scores_BK).masked_fill(~mask_BK, 0.0)
    both_BKK = mask_BK.unsqueeze(2) & mask_BK.unsqueeze(1)
    tied_BKK = both_BKK & (ranks_BK.unsqueeze(2) == ranks_BK.unsqueeze(1))
    worse_BKK = both_BKK & (ranks_BK.unsqueeze(2) < ranks_BK.unsqueeze(1))
    earlier_BK1 = tied_BKK.tril(diagonal=-1).sum(-1, keepdim=True)  # l: tied items before this one in the row
    tied_weight_BK1 = 1 - earlier_BK1 / tied_BKK.sum(-1, keepdim=True).clamp(min=1)
    weight_BKK = torch.where(tied_BKK, tied_weight_BK1.to(scores_BK.dtype), worse_BKK.to(scores_BK.dtype))
    # No item remains in a padded row: logsumexp would be -inf and its gradient NaN. Any finite row will do.
    log_weight_BKK = weight_BKK.log().masked_fill(~mask_BK.unsqueeze(2), 0.0)
    remaining_BK = (scores_BK.unsqueeze(1) + log_weight_BKK).logsumexp(dim=-1)
    loss_B = (remaining_BK - scores_BK).masked_fill(~mask_BK, 0.0).sum(dim=-1)
    ranked_B = mask_BK.sum(dim=-1) >= 2
    return _weighted_mean(loss_B.masked_fill(~ranked_B, 0.0), _among(ranked_B, weight_B))


def pointwise(scores_B: Tensor, ratings_B: Tensor, *, weight_B: Tensor | None = None) -> Tensor:
    """Mean squared error (score - rating)^2, optionally weighted, in squared units of the rating.

    Kept for comparison: people agree on orders better than on numbers, and each has a scale of their own.

    Raises ValueError if the shapes differ.
    """
    _check_shapes("B", scores_B=scores_B, ratings_B=ratings_B, weight_B=weight_B)
    return _weighted_mean((_at_least_float32(scores_B) - ratings_B).square(), weight_B)


def centering(scores_BK: Tensor, mask_BK: Tensor | None = None, *, weight_B: Tensor | None = None) -> Tensor:
    """Mean of (s_i + s_j)^2 over a prompt's pairs, then over prompts; for K = 2 (chosen + rejected)^2.

    Preferences leave a constant per prompt free. This term, with a small coefficient, pins it near 0, so that
    the scores of different prompts can be compared. `mask_BK` is False at padded completions.

    Raises ValueError if the shapes differ or the mask is not boolean.
    Source: Eisenstein et al. 2023 (arXiv:2312.09244).
    """
    mask_BK = torch.ones_like(scores_BK, dtype=torch.bool) if mask_BK is None else mask_BK
    _check_shapes("BK", scores_BK=scores_BK, mask_BK=mask_BK)
    _check_mask(mask_BK)
    scores_BK = _at_least_float32(scores_BK).masked_fill(~mask_BK, 0.0)
    pairs_BKK = (mask_BK.unsqueeze(2) & mask_BK.unsqueeze(1)).triu(diagonal=1)
    return _mean_over_pairs((scores_BK.unsqueeze(2) + scores_BK.unsqueeze(1)).square(), pairs_BKK, weight_B)


def _pair_loss(difference: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Cross-entropy of the preference with the given probability, with the margin asked of both sides."""
    return -target * F.logsigmoid(difference - margin) - (1 - target) * F.logsigmoid(-difference - margin)


def _mean_over_pairs(loss_BKK: Tensor, pairs_BKK: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Mean over the True pairs of each prompt, then over the prompts that have any."""
    count_B = pairs_BKK.sum(dim=(1, 2))
    loss_B = loss_BKK.masked_fill(~pairs_BKK, 0.0).sum(dim=(1, 2)) / count_B.clamp(min=1)
    return _weighted_mean(loss_B, _among(count_B > 0, weight_B))


def _among(counts_B: Tensor, weight_B: Tensor | None) -> Tensor:
    """The weights of prompts of which only some count."""
    return counts_B if weight_B is None else weight_B * counts_B


def _weighted_mean(loss_B: Tensor, weight_B: Tensor | None) -> Tensor:
    """sum(weight * loss) / sum(weight); 0 if the weights are all zero or B = 0."""
    weight_B = torch.ones_like(loss_B) if weight_B is None else weight_B.to(loss_B.dtype)
    total = weight_B.sum()
    return (weight_B * loss_B).sum() / torch.where(total == 0, 1.0, total)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_shapes(axes: str, **tensors: Tensor | None) -> None:
    """Raise ValueError, with all shapes, unless all tensors that are given have these axes and one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1 or any(len(shape) != len(axes) for shape in shapes.values()):
        raise ValueError(f"all must have one shape [{', '.join(axes)}], got {shapes}")


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask must be boolean, not {mask.dtype}; convert it with mask.bool()")


def _check_probabilities(target: Tensor) -> None:
    if not ((target >= 0) & (target <= 1)).all():
        raise ValueError(f"targets are probabilities, but range from {target.min():g} to {target.max():g}")
