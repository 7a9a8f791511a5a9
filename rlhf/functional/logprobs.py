"""Log-probabilities and entropies of the actions alone.

The language-model head is by far the widest matrix, so it is applied to the states that predict an action and
to no others: `gather_action_states` flattens these to one axis N, `scatter_actions` puts per-action results
back on the aligned axis, and `tiled_logprobs_and_entropy` never holds the full [N, V] logits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.functional.masked import at_least_float32, check_mask

CPU_TILE, GPU_TILE = (512, 2048), (1024, 65536)
"""Actions and vocabulary entries whose logits are looked at together; a CPU's tile fits into its caches."""


def gather_action_states(hidden_BTH: Tensor, action_mask_BT: Tensor) -> Tensor:
    """The hidden states that predict the actions, row by row: shape [N, H] for N actions.

    The state at t-1 has read tokens_<t and predicts token t, so an action at t selects `hidden_BTH[b, t -
    1]`. The matching targets are `tokens_BT[action_mask_BT]`.

    Raises ValueError if the shapes differ, the mask is not boolean, or a token at t = 0 is marked as an
    action (no state precedes it: start every sequence with a prompt or BOS token).
    """
    check_mask(action_mask_BT)
    if hidden_BTH.shape[:-1] != action_mask_BT.shape:
        shapes = f"hidden_BTH {tuple(hidden_BTH.shape)}, action_mask_BT {tuple(action_mask_BT.shape)}"
        raise ValueError(f"hidden states and mask disagree on [B, T]: {shapes}")
    if action_mask_BT[:, :1].any():
        rows = action_mask_BT[:, 0].nonzero().flatten().tolist()
        raise ValueError(f"rows {rows}: no state predicts an action at t=0; prepend a prompt token")
    return hidden_BTH[:, :-1][action_mask_BT[:, 1:]]


def scatter_actions(x_N: Tensor, action_mask_BT: Tensor) -> Tensor:
    """Put per-action numbers back on the aligned axis: shape [B, T], zeros elsewhere. Differentiable.

    The inverse of `x_BT[action_mask_BT]`.

    Raises ValueError if the mask is not boolean or does not hold exactly N actions.
    """
    check_mask(action_mask_BT)
    actions = int(action_mask_BT.sum())
    if x_N.shape != (actions,):
        raise ValueError(f"x_N has shape {tuple(x_N.shape)}, the mask holds {actions} actions")
    return x_N.new_zeros(action_mask_BT.shape).masked_scatter(action_mask_BT, x_N)


def logprobs_and_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, both of shape [N], in nats.

        z = logits / temperature        L = log sum_v exp z_v
        log pi(target) = z_target - L   entropy = L - sum_v exp(z_v - L) z_v

    One logsumexp serves both. Computed in float32 (float64 stays). The temperature is the sampler's: policy,
    old policy and reference all use the same, or their ratios mean nothing. A logit of -inf is a token that
    the sampler forbids: it adds nothing to the entropy, and its log-probability is -inf. Differentiable.

    Raises ValueError for a temperature that is not positive and finite, or for shapes other than [N, V] and
    [N].
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    if logits_NV.ndim != 2 or targets_N.shape != logits_NV.shape[:1]:
        shapes = f"logits_NV {tuple(logits_NV.shape)}, targets_N {tuple(targets_N.shape)}"
        raise ValueError(f"expected shapes [N, V] and [N], got {shapes}")
    scaled_NV = at_least_float32(logits_NV) / temperature
    logsumexp_N = scaled_NV.logsumexp(dim=-1)
    logprobs_N = scaled_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1) - logsumexp_N
    # 0 * -inf is NaN; the most negative finite number gives the 0 that is meant, in the backward as well.
    finite_NV = scaled_NV.clamp(min=torch.finfo(scaled_NV.dtype).min)
    probs_NV = (finite_NV - logsumexp_N.unsqueeze(-1)).exp()
    return logprobs_N, logsumexp_N - (probs_NV * finite_NV).sum(dim=-1)


