import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.functional.logprobs import (
    gather_action_states,
    logprobs_and_entropy,
    scatter_actions,
    tiled_logprobs_and_entropy,
)

MASK_BT = torch.tensor([[False, False, True, True], [False, True, False, True]])


def head(n: int = 7, hidden: int = 5, vocabulary: int = 11):
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(n, hidden, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
    bias_V = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    targets_N = torch.randint(vocabulary, (n,), generator=generator)
    return hidden_NH, weight_VH, bias_V, targets_N


def test_the_state_before_an_action_is_gathered():
    hidden_BTH = torch.arange(8.0).view(2, 4, 1)
    assert gather_action_states(hidden_BTH, MASK_BT).flatten().tolist() == [1, 2, 4, 6]


def test_a_table_model_scores_each_action_from_its_previous_token():
    """pi(token | previous) from a table; the logits at t-1 speak of token t."""
    table_VV = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]).log()
    tokens_BT = torch.tensor([[0, 1, 2, 2], [2, 0, 1, 0]])
    states_NV = gather_action_states(table_VV[tokens_BT], MASK_BT)
    logprobs_N, _ = logprobs_and_entropy(states_NV, tokens_BT[MASK_BT])
    logprobs_BT = scatter_actions(logprobs_N, MASK_BT)
    expected_BT = torch.tensor([[1, 1, 0.7, 0.4], [1, 0.3, 1, 0.1]]).log()
    torch.testing.assert_close(logprobs_BT, expected_BT)


def test_an_action_without_a_preceding_state_is_refused():
    mask_BT = MASK_BT.clone()
    mask_BT[1, 0] = True
    with pytest.raises(ValueError, match=r"rows \[1\].*prepend a prompt token"):
        gather_action_states(torch.zeros(2, 4, 3), mask_BT)


def test_gather_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"hidden_BTH \(2, 3, 1\), action_mask_BT \(2, 4\)"):
        gather_action_states(torch.zeros(2, 3, 1), MASK_BT)
    with pytest.raises(ValueError, match="boolean"):
        gather_action_states(torch.zeros(2, 4, 1), MASK_BT.long())


def test_scatter_is_the_inverse_of_masking_and_passes_gradients():
    x_N = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    x_BT = scatter_actions(x_N, MASK_BT)
    assert x_BT.tolist() == [[0, 0, 1, 2], [0, 3, 0, 4]]
    (x_BT * torch.arange(8.0).view(2, 4)).sum().backward()
    assert x_N.grad.tolist() == [2, 3, 5, 7]


@pytest.mark.parametrize("n", [0, 3, 5])
def test_scatter_refuses_another_number_of_actions(n):
    with pytest.raises(ValueError, match=rf"x_N has shape \({n},\), the mask holds 4 actions"):
        scatter_actions(torch.zeros(n), MASK_BT)


