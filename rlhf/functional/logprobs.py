"""Log-probabilities and entropies of the actions alone.

The language-model head is by far the widest matrix, so it is applied to the states that predict an action and
to no others: `gather_action_states` flattens these to one axis N, `scatter_actions` puts per-action results
back on the aligned axis, and `chunked_logprobs_and_entropy` never holds the full [N, V] logits.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.functional.masked import at_least_float32, check_mask


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


def chunked_logprobs_and_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = 512,
    bias_V: Tensor | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """`logprobs_and_entropy` of the head's logits, `chunk_size` actions at a time.

        logits = hidden @ weight.T + bias

    Without `with_entropy` the entropies are 0, for a fifth less time.

    Each chunk's logits are dropped after the forward and computed again in the backward: peak memory is a few
    times chunk_size * V instead of N * V, for one more product with the head. Equal to the unchunked
    function. N = 0 is allowed and keeps the graph, so that a rank without actions still takes part in the
    backward.

    A sharded `weight_VH` must be gathered during both the forward and the backward.

    Raises ValueError for a chunk_size below 1, and as `logprobs_and_entropy` does.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    if targets_N.shape != hidden_NH.shape[:1]:
        shapes = f"hidden_NH {tuple(hidden_NH.shape)}, targets_N {tuple(targets_N.shape)}"
        raise ValueError(f"hidden states and targets disagree on N: {shapes}")

    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    logprobs_N, entropy_N = _Head.apply(hidden_NH, weight_VH, bias_V, targets_N, temperature, chunk_size, with_entropy)
    return logprobs_N, entropy_N