def tiled_logprobs_and_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    tile: tuple[int, int] | None = None,
    bias_V: Tensor | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """`logprobs_and_entropy` of the head's logits, one tile of [actions, vocabulary entries] at a time.

        logits = hidden @ weight.T + bias

    Each tile's logits are used up while they are in the cache: on a CPU that takes two thirds of the time of whole
    rows. They are computed again in the backward, so that the memory does not grow with N * V, for one more product
    with the head. Equal to the untiled function. N = 0 is allowed and keeps the graph, so that a rank without actions
    still takes part in the backward.

    A sharded `weight_VH` must be gathered during both the forward and the backward.

    Args:
        tile: None: `CPU_TILE` or `GPU_TILE`.
        with_entropy: without, the entropies are 0, for a seventh less time.

    Raises ValueError for an empty tile, and as `logprobs_and_entropy` does.
    """
    tile = tile or (CPU_TILE if hidden_NH.device.type == "cpu" else GPU_TILE)
    if min(tile) < 1:
        raise ValueError(f"a tile must hold at least 1 action and 1 entry, not {tile}")
    if targets_N.shape != hidden_NH.shape[:1]:
        shapes = f"hidden_NH {tuple(hidden_NH.shape)}, targets_N {tuple(targets_N.shape)}"
        raise ValueError(f"hidden states and targets disagree on N: {shapes}")

    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    logprobs_N, entropy_N = _Head.apply(hidden_NH, weight_VH, bias_V, targets_N, temperature, tile, with_entropy)
    return logprobs_N, entropy_N


class _Head(torch.autograd.Function):
    """The head's logprobs and entropies with a backward by hand, tile by tile.

    With p = softmax(z), z = logits / temperature, and incoming gradients g of the logprob and h of the entropy:

        d z_v = g (1[v = target] - p_v) - h p_v (log p_v + entropy)

    The logits are computed again in the backward; an entropy that nobody differentiates costs nothing there. Where the
    head is frozen, as under LoRA, d hidden = g (W[target] - p W) / temperature needs no second look at the logits:
    the bracket is computed in the forward.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, targets_N, temperature, tile, with_entropy):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        device = hidden_NH.device.type
        # autograd switches autocast off in the backward: both sides use the dtype that is in force now.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
        head = _Logits(hidden_NH.to(dtype), weight_VH.to(dtype), bias_V, temperature, tile)
        is_frozen = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        found = _Sums(hidden_NH, is_frozen)
        for rows, columns, z_CW in head.tiles():
            finite_CW = None
            if with_entropy:  # 0 * -inf is NaN; the most negative finite number gives the 0 that is meant
                finite_CW = z_CW if bias_V is None else z_CW.clamp(min=torch.finfo(z_CW.dtype).min)
            found.add(rows, z_CW, finite_CW, _local(targets_N[rows], columns), head.weight_VH[columns])
        logsumexp_N = found.highest_N + found.sum_N.log()
        entropy_N = logsumexp_N - found.dot_N / found.sum_N if with_entropy else torch.zeros_like(logsumexp_N)
        pull_NH = None
        if found.pull_NH is not None:
            pull_NH = head.weight_VH[targets_N] - found.pull_NH.div_(found.sum_N.unsqueeze(1))
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, logsumexp_N, entropy_N, pull_NH)
        ctx.settings = (temperature, tile, dtype)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_N)
        return found.target_N - logsumexp_N, entropy_N

    @staticmethod
    def backward(ctx, logprob_grad_N, entropy_grad_N):  # type: ignore[override]
        hidden_NH, weight_VH, bias_V, targets_N, logsumexp_N, entropy_N, pull_NH = ctx.saved_tensors
        temperature, tile, dtype = ctx.settings
        if pull_NH is not None and logprob_grad_N is not None and entropy_grad_N is None:
            hidden_grad_NH = (pull_NH * (logprob_grad_N / temperature).unsqueeze(-1)).to(hidden_NH.dtype)
            return hidden_grad_NH, *[None] * 6
        head = _Logits(hidden_NH.to(dtype), weight_VH.to(dtype), bias_V, temperature, tile)
        hidden_grad_NH = torch.zeros_like(at_least_float32(hidden_NH))
        weight_grad_VH = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        bias_grad_V = None if bias_V is None else torch.zeros_like(bias_V)
        for rows, columns, z_CW in head.tiles():
            logp_CW = z_CW.sub_(logsumexp_N[rows].unsqueeze(-1))
            entropy = None if entropy_grad_N is None else (entropy_grad_N[rows], entropy_N[rows])
            logprob_grad_C = None if logprob_grad_N is None else logprob_grad_N[rows]
            grad_CW = _logit_grad(logp_CW, _local(targets_N[rows], columns), logprob_grad_C, entropy)
            if temperature != 1.0:
                grad_CW.div_(temperature)
            if bias_grad_V is not None:
                bias_grad_V[columns] += grad_CW.sum(0)
            grad_CW = grad_CW.to(dtype)
            hidden_grad_NH[rows] += grad_CW @ head.weight_VH[columns]
            if weight_grad_VH is not None:
                weight_grad_VH[columns] += grad_CW.t() @ head.hidden_NH[rows]
        return hidden_grad_NH.to(hidden_NH.dtype), weight_grad_VH, bias_grad_V, None, None, None, None


@dataclass(frozen=True)
class _Logits:
    """What the scaled logits are made of."""

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    temperature: float
    tile: tuple[int, int]

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """(actions, vocabulary entries, their scaled logits [C, W]); all actions meet a part of the weights in turn."""
        for columns in _slices(len(self.weight_VH), self.tile[1]):
            bias_W = None if self.bias_V is None else self.bias_V[columns].to(self.weight_VH.dtype)
            for rows in _slices(len(self.hidden_NH), self.tile[0]):
                with torch.autocast(self.hidden_NH.device.type, enabled=False):
                    logits_CW = F.linear(self.hidden_NH[rows], self.weight_VH[columns], bias_W)
                scaled_CW = at_least_float32(logits_CW)
                yield rows, columns, scaled_CW if self.temperature == 1.0 else scaled_CW.div_(self.temperature)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


class _Sums:
    """Per action, over the tiles so far, with w_v = exp(z_v - highest):

    highest = max_v z_v     sum = sum_v w_v     dot = sum_v w_v z_v     pull = sum_v w_v W_v     target = z_target

    The sums follow a highest that grows (online softmax, arXiv:1805.02867).
    """

    def __init__(self, hidden_NH: Tensor, with_pull: bool) -> None:
        zeros_NH = torch.zeros_like(at_least_float32(hidden_NH))
        self.sum_N, self.dot_N, self.target_N = (zeros_NH.new_zeros(len(zeros_NH)) for _ in range(3))
        # Not -inf: the difference of two of them, while all entries are forbidden, would be NaN.
        self.highest_N = torch.full_like(self.sum_N, torch.finfo(zeros_NH.dtype).min)
        self.pull_NH = zeros_NH if with_pull else None

    def add(self, rows: slice, z_CW: Tensor, finite_CW: Tensor | None, local_C: Tensor, weight_WH: Tensor) -> None:
        """One tile; `finite_CW`: with the dot product; `local_C`: the targets' columns, -1 where they lie outside."""
        highest_C = torch.maximum(self.highest_N[rows], z_CW.amax(1))
        shrink_C = (self.highest_N[rows] - highest_C).exp_()
        self.highest_N[rows] = highest_C
        weights_CW = (z_CW - highest_C.unsqueeze(1)).exp_()
        self.sum_N[rows].mul_(shrink_C).add_(weights_CW.sum(1))
        if finite_CW is not None:
            self.dot_N[rows].mul_(shrink_C).add_(torch.linalg.vecdot(weights_CW, finite_CW))
        if self.pull_NH is not None:
            self.pull_NH[rows].mul_(shrink_C.unsqueeze(1)).add_(weights_CW.to(weight_WH.dtype) @ weight_WH)
        chosen_C = z_CW.gather(1, local_C.clamp(min=0).unsqueeze(1)).squeeze(1)
        self.target_N[rows] = torch.where(local_C >= 0, chosen_C, self.target_N[rows])