def test_logprobs_and_entropy_by_hand():
    logits_NV = torch.tensor([[0.5, 0.25, 0.25], [1.0, 1.0, 1.0]]).log() + torch.tensor([[3.0], [-2.0]])
    logprobs_N, entropy_N = logprobs_and_entropy(logits_NV, torch.tensor([0, 2]))
    torch.testing.assert_close(logprobs_N, torch.tensor([math.log(0.5), -math.log(3)]))
    torch.testing.assert_close(entropy_N, torch.tensor([1.5 * math.log(2), math.log(3)]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_logprobs_and_entropy_match_torch_at_any_temperature(temperature):
    hidden_NH, weight_VH, _, targets_N = head()
    logits_NV = hidden_NH @ weight_VH.T
    logprobs_N, entropy_N = logprobs_and_entropy(logits_NV, targets_N, temperature=temperature)
    expected = torch.distributions.Categorical(logits=logits_NV / temperature)
    torch.testing.assert_close(logprobs_N, expected.log_prob(targets_N))
    torch.testing.assert_close(entropy_N, expected.entropy())


def test_logprobs_and_entropy_are_differentiable():
    hidden_NH, weight_VH, _, targets_N = head(n=3, vocabulary=4)
    logits_NV = (hidden_NH @ weight_VH.T).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: logprobs_and_entropy(z, targets_N, temperature=0.7), (logits_NV,))


def test_bfloat16_logits_are_reduced_in_float32():
    logits_NV = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    logprobs_N, entropy_N = logprobs_and_entropy(logits_NV, torch.tensor([3]))
    assert logprobs_N.dtype == entropy_N.dtype == torch.float32
    assert entropy_N.item() == pytest.approx(math.log(50_000), rel=1e-6)
    assert logprobs_N.item() == pytest.approx(-math.log(50_000), rel=1e-6)


def test_large_logits_do_not_overflow():
    logprobs_N, entropy_N = logprobs_and_entropy(torch.tensor([[3e4, -3e4, 0.0]]), torch.tensor([0]))
    assert logprobs_N.item() == 0
    assert entropy_N.item() == 0


def test_a_forbidden_token_counts_as_absent_also_in_the_gradient():
    targets_N = torch.tensor([1])
    short_NV = torch.tensor([[0.3, -0.2, 1.0]], requires_grad=True)
    long_NV = torch.tensor([[0.3, -0.2, 1.0, -math.inf]], requires_grad=True)
    short = logprobs_and_entropy(short_NV, targets_N)
    long = logprobs_and_entropy(long_NV, targets_N)
    torch.testing.assert_close(long, short)
    sum(short).sum().backward()
    sum(long).sum().backward()
    torch.testing.assert_close(long_NV.grad, torch.nn.functional.pad(short_NV.grad, (0, 1)))
    assert logprobs_and_entropy(long_NV, torch.tensor([3]))[0].item() == -math.inf


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        logprobs_and_entropy(torch.zeros(1, 2), torch.tensor([0]), temperature=temperature)


def test_logits_and_targets_must_agree():
    with pytest.raises(ValueError, match=r"logits_NV \(2, 3\), targets_N \(3,\)"):
        logprobs_and_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("tile", [(1, 1), (3, 4), (2, 100), (7, 11), (100, 5)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_tiles_equal_the_whole_in_values_and_gradients(tile, with_bias):
    hidden_NH, weight_VH, bias_V, targets_N = head()
    inputs = [hidden_NH, weight_VH, bias_V] if with_bias else [hidden_NH, weight_VH]
    weights_N = torch.arange(1.0, 8.0, dtype=torch.float64)

    def gradients(compute):
        leaves = [x.clone().requires_grad_() for x in inputs]
        logprobs_N, entropy_N = compute(*leaves)
        loss = (weights_N * logprobs_N).sum() + (weights_N.flip(0) * entropy_N).sum()
        return [logprobs_N, entropy_N, *torch.autograd.grad(loss, leaves)]

    def whole(hidden, weight, bias=None):
        logits_NV = torch.nn.functional.linear(hidden, weight, bias)
        return logprobs_and_entropy(logits_NV, targets_N, temperature=0.8)

    def chunked(hidden, weight, bias=None):
        return tiled_logprobs_and_entropy(hidden, weight, targets_N, temperature=0.8, tile=tile, bias_V=bias)

    torch.testing.assert_close(gradients(chunked), gradients(whole), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_frozen_head_gives_the_states_the_same_gradient(with_bias):
    hidden_NH, weight_VH, bias_V, targets_N = head()
    upstream_N = torch.linspace(-1, 1, len(targets_N), dtype=hidden_NH.dtype)

    def gradient(trained, *, with_entropy):
        hidden, weight = hidden_NH.clone().requires_grad_(), weight_VH.clone().requires_grad_(trained)
        logprobs_N, entropy_N = tiled_logprobs_and_entropy(
            hidden,
            weight,
            targets_N,
            temperature=0.8,
            tile=(3, 4),
            bias_V=bias_V if with_bias else None,
            with_entropy=with_entropy,
        )
        assert bool(entropy_N.any()) == with_entropy
        return logprobs_N, torch.autograd.grad((upstream_N * logprobs_N).sum(), hidden)[0]

    expected = gradient(True, with_entropy=True)
    for with_entropy in (True, False):
        torch.testing.assert_close(gradient(False, with_entropy=with_entropy), expected, rtol=1e-12, atol=1e-12)


class LargestResult(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned, in the backward as well."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else [result]
        self.numel = max([self.numel, *(x.numel() for x in tensors if isinstance(x, torch.Tensor))])
        return result


def test_the_full_logits_are_never_made_and_no_tile_of_them_is_kept():
    n, vocabulary, tile = 64, 500, (8, 500)
    hidden_NH, weight_VH, _, targets_N = head(n=n, vocabulary=vocabulary)
    weight_VH.requires_grad_()
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x

    with LargestResult() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logprobs_N, _ = tiled_logprobs_and_entropy(hidden_NH, weight_VH, targets_N, tile=tile)
        logprobs_N.sum().backward()
    assert weight_VH.grad.any()
    assert largest.numel == math.prod(tile)
    assert max(saved, default=0) < math.prod(tile)


def test_tiles_without_any_action_keep_the_graph():
    hidden_NH, weight_VH, _, _ = head()
    weight_VH.requires_grad_()
    no_targets = torch.zeros(0, dtype=torch.long)
    logprobs_N, entropy_N = tiled_logprobs_and_entropy(hidden_NH[:0], weight_VH, no_targets)
    assert logprobs_N.shape == entropy_N.shape == (0,)
    logprobs_N.sum().backward()
    assert torch.equal(weight_VH.grad, torch.zeros_like(weight_VH))


def test_tiling_refuses_wrong_arguments():
    hidden_NH, weight_VH, _, targets_N = head()
    with pytest.raises(ValueError, match=r"at least 1 action and 1 entry, not \(0, 4\)"):
        tiled_logprobs_and_entropy(hidden_NH, weight_VH, targets_N, tile=(0, 4))
    with pytest.raises(ValueError, match=r"hidden_NH \(7, 5\), targets_N \(6,\)"):
        tiled_logprobs_and_entropy(hidden_NH, weight_VH, targets_N[:6])


def test_a_tile_of_forbidden_entries_changes_nothing():
    """Forbidden by a bias of -inf: the first tile whole, so that no finite logit has been seen yet."""
    hidden_NH, weight_VH, bias_V, targets_N = head()
    long_VH, long_V = torch.cat((weight_VH, weight_VH)), torch.cat((torch.full_like(bias_V, -math.inf), bias_V))
    hidden_NH.requires_grad_()
    short = tiled_logprobs_and_entropy(hidden_NH, weight_VH, targets_N, bias_V=bias_V, tile=(3, 11))
    long = tiled_logprobs_and_entropy(hidden_NH, long_VH, targets_N + 11, bias_V=long_V, tile=(3, 11))
    torch.testing.assert_close(long, short)
    gradients = [torch.autograd.grad(sum(x).sum(), hidden_NH)[0] for x in (short, long)]
    torch.testing.assert_close(*gradients)
    forbidden, _ = tiled_logprobs_and_entropy(hidden_NH, long_VH, targets_N, bias_V=long_V, tile=(3, 4))
    assert torch.equal(forbidden, torch.full_like(forbidden, -math.inf))
