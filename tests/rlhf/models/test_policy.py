"""Log-probabilities of a policy: `logits[t-1]` predicts token t, and padding is nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.models.load import load_causal_lm
from rlhf.models.policy import ActorCritic, Policy, position_ids
from rlhf.models.value import Critic, load_scalar_model

ROWS = [[2, 9, 12, 3], [2, 30, 14, 15, 16, 40, 3], [2, 7]]
ACTIONS = [[0, 0, 1, 1], [0, 1, 1, 0, 0, 1, 1], [0, 1]]


class Table(nn.Module):
    """A bigram model: the distribution after token v is row v of a table; its hidden state is v as a one-hot."""

    base_model_prefix = "model"

    def __init__(self, logits_VV: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(len(logits_VV), len(logits_VV), bias=False)
        self.head.weight.data = logits_VV.t().clone()

    def model(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=nn.functional.one_hot(input_ids, self.head.in_features).float())

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def padded(rows: list[list[int]], fill: int, *, left: int = 0, right: int = 0, side: str = "right") -> Tensor:
    width = max(map(len, rows))
    out = []
    for row in rows:
        gap = [fill] * (width - len(row))
        body = row + gap if side == "right" else gap + row
        out.append([fill] * left + body + [fill] * right)
    return torch.tensor(out)


def inputs(rows: list[list[int]], actions: list[list[int]], pad: int, **where: Any) -> tuple[Tensor, Tensor, Tensor]:
    mask = padded([[1] * len(row) for row in rows], 0, **where).bool()
    return padded(rows, pad, **where), mask, padded(actions, 0, **where).bool()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_table_model_gives_its_own_entries(temperature: float) -> None:
    p_VV = torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.6, 0.3, 0.1]])
    tempered_VV = p_VV ** (1 / temperature)
    tempered_VV = tempered_VV / tempered_VV.sum(1, keepdim=True)
    tokens = torch.tensor([[0, 2, 1, 1]])
    logprobs, entropy = Policy(Table(p_VV.log()))(
        tokens, torch.ones(1, 4).bool(), torch.tensor([[False, True, False, True]]), temperature=temperature
    )
    # token 1 is a 2 after a 0, token 3 a 1 after a 1; tokens 0 and 2 are no actions
    expected = [0.0, float(tempered_VV[0, 2].log()), 0.0, float(tempered_VV[1, 1].log())]
    assert logprobs[0].tolist() == pytest.approx(expected, abs=1e-6)
    entropies = -(tempered_VV * tempered_VV.log()).sum(1)
    assert entropy[0].tolist() == pytest.approx([0.0, float(entropies[0]), 0.0, float(entropies[1])], abs=1e-6)


@pytest.fixture(scope="module")
def lm(tiny: Any) -> Any:
    return load_causal_lm(tiny.path, dtype=torch.float32).eval()


def test_logprobs_are_transformers_shifted_by_one(lm: Any) -> None:
    row = ROWS[1]
    tokens, mask, actions = inputs([row], [ACTIONS[1]], 0)
    with torch.no_grad():
        logprobs, entropy = Policy(lm)(tokens, mask, actions, temperature=0.7)
        logp_TV = (lm(tokens).logits[0] / 0.7).log_softmax(-1)
    for t, action in enumerate(ACTIONS[1]):
        exact = float(logp_TV[t - 1, row[t]]) if action else 0.0
        assert float(logprobs[0, t]) == pytest.approx(exact, abs=1e-5)
        spread = float(-(logp_TV[t - 1].exp() * logp_TV[t - 1]).sum()) if action else 0.0
        assert float(entropy[0, t]) == pytest.approx(spread, abs=1e-5)


@pytest.mark.parametrize("pad", [0, 3], ids=["pad-is-unk", "pad-is-eos"])
@pytest.mark.parametrize(
    "where",
    [{}, {"right": 5}, {"side": "left"}, {"side": "left", "left": 4}, {"left": 3, "right": 2}],
    ids=["ragged", "more-right", "left", "more-left", "both"],
)
def test_padding_and_batch_size_change_nothing(lm: Any, tiny: Any, pad: int, where: dict[str, Any]) -> None:
    model = ActorCritic(Policy(lm), Critic(load_scalar_model(tiny.reward, dtype=torch.float32).eval()))
    tokens, mask, actions = inputs(ROWS, ACTIONS, pad, **where)
    with torch.no_grad():
        together = model(tokens, mask, actions)
        alone = [model(*inputs([row], [action], pad)) for row, action in zip(ROWS, ACTIONS, strict=True)]
    for name, all_BT, parts in zip(("logprob", "entropy", "value"), together, zip(*alone, strict=True), strict=True):
        assert all_BT[~actions].eq(0).all(), name
        for i, part in enumerate(parts):
            torch.testing.assert_close(all_BT[i][mask[i]], part[0], atol=1e-5, rtol=0, msg=f"{name} of row {i}")


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 1, 1, 1], [0, 1, 2, 3, 4]]


def test_the_sampled_eos_is_trained_when_pad_is_eos(lm: Any) -> None:
    """Its own logprob, with a gradient; the same id as padding has neither."""
    tokens, mask, actions = inputs([[2, 9, 3], [2, 9, 12, 14, 3]], [[0, 1, 1], [0, 1, 1, 1, 1]], 3)
    logprobs, _ = Policy(lm)(tokens, mask, actions)
    assert logprobs[0, 2].detach() < 0
    assert logprobs[0, 3:].eq(0).all()
    (gradient,) = torch.autograd.grad(logprobs[0, 2], lm.lm_head.weight)
    assert float(gradient[3].norm()) > 0


def test_dropout_is_off(tiny: Any) -> None:
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(tiny.path).attention_dropout == 0.1, "the saved model asks for it"
    lm = load_causal_lm(tiny.path, dtype=torch.float32).train()  # not even in training mode
    policy, given = Policy(lm), inputs(ROWS, ACTIONS, 3)
    assert torch.equal(policy(*given)[0], policy(*given)[0])
    assert lm.config.attention_dropout == 0.0