def _local(targets_C: Tensor, columns: slice) -> Tensor:
    """Their places among `columns`; -1 elsewhere."""
    inside_C = (targets_C >= columns.start) & (targets_C < columns.stop)
    return torch.where(inside_C, targets_C - columns.start, -1)


def _logit_grad(
    logp_CW: Tensor, local_C: Tensor, logprob_grad_C: Tensor | None, entropy: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Gradient of the scaled logits; `entropy` is (its gradient, its value), or None. Overwrites `logp_CW`."""
    grad_CW = None
    if entropy is not None:
        entropy_grad_C, entropy_C = entropy
        logp_CW.clamp_(min=torch.finfo(logp_CW.dtype).min)  # 0 * -inf, once more
        grad_CW = (logp_CW + entropy_C.unsqueeze(-1)).mul_(logp_CW.exp()).mul_(-entropy_grad_C.unsqueeze(-1))
    probs_CW = logp_CW.exp_()
    if logprob_grad_C is not None:
        probs_CW.mul_(-logprob_grad_C.unsqueeze(-1))
        here_C = logprob_grad_C.to(probs_CW.dtype).masked_fill(local_C < 0, 0.0)
        probs_CW.scatter_add_(1, local_C.clamp(min=0).unsqueeze(-1), here_C.unsqueeze(-1))
        grad_CW = probs_CW if grad_CW is None else grad_CW.add_(probs_CW)
    return torch.zeros_like(probs_CW) if grad_CW is None else grad_CW
