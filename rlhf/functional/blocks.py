"""The parts of a transformer layer that are not matrix products with weights, each with a backward by hand.

Eager PyTorch on a CPU spends two thirds of a small model's training step in them: an RMSNorm is eight passes over
memory, and the backward of its attention kernel runs at a tenth of what the products inside reach. Every function
here equals the plain composition that its docstring gives, to the rounding of its dtype.

Letters beside those of `rlhf.types`: N tokens, E = heads * D, D units of a head, G query heads that share a key head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_NH: Tensor, weight_H: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` in `dtype`; the mean in float32 (arXiv:1910.07467, equation 4)."""
    return _RMSNorm.apply(x_NH, weight_H, eps, dtype)


class _RMSNorm(torch.autograd.Function):
    """With n = x r, r = 1 / sqrt(mean(x^2) + eps), and g the gradient times the weight: dx = r (g - n mean(g n))."""

    @staticmethod
    def forward(ctx, x_NH, weight_H, eps, dtype):  # type: ignore[override]
        squares_N1 = torch.linalg.vector_norm(x_NH, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale_N1 = squares_N1.div_(x_NH.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_NH, weight_H, scale_N1)
        return ((x_NH * scale_N1).to(x_NH.dtype) * weight_H).to(dtype)

    @staticmethod
    def backward(ctx, grad_NH):  # type: ignore[override]
        x_NH, weight_H, scale_N1 = ctx.saved_tensors
        normed_NH = x_NH * scale_N1
        grad_NH = grad_NH.float()
        weight_grad_H = None
        if ctx.needs_input_grad[1]:
            weight_grad_H = (grad_NH * normed_NH).sum(0).to(weight_H.dtype)
        grad_NH = grad_NH * weight_H.float()
        mean_N1 = torch.linalg.vecdot(grad_NH, normed_NH.float()).unsqueeze(-1).div_(x_NH.shape[-1])
        x_grad_NH = grad_NH.addcmul_(normed_NH, mean_N1, value=-1).mul_(scale_N1)
        return x_grad_NH.to(x_NH.dtype), weight_grad_H, None, None


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """`silu(gate) * up`, keeping its two inputs for the backward and nothing else (arXiv:2002.05202)."""
    return _SwiGLU.apply(gate_NF, up_NF)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_NF, up_NF):  # type: ignore[override]
        ctx.save_for_backward(gate_NF, up_NF)
        return F.silu(gate_NF).mul_(up_NF)

    @staticmethod
    def backward(ctx, grad_NF):  # type: ignore[override]
        gate_NF, up_NF = ctx.saved_tensors
        up_grad_NF = F.silu(gate_NF).mul_(grad_NF)
        return torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF), up_grad_NF


def add_lora(out_NE: Tensor, x_NH: Tensor, a_RH: Tensor, b_ER: Tensor, scale: float) -> Tensor:
    """`out + scale * x A' B'` in the dtype of `x`: what an adapter of rank R adds to a product (arXiv:2106.09685)."""
    return _AddLora.apply(out_NE, x_NH, a_RH, b_ER, scale)


class _AddLora(torch.autograd.Function):
    """With u = x A' and g the gradient: dB = scale g' u     du = scale g B     dA = du' x     dx = du A"""

    @staticmethod
    def forward(ctx, out_NE, x_NH, a_RH, b_ER, scale):  # type: ignore[override]
        with torch.autocast(x_NH.device.type, enabled=False):
            inner_NR = x_NH @ a_RH.to(x_NH.dtype).t()
            out_NE = torch.addmm(out_NE, inner_NR, b_ER.to(x_NH.dtype).t(), alpha=scale)
        ctx.save_for_backward(x_NH, inner_NR, a_RH, b_ER)
        ctx.scale = scale
        return out_NE

    @staticmethod
    def backward(ctx, grad_NE):  # type: ignore[override]
        x_NH, inner_NR, a_RH, b_ER = ctx.saved_tensors
        b_grad_ER = (grad_NE.t() @ inner_NR).to(b_ER.dtype).mul_(ctx.scale)
        inner_grad_NR = (grad_NE @ b_ER.to(grad_NE.dtype)).mul_(ctx.scale)
        a_grad_RH = (inner_grad_NR.t() @ x_NH).to(a_RH.dtype)
        return grad_NE, inner_grad_NR @ a_RH.to(x_NH.dtype), a_grad_RH, b_grad_ER, None


@dataclass(frozen=True)
class AttentionLayout:
    """Where N packed tokens stand in B rows of T places, what they see, and how far they are rotated.

    Args:
        cos_ND, sin_ND: of the tokens' positions, float32.
        place_N: `row * T + column` of every token; None where the rows are full.
        bias_B1TT: added to the scores, 0 or -inf; None: causal.
    """

    rows: int
    width: int
    cos_ND: Tensor
    sin_ND: Tensor
    place_N: Tensor | None = None
    bias_B1TT: Tensor | None = None


