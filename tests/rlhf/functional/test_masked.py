import math

import pytest
import torch

from rlhf.functional.masked import (
    at_least_float32,
    check_mask,
    masked_mean,
    masked_sum,
    mean_and_var,
    moments,
    whiten,
)

X_BT = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 6.0]])
MASK_BT = torch.tensor([[True, True, False], [True, False, True]])


def ragged_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_BT = torch.randn(6, 9, generator=generator) * 3 + 7
    mask_BT = torch.rand(6, 9, generator=generator) < 0.6
    return x_BT, mask_BT


def test_sum_and_mean_ignore_whatever_stands_outside_of_the_mask():
    assert masked_sum(X_BT, MASK_BT) == 13
    assert masked_mean(X_BT, MASK_BT) == 3.25


def test_empty_mask_has_sum_and_mean_zero():
    empty_BT = torch.zeros_like(MASK_BT)
    assert masked_sum(X_BT, empty_BT) == 0
    assert masked_mean(X_BT, empty_BT) == 0


def test_masked_sum_passes_gradients_to_the_selected_positions_only():
    x_BT = X_BT.clone().requires_grad_()
    masked_sum(x_BT, MASK_BT).backward()
    assert torch.equal(x_BT.grad, MASK_BT.float())


def test_bfloat16_is_summed_in_float32():
    x_BT = torch.ones(1, 1000, dtype=torch.bfloat16)
    total = masked_sum(x_BT, torch.ones(1, 1000, dtype=torch.bool))
    assert total.dtype == torch.float32
    assert total == 1000


def test_at_least_float32_keeps_float64():
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32


def test_moments_by_hand():
    moments_3 = moments(X_BT, MASK_BT)
    assert moments_3.dtype == torch.float64
    assert moments_3.tolist() == [4, 13, 57]
    mean, var = mean_and_var(moments_3)
    assert mean == 3.25
    assert var == 57 / 4 - 3.25**2


def test_mean_and_var_match_torch_and_are_zero_when_empty():
    x_BT, mask_BT = ragged_batch()
    mean, var = mean_and_var(moments(x_BT, mask_BT))
    selected = x_BT[mask_BT].double()
    torch.testing.assert_close(mean, selected.mean())
    torch.testing.assert_close(var, selected.var(correction=0))
    assert [m.item() for m in mean_and_var(torch.zeros(3, dtype=torch.float64))] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e6 / 3, 1e-6])
def test_variance_of_equal_values_is_exactly_zero(value, dtype):
    x_BT = torch.full((7, 11), value, dtype=dtype)
    _, var = mean_and_var(moments(x_BT, torch.ones(7, 11, dtype=torch.bool)))
    assert var == 0


def test_variance_survives_a_large_mean():
    x_BT = torch.tensor([[1e4, 1e4 + 0.125]])
    _, var = mean_and_var(moments(x_BT, torch.ones(1, 2, dtype=torch.bool)))
    assert var == pytest.approx(0.0625**2, rel=1e-4)


def test_whitening_with_center_gives_mean_zero_and_variance_one():
    x_BT, mask_BT = ragged_batch()
    white_BT = whiten(x_BT, mask_BT, moments(x_BT, mask_BT), center=True)
    selected = white_BT[mask_BT].double()
    assert selected.mean().item() == pytest.approx(0, abs=1e-6)
    assert selected.var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert not white_BT[~mask_BT].any()
    assert white_BT.dtype == x_BT.dtype


def test_whitening_without_center_keeps_the_mean():
    x_BT, mask_BT = ragged_batch()
    white_BT = whiten(x_BT, mask_BT, moments(x_BT, mask_BT), center=False)
    selected = white_BT[mask_BT].double()
    assert selected.mean().item() == pytest.approx(x_BT[mask_BT].mean().item(), abs=1e-5)
    assert selected.var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert not white_BT[~mask_BT].any()


def test_eps_stands_inside_of_the_root():
    x_BT = torch.tensor([[-1.0, 1.0]])
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    white_BT = whiten(x_BT, mask_BT, moments(x_BT, mask_BT), center=True, eps=3.0)
    assert white_BT.tolist() == [[-0.5, 0.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -1e6 / 3, 1e-6])
@pytest.mark.parametrize("count", [1, 3, 77])
def test_equal_values_whiten_to_exactly_zero(value, count, dtype):
    x_BT = torch.full((1, count), value, dtype=dtype)
    mask_BT = torch.ones(1, count, dtype=torch.bool)
    assert not whiten(x_BT, mask_BT, moments(x_BT, mask_BT), center=True).any()
    torch.testing.assert_close(whiten(x_BT, mask_BT, moments(x_BT, mask_BT), center=False), x_BT)


def test_nothing_to_whiten_is_no_nan():
    empty_BT = torch.zeros_like(MASK_BT)
    white_BT = whiten(X_BT, empty_BT, moments(X_BT, empty_BT), center=True)
    assert torch.equal(white_BT, torch.zeros_like(X_BT))


@pytest.mark.parametrize("cuts", [[3, 3], [1, 5], [2, 2, 2], [1, 1, 4]])
@pytest.mark.parametrize("center", [True, False])
def test_whitening_does_not_depend_on_the_split_over_ranks(cuts, center):
    x_BT, mask_BT = ragged_batch(1)
    whole_BT = whiten(x_BT, mask_BT, moments(x_BT, mask_BT), center=center)
    ranks = list(zip(x_BT.split(cuts), mask_BT.split(cuts), strict=True))
    reduced_3 = sum(moments(x, mask) for x, mask in ranks)
    parts_BT = torch.cat([whiten(x, mask, reduced_3, center=center) for x, mask in ranks])
    torch.testing.assert_close(parts_BT, whole_BT, rtol=1e-6, atol=1e-6)


def test_whitening_does_not_depend_on_padding():
    x_BT, mask_BT = ragged_batch(2)
    padding = torch.full((6, 4), math.nan)
    padded_BT = torch.cat([padding, x_BT, padding], dim=1)
    padded_mask_BT = torch.nn.functional.pad(mask_BT, (4, 4))
    whole_BT = whiten(x_BT, mask_BT, moments(x_BT, mask_BT), center=True)
    white_BT = whiten(padded_BT, padded_mask_BT, moments(padded_BT, padded_mask_BT), center=True)
    torch.testing.assert_close(white_BT, torch.nn.functional.pad(whole_BT, (4, 4)))


def test_a_wrong_mask_is_refused_with_names_and_shapes():
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), its mask \(2, 2\)"):
        masked_sum(X_BT, MASK_BT[:, :2])
    with pytest.raises(ValueError, match="must be boolean, not"):
        masked_mean(X_BT, MASK_BT.long())
    with pytest.raises(ValueError, match="x_BT has shape"):
        moments(X_BT, MASK_BT[:1])
    with pytest.raises(ValueError, match="x_BT has shape"):
        whiten(X_BT, MASK_BT[:1], torch.zeros(3), center=True)
    with pytest.raises(ValueError, match="kl_BT has shape"):
        check_mask(MASK_BT, kl_BT=X_BT[0])
