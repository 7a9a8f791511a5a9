"""The parts of a transformer layer that are not matrix products with weights, each with a backward by hand.

Eager PyTorch on a CPU spends two thirds of a small model's training step in them: an RMSNorm is eight passes over
memory, and the backward of its attention kernel runs at a tenth of what the products inside reach. Every function
here equals the plain composition that its docstring gives, to the rounding of its dtype.

Letters beside those of `rlhf.types`: N tokens, E = heads * D, D units of a head, G query heads that share a key head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_NH: Tensor, weight_H: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` in `dtype`; the mean in float32 (arXiv:1910.07467, equation 4)."""
    return _RMSNorm.apply(x_NH, weight_H, eps, dtype)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps) and g the gradient: dx = r g w - x r^3 mean(g w x), dw = sum over N of r g x.

    Both sums are products of one matrix, g x, with a vector.
    """

    @staticmethod
    def forward(ctx, x_NH, weight_H, eps, dtype):  # type: ignore[override]
        squares_N1 = torch.linalg.vector_norm(x_NH, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale_N1 = squares_N1.div_(x_NH.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_NH, weight_H, scale_N1)
        return ((x_NH * scale_N1).to(x_NH.dtype) * weight_H).to(dtype)

    @staticmethod
    def backward(ctx, grad_NH):  # type: ignore[override]
        x_NH, weight_H, scale_N1 = ctx.saved_tensors
        x32_NH, grad_NH, weight32_H = x_NH.float(), grad_NH.float(), weight_H.float()
        product_NH = grad_NH * x32_NH
        weight_grad_H = None
        if ctx.needs_input_grad[1]:
            weight_grad_H = (product_NH.t() @ scale_N1.squeeze(1)).to(weight_H.dtype)
        mean_N1 = (product_NH @ weight32_H).unsqueeze(1).div_(x_NH.shape[1])
        # A new tensor: `float` of a float32 gradient is the gradient itself, which others may need.
        x_grad_NH = (grad_NH * weight32_H).mul_(scale_N1).addcmul_(x32_NH, mean_N1.mul_(scale_N1**3), value=-1)
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
    _indices: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def indices(self, heads: int) -> tuple[Tensor, Tensor]:
        """(for every head of every place in [B, heads, T] its token's in [N, heads], and the other way round), flat.

        Empty places get token 0. Every layer asks again, so the answer is kept.
        """
        assert self.place_N is not None, "full rows are only transposed"
        if heads not in self._indices:
            place_N, head_h = self.place_N, torch.arange(heads, device=self.place_N.device)
            token_P = place_N.new_zeros(self.rows * self.width)
            token_P[place_N] = torch.arange(len(place_N), device=place_N.device)
            token_B1T = token_P.view(self.rows, 1, self.width)
            row_N1, column_N1 = (place_N // self.width)[:, None], (place_N % self.width)[:, None]
            of_places = (token_B1T * heads + head_h[:, None]).flatten()
            self._indices[heads] = of_places, ((row_N1 * heads + head_h) * self.width + column_N1).flatten()
        return self._indices[heads]


def attention(q_NE: Tensor, k_NE: Tensor, v_NE: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    """Rotary attention (arXiv:2104.09864) of packed tokens, each seeing its own row; k and v may have fewer heads.

    Returns [N, E] in the dtype of `q_NE`; scores and softmax are float32.
    """
    return _Attention.apply(q_NE, k_NE, v_NE, layout, scale)


class _Attention(torch.autograd.Function):
    """Forward: PyTorch's flash kernel. Backward: the same formulas (arXiv:2205.14135, section B.4) as plain products.

    With P = exp(scale Q K' - L), L the logsumexp that the forward left, and g the gradient of the output:

        dV = P' g     dP = g V'     dS = P * (dP - rowsum(P * dP))     dQ = scale dS K     dK = scale dS' Q

    What stands in empty places is never seen: no later token is, and as queries their L is infinite, so P is 0.
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
        if layout.place_N is not None:
            empty_P = torch.ones(layout.rows * layout.width, dtype=torch.bool, device=q.device)
            empty_P[layout.place_N] = False
            logsumexp.masked_fill_(empty_P.view(layout.rows, 1, layout.width), torch.inf)
        ctx.save_for_backward(q, k, v, logsumexp)
        ctx.layout, ctx.scale = layout, scale
        return _to_tokens(out, layout).flatten(1)

    @staticmethod
    def backward(ctx, grad_NE):  # type: ignore[override]
        q, k, v, logsumexp = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        grad = _to_rows(grad_NE.unflatten(1, (-1, q.shape[-1])), layout)
        groups = k.shape[1]
        q4, grad4 = (_grouped(x, groups) for x in (q, grad))
        k4, v4 = (x.flatten(0, 1) for x in (k, v))
        probs = _probabilities(q4, k4, logsumexp, layout, scale)
        v_grad = torch.bmm(probs.to(v.dtype).transpose(1, 2), grad4)
        probs_grad = torch.bmm(grad4.float(), v4.float().transpose(1, 2))
        scores_grad = torch.ops.aten._softmax_backward_data(probs_grad, probs, -1, torch.float32).to(q.dtype)
        q_grad = torch.bmm(scores_grad, k4).mul_(scale).view(q.shape)
        k_grad = torch.bmm(scores_grad.transpose(1, 2), q4).mul_(scale).view(k.shape)
        q_grad, k_grad = (_rotate(_to_tokens(x, layout).flatten(1), layout, q.shape[-1], -1) for x in (q_grad, k_grad))
        return q_grad.flatten(1), k_grad.flatten(1), _to_tokens(v_grad.view(v.shape), layout).flatten(1), None, None


def _probabilities(q4: Tensor, k4: Tensor, logsumexp: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    """exp(scale Q K' - L), 0 where nothing is seen; float32, [B * groups, G * T, T].

    By powers of 2: on a CPU `exp` takes ten times as long where its result is 0, and up here half of them are.
    """
    scores = torch.bmm(q4.float(), k4.float().transpose(1, 2)).mul_(scale / math.log(2.0))
    scores.sub_(logsumexp.reshape(len(q4), -1, 1) / math.log(2.0))
    by_row = scores.view(layout.rows, -1, layout.width, layout.width)
    by_row.add_(_causal_bias(layout) if layout.bias_B1TT is None else layout.bias_B1TT)
    return scores.exp2_()


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
    """[B, heads, T, D]; in empty places stands any token."""
    if layout.place_N is None:
        return x_NhD.unflatten(0, (layout.rows, layout.width)).transpose(1, 2).contiguous()
    heads, head_dim = x_NhD.shape[1:]
    of_places, _ = layout.indices(heads)
    return x_NhD.reshape(-1, head_dim).index_select(0, of_places).view(layout.rows, heads, layout.width, head_dim)


def _to_tokens(x_BhTD: Tensor, layout: AttentionLayout) -> Tensor:
    """The inverse: [N, heads, D]."""
    if layout.place_N is None:
        return x_BhTD.transpose(1, 2).flatten(0, 1)
    heads, head_dim = x_BhTD.shape[1], x_BhTD.shape[3]
    _, of_tokens = layout.indices(heads)
    return x_BhTD.reshape(-1, head_dim).index_select(0, of_tokens).view(-1, heads, head_dim)