def attention(q_NE: Tensor, k_NE: Tensor, v_NE: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    """Rotary attention (arXiv:2104.09864) of packed tokens, each seeing its own row; k and v may have fewer heads.

    Returns [N, E] in the dtype of `q_NE`; scores and softmax are float32.
    """
    return _Attention.apply(q_NE, k_NE, v_NE, layout, scale)


class _Attention(torch.autograd.Function):
    """Forward: PyTorch's flash kernel. Backward: the same formulas (arXiv:2205.14135, section B.4) as plain products.

    With P = exp(scale Q K' - L), L the logsumexp that the forward left, and g the gradient of the output O:

        dV = P' g     dS = P * (g V' - rowsum(g * O))     dQ = scale dS K     dK = scale dS' Q
    """

    @staticmethod
    def forward(ctx, q_NE, k_NE, v_NE, layout, scale):  # type: ignore[override]
        head_dim = layout.cos_ND.shape[1]
        q, k = (_rotate(x, layout, head_dim, 1) for x in (q_NE, k_NE))
        q, k, v = (_to_rows(x, layout) for x in (q, k, v_NE.unflatten(1, (-1, head_dim))))
        with torch.autocast(q.device.type, enabled=False):
            bias = None if layout.bias_B1TT is None else layout.bias_B1TT.to(q.dtype)
            out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, bias is None, attn_mask=bias, scale=scale
            )
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.layout, ctx.scale = layout, scale
        return _to_tokens(out, layout).flatten(1)

    @staticmethod
    def backward(ctx, grad_NE):  # type: ignore[override]
        q, k, v, out, logsumexp = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        grad = _to_rows(grad_NE.unflatten(1, (-1, q.shape[-1])), layout)
        groups = k.shape[1]
        q4, grad4 = (_grouped(x, groups) for x in (q, grad))
        k4, v4 = (x.flatten(0, 1) for x in (k, v))
        probs = _probabilities(q4, k4, logsumexp, layout, scale)
        delta = torch.linalg.vecdot(grad.float(), out.float()).reshape(len(q4), -1, 1)
        v_grad = torch.bmm(probs.to(v.dtype).transpose(1, 2), grad4)
        scores_grad = torch.bmm(grad4.float(), v4.float().transpose(1, 2)).sub_(delta).mul_(probs).to(q.dtype)
        q_grad = torch.bmm(scores_grad, k4).mul_(scale).view(q.shape)
        k_grad = torch.bmm(scores_grad.transpose(1, 2), q4).mul_(scale).view(k.shape)
        q_grad, k_grad = (_rotate(_to_tokens(x, layout).flatten(1), layout, q.shape[-1], -1) for x in (q_grad, k_grad))
        return q_grad.flatten(1), k_grad.flatten(1), _to_tokens(v_grad.view(v.shape), layout).flatten(1), None, None


def _probabilities(q4: Tensor, k4: Tensor, logsumexp: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    """exp(scale Q K' - L), 0 where nothing is seen; float32, [B * groups, G * T, T]."""
    scores = torch.bmm(q4.float(), k4.float().transpose(1, 2)).mul_(scale)
    scores.sub_(logsumexp.reshape(len(q4), -1, 1))
    by_row = scores.view(layout.rows, -1, layout.width, layout.width)
    by_row.add_(_causal_bias(layout) if layout.bias_B1TT is None else layout.bias_B1TT)
    return scores.exp_()


def _causal_bias(layout: AttentionLayout) -> Tensor:
    full = layout.cos_ND.new_full((layout.width, layout.width), -torch.inf)
    return full.triu_(1)


def _grouped(x_BETD: Tensor, groups: int) -> Tensor:
    """[B * groups, G * T, D]: the heads that share a key head are rows of one product."""
    rows, heads, width, head_dim = x_BETD.shape
    return x_BETD.reshape(rows * groups, heads // groups * width, head_dim)


def _rotate(x_NE: Tensor, layout: AttentionLayout, head_dim: int, sign: int) -> Tensor:
    """Every head rotated by its token's angle, or back; [N, heads, D]; computed in float32."""
    x_NhD = x_NE.unflatten(1, (-1, head_dim)).float()
    half = head_dim // 2
    cos_N1D, sin_N1D = layout.cos_ND.unsqueeze(1), layout.sin_ND.unsqueeze(1)
    out_NhD = x_NhD * cos_N1D
    out_NhD[..., :half].addcmul_(x_NhD[..., half:], sin_N1D[..., :half], value=-sign)
    out_NhD[..., half:].addcmul_(x_NhD[..., :half], sin_N1D[..., half:], value=sign)
    return out_NhD.to(x_NE.dtype)


def _to_rows(x_NhD: Tensor, layout: AttentionLayout) -> Tensor:
    """[B, heads, T, D], zeros in empty places."""
    if layout.place_N is not None:
        full = x_NhD.new_zeros(layout.rows * layout.width, *x_NhD.shape[1:])
        x_NhD = full.index_copy_(0, layout.place_N, x_NhD)
    return x_NhD.unflatten(0, (layout.rows, layout.width)).transpose(1, 2).contiguous()


def _to_tokens(x_BhTD: Tensor, layout: AttentionLayout) -> Tensor:
    """The inverse: [N, heads, D]."""
    x_NhD: Any = x_BhTD.transpose(1, 2).flatten(0, 1)
    return x_NhD if layout.place_N is None else x_NhD.index_select(0, layout.place_N)
