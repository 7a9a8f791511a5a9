"""Sums, means and whitening over the True positions of a mask.

What lies outside of a mask never counts, not even a NaN: positions are selected with `torch.where`, never
multiplied by 0. Statistics of a global batch are built from additive moments, so that neither the number of
ranks nor the micro-batches can change a result.
"""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is float64 already. Sums in bfloat16 keep three digits only."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_mask(mask: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless `mask` is boolean and every named tensor has exactly its shape."""
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask must be boolean, not {mask.dtype}; convert it with mask.bool()")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its mask {tuple(mask.shape)}")


def zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in at least float32 where `mask` is True, 0 elsewhere.

    Losses do this to their inputs, not to their result: the gradient of a NaN is NaN even where a later
    `torch.where` drops its value.

    Raises ValueError if the shapes differ or the mask is not boolean.
    """
    check_mask(mask, x=x)
    return torch.where(mask, at_least_float32(x), 0.0)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` where `mask` is True, as a 0-d tensor of at least float32.

    Raises ValueError if the shapes differ or the mask is not boolean.
    """
    return zero_outside(x, mask).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is True, as a 0-d tensor; 0 for an empty mask.

    The mean of one tensor, hence of one rank: a global mean divides summed sums by summed counts instead.

    Raises ValueError if the shapes differ or the mask is not boolean.
    """
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def moments(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Count, sum and sum of squares over the mask: a float64 tensor of shape [3].

    All three add up over disjoint parts of a batch, so the moments of the global batch are those of the
    ranks, all-reduced by addition. In float64, because the variance is a small difference of two large
    numbers.

    Raises ValueError if the shapes differ or the mask is not boolean.
    """
    check_mask(mask_BT, x_BT=x_BT)
    x_N = x_BT[mask_BT].double()
    return torch.stack([mask_BT.sum().double(), x_N.sum(), x_N.square().sum()])


def mean_and_var(moments_3: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (divided by the count) from `moments`, 0-d float64; both 0 if empty.

    A variance below the rounding error of E[x^2] - E[x]^2 is 0, be it positive or negative: equal values have
    none, whatever their size.
    """
    count, total, squares = moments_3.unbind()
    count = count.clamp(min=1)
    mean, mean_square = total / count, squares / count
    var = mean_square - mean.square()
    return mean, torch.where(var > 1e-14 * mean_square, var, 0.0)


def whiten(x_BT: Tensor, mask_BT: Tensor, moments_3: Tensor, *, center: bool, eps: float = 1e-8) -> Tensor:
    """Scale `x_BT` to unit variance under the given moments; zeros outside of the mask.

        center=True:   (x - mean) / sqrt(var + eps)            for advantages
        center=False:  (x - mean) / sqrt(var + eps) + mean     for rewards, whose mean says what is good

    `moments_3` comes from `moments`, summed over all ranks. With center=True, equal values give exactly 0.
    The result has the dtype of `x_BT`; the arithmetic is float64.

    Raises ValueError if the shapes differ or the mask is not boolean.
    Source: Huang et al. 2024 (arXiv:2403.17031), details of reward and advantage whitening.
    """
    check_mask(mask_BT, x_BT=x_BT)
    mean, var = mean_and_var(moments_3)
    # The mean of n equal values may be off by a rounding error, which 1/sqrt(eps) would blow up to a signal.
    centered_BT = torch.where(var > 0, x_BT.double() - mean, 0.0)
    whitened_BT = centered_BT * torch.rsqrt(var + eps)
    if not center:
        whitened_BT = whitened_BT + mean
    return torch.where(mask_BT, whitened_BT, 0.0).to(x_BT.dtype)