class _Head(torch.autograd.Function):
    """The head's logprobs and entropies with a backward by hand: a third of autograd's passes over [C, V].

    With p = softmax(z), z = logits / temperature, and incoming gradients g of the logprob and h of the entropy:

        d z_v = g (1[v = target] - p_v) - h p_v (log p_v + entropy)

    The logits are computed again in the backward; an entropy that nobody differentiates costs nothing there. Where the
    head is frozen, as under LoRA, d hidden = g (W[target] - p W) / temperature needs no second look at the logits:
    the bracket is computed in the forward.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, targets_N, temperature, chunk_size, with_entropy):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        device = hidden_NH.device.type
        # autograd switches autocast off in the backward: both sides use the dtype that is in force now.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
        weight = weight_VH.to(dtype)
        is_frozen = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        logprobs, entropies, logsumexps, pulls = [], [], [], []
        for hidden_CH, targets_C in zip(hidden_NH.split(chunk_size), targets_N.split(chunk_size), strict=True):
            z_CV = _scaled_logits(hidden_CH.to(dtype), weight, bias_V, temperature)
            logsumexp_C, entropy_C, weights_CV = _logsumexp_and_entropy(z_CV, with_entropy)
            if is_frozen:
                mean_CH = at_least_float32(weights_CV.to(dtype) @ weight) / weights_CV.sum(-1, keepdim=True)
                pulls.append(weight[targets_C] - mean_CH)
            logprobs.append(z_CV.gather(-1, targets_C.unsqueeze(-1)).squeeze(-1) - logsumexp_C)
            entropies.append(entropy_C)
            logsumexps.append(logsumexp_C)
        logprobs_N, entropy_N, logsumexp_N = (torch.cat(parts) for parts in (logprobs, entropies, logsumexps))
        pull_NH = torch.cat(pulls) if pulls else None
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, logsumexp_N, entropy_N, pull_NH)
        ctx.settings = (temperature, chunk_size, dtype)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx, logprob_grad_N, entropy_grad_N):  # type: ignore[override]
        hidden_NH, weight_VH, bias_V, targets_N, logsumexp_N, entropy_N, pull_NH = ctx.saved_tensors
        temperature, chunk_size, dtype = ctx.settings
        if pull_NH is not None and logprob_grad_N is not None and entropy_grad_N is None:
            hidden_grad_NH = (pull_NH * (logprob_grad_N / temperature).unsqueeze(-1)).to(hidden_NH.dtype)
            return hidden_grad_NH, *[None] * 6
        weight = weight_VH.to(dtype)
        needs_weight = ctx.needs_input_grad[1]
        hidden_grad_NH = torch.empty_like(hidden_NH)
        weight_grad_VH = torch.zeros_like(weight_VH) if needs_weight else None
        bias_grad_V = None if bias_V is None else torch.zeros_like(bias_V)
        for start in range(0, len(targets_N), chunk_size):
            part = slice(start, start + chunk_size)
            hidden_CH = hidden_NH[part].to(dtype)
            z_CV = _scaled_logits(hidden_CH, weight, bias_V, temperature)
            logp_CV = z_CV.sub_(logsumexp_N[part].unsqueeze(-1))
            entropy = None if entropy_grad_N is None else (entropy_grad_N[part], entropy_N[part])
            logprob_grad_C = None if logprob_grad_N is None else logprob_grad_N[part]
            grad_CV = _logit_grad(logp_CV, targets_N[part], logprob_grad_C, entropy)
            if temperature != 1.0:
                grad_CV.div_(temperature)
            if bias_grad_V is not None:
                bias_grad_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(dtype)
            hidden_grad_NH[part] = grad_CV @ weight
            if weight_grad_VH is not None:
                weight_grad_VH += grad_CV.t() @ hidden_CH
        return hidden_grad_NH, weight_grad_VH, bias_grad_V, None, None, None, None


def _scaled_logits(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    with torch.autocast(hidden_CH.device.type, enabled=False):
        logits_CV = F.linear(hidden_CH, weight_VH, None if bias_V is None else bias_V.to(weight_VH.dtype))
    scaled_CV = at_least_float32(logits_CV)
    return scaled_CV if temperature == 1.0 else scaled_CV.div_(temperature)


def _logsumexp_and_entropy(z_CV: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """L = log sum_v exp z_v, H = L - sum_v p_v z_v (or 0), and p up to a factor; from one pass of exponentials."""
    highest_C1 = z_CV.amax(-1, keepdim=True)
    weights_CV = (z_CV - highest_C1).exp_()
    sum_C = weights_CV.sum(-1)
    logsumexp_C = highest_C1.squeeze(-1) + sum_C.log()
    if not with_entropy:
        return logsumexp_C, torch.zeros_like(logsumexp_C), weights_CV
    # 0 * -inf is NaN; the most negative finite number gives the 0 that is meant.
    finite_CV = z_CV.clamp(min=torch.finfo(z_CV.dtype).min)
    return logsumexp_C, logsumexp_C - torch.linalg.vecdot(weights_CV, finite_CV) / sum_C, weights_CV


def _logit_grad(
    logp_CV: Tensor, targets_C: Tensor, logprob_grad_C: Tensor | None, entropy: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Gradient of the scaled logits; `entropy` is (its gradient, its value), or None. Overwrites `logp_CV`."""
    grad_CV = None
    if entropy is not None:
        entropy_grad_C, entropy_C = entropy
        logp_CV.clamp_(min=torch.finfo(logp_CV.dtype).min)  # 0 * -inf, once more
        grad_CV = (logp_CV + entropy_C.unsqueeze(-1)).mul_(logp_CV.exp()).mul_(-entropy_grad_C.unsqueeze(-1))
    probs_CV = logp_CV.exp_()
    if logprob_grad_C is not None:
        probs_CV.mul_(-logprob_grad_C.unsqueeze(-1))
        probs_CV.scatter_add_(1, targets_C.unsqueeze(-1), logprob_grad_C.to(probs_CV.dtype).unsqueeze(-1))
        grad_CV = probs_CV if grad_CV is None else grad_CV.add_(probs_CV)
    return torch.zeros_like(probs_CV) if grad_CV is None else grad_CV
