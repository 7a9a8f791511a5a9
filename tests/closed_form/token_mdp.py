"""A token MDP small enough to enumerate, and the real PPO loop on it.

Vocabulary {0, 1, 2, EOS}, at most 4 new tokens after a one-token prompt: 1 + 3 + 9 + 27 responses that end with
EOS and 81 that run into the budget, 121 in all. Every response y has a known reward r(y), so that everything PPO
estimates has an exact value (Ziegler et al. 2019, arXiv:1909.08593, equation 2; Korbak et al. 2022,
arXiv:2205.11275):

    J(pi)  = E_pi[r] - beta KL(pi || pi_ref)              what RLHF maximises
    pi*(y) = pi_ref(y) exp(r(y) / beta) / Z               its only maximum
    J(pi*) = beta log Z,   J(pi*) - J(pi) = beta KL(pi || pi*)

Only four inputs of `rlhf.stages.ppo.main` are replaced: models, reward, prompts, and the run folder. The loop, sampler,
buffer, masks, GAE, losses and optimizer are the real ones, and so are `Policy`, `Critic` and `ActorCritic`: the tabular
policy is a language model whose backbone is a table.

R numbers the 121 responses, S the prefixes (states), V the 4 tokens. The prompt is the EOS id, and the buffer pads with
0, a token that the policy may sample: nothing here can be told by its id.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.config_schema import PPOStage
from rlhf.data.records import PromptRecord
from rlhf.data.templates import TokenizedPrompt
from rlhf.models.policy import ActorCritic, Policy
from rlhf.models.roles import Roles, Sampler
from rlhf.models.value import Critic, ScalarModel
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime
from rlhf.stages import ppo
from rlhf.types import Rollout

VOCABULARY, EOS, BUDGET = 4, 3, 4
PROMPT = [EOS]
TABLE_TOLERANCE = 0.02  # total variation between the trained table and pi*; training starts at about 0.6
DEAD = sum(EOS**length for length in range(BUDGET))  # 40 prefixes may be continued; all others share this state


def all_responses() -> list[tuple[int, ...]]:
    """The 121 responses: every string over {0, 1, 2} of length < 4 with EOS, and those of length 4 without."""
    finished = [(*y, EOS) for n in range(BUDGET) for y in itertools.product(range(EOS), repeat=n)]
    return finished + list(itertools.product(range(EOS), repeat=BUDGET))


# --- exact values -----------------------------------------------------------------------------------------------


class TokenMDP:
    """Responses with a known reward: N(1, 1) and reproducible. Adding 1 to all leaves pi* as it is; bugs it moves.

    `rewards_R` is the raw score; `effective_rewards_R(cfg)` is what the configuration makes of it (clip, then the
    missing-EOS rule), written down here a second time.
    """

    def __init__(self, seed: int = 0) -> None:
        self.responses = all_responses()
        generator = torch.Generator().manual_seed(seed)
        self.rewards_R = 1 + torch.randn(len(self.responses), generator=generator).double()
        self.index = {y: i for i, y in enumerate(self.responses)}

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """The reward function of PPO."""
        return [float(self.rewards_R[self.index[tuple(r.response_tokens)]]) for r in rollouts]

    def effective_rewards_R(self, cfg: PPOStage) -> Tensor:
        """Clipped scores; `missing_eos.value` less (or instead) for the 81 responses without EOS."""
        limit = cfg.score_clip or float("inf")
        clipped = [min(max(r, -limit), limit) for r in self.rewards_R.tolist()]
        penalise = {"none": lambda r: r, "set": lambda r: cfg.missing_eos.value}
        penalise["subtract"] = lambda r: r - cfg.missing_eos.value
        kind = cfg.missing_eos.kind
        pairs = zip(self.responses, clipped, strict=True)
        return torch.tensor([r if y[-1] == EOS else penalise[kind](r) for y, r in pairs], dtype=torch.float64)

    @torch.no_grad()
    def logprobs_R(self, lm: Any, temperature: float) -> Tensor:
        """Exact log pi(y) of all responses in float64, from full logits and without any code of the project."""
        width = len(PROMPT) + BUDGET
        rows = [[*PROMPT, *y] + [0] * (width - 1 - len(y)) for y in self.responses]
        tokens_RT = torch.tensor(rows)
        logits_RTV = lm(input_ids=tokens_RT).logits.double() / temperature
        steps_RT = torch.log_softmax(logits_RTV[:, :-1], -1).gather(-1, tokens_RT[:, 1:, None]).squeeze(-1)
        lengths_R1 = torch.tensor([[len(y)] for y in self.responses])
        return steps_RT.masked_fill(torch.arange(BUDGET) >= lengths_R1, 0.0).sum(1)


def optimum(reference_R: Tensor, rewards_R: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(log pi*, log Z): log pi*(y) = log pi_ref(y) + r(y) / beta - log Z."""
    unnormalised_R = reference_R + rewards_R / beta
    log_z = unnormalised_R.logsumexp(0)
    return unnormalised_R - log_z, log_z


def exact_kl(logp_R: Tensor, logq_R: Tensor) -> float:
    """KL(p || q) in nats per response."""
    return float((logp_R.exp() * (logp_R - logq_R)).sum())


def objective(logp_R: Tensor, reference_R: Tensor, rewards_R: Tensor, beta: float) -> float:
    """J(pi) = E_pi[r] - beta KL(pi || pi_ref)."""
    return float((logp_R.exp() * rewards_R).sum()) - beta * exact_kl(logp_R, reference_R)


def total_variation(logp_R: Tensor, logq_R: Tensor) -> float:
    """sum_y |p(y) - q(y)| / 2: the largest difference of any event's probability."""
    return float(0.5 * (logp_R.exp() - logq_R.exp()).abs().sum())


# --- a table as a language model --------------------------------------------------------------------------------


def next_state(state: Tensor, token: Tensor) -> Tensor:
    """Heap numbering of prefixes: 0 is the empty one, 3 s + v + 1 is s followed by v; DEAD after EOS or the budget."""
    child = EOS * state + token + 1
    return torch.where((token == EOS) | (child > DEAD) | (state == DEAD), DEAD, child).clamp(max=DEAD)


class PrefixCache:
    """What the sampler's key-value cache is to a table: the state of every row."""

    def __init__(self, state_B: Tensor) -> None:
        self.state_B = state_B

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, as `transformers.DynamicCache` does it."""
        self.state_B = self.state_B.repeat_interleave(repeats)

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep these rows."""
        self.state_B = self.state_B[rows]


class TableBackbone(nn.Module):
    """The 'hidden state' after a token is the one-hot code of the prefix read so far."""

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        """States of a right-padded batch whose first token is the prompt."""
        state_BT = torch.zeros_like(input_ids)
        for t in range(1, input_ids.shape[1]):
            state_BT[:, t] = next_state(state_BT[:, t - 1], input_ids[:, t])
        return SimpleNamespace(last_hidden_state=nn.functional.one_hot(state_BT, DEAD + 1).float())


class TableLM(nn.Module):
    """A causal language model, as `generate` and `Policy` need it; its head [V, S] holds the logits of every prefix."""

    base_model_prefix = "backbone"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        from transformers import LlamaConfig

        self.config = LlamaConfig(num_hidden_layers=1)  # `generate` makes an empty cache from it
        self.backbone = TableBackbone()
        self.head = nn.Linear(DEAD + 1, VOCABULARY, bias=False)
        nn.init.normal_(self.head.weight, std=0.5, generator=torch.Generator().manual_seed(seed))

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return self.head.weight.device

    def get_output_embeddings(self) -> nn.Linear:
        """The table."""
        return self.head

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        """Logits of every position; one position per row when a `PrefixCache` is given."""
        if isinstance(past_key_values, PrefixCache):
            past_key_values.state_B = next_state(past_key_values.state_B, input_ids[:, 0])
            return SimpleNamespace(
                logits=self.head.weight.T[past_key_values.state_B][:, None], past_key_values=past_key_values
            )
        logits_BTV = self.head(self.backbone(input_ids).last_hidden_state)
        return SimpleNamespace(logits=logits_BTV, past_key_values=PrefixCache(torch.zeros(len(input_ids)).long()))


class TableClassifier(nn.Module):
    """The critic's table [1, S], zero at first; as `ScalarModel` needs it."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = TableBackbone()
        self.score = nn.Linear(DEAD + 1, 1, bias=False)
        nn.init.zeros_(self.score.weight)


def tiny_llama(seed: int = 0) -> tuple[Any, Any]:
    """A 2-layer Llama of width 32 and a sequence classifier of the same shape whose head is zero."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.12, pad_token_id=None, num_labels=1, **shape)
    lm, classifier = LlamaForCausalLM(config).eval(), LlamaForSequenceClassification(config).eval()
    nn.init.zeros_(classifier.score.weight)
    return lm, classifier


# --- the real loop ----------------------------------------------------------------------------------------------


def ppo_config(**changes: Any) -> PPOStage:
    """The tabular experiment, in float32; keyword arguments win.

    What is not named here has the stage's default, whitened advantages and lambda .95 among them. Whitening divides by
    the deviation of the advantages, which goes to 0 at the optimum, where r - beta log(pi / pi_ref) is the same for
    every response: it keeps the noise at unit size, so the learning rate has to fall to 0 to get close.
    """
    settings: dict[str, Any] = {
        "run_dir": "unused",
        "model": "unused",
        "scorer": "readability",
        "critic_init": "policy",
        "prompts": {"path": "unused"},
        "precision": "fp32",
        "sampling": {"temperature": 0.8, "max_new_tokens": BUDGET, "batch_size": 512},
        "steps": 40,
        "batch_size": 512,
        "micro_batch_size": 256,
        "epochs": 3,
        "minibatches": 2,
        "optim": {"lr": 0.07, "betas": (0.8, 0.95), "schedule": "cosine"},
        "critic_lr": 0.15,
        "kl": {"kind": "fixed", "coef": 0.5},
        "value_coef": 1.0,
        "value_clip_range": 1.0,
        "score_clip": 2.5,
        "missing_eos": {"kind": "subtract", "value": 0.5},
    }
    return PPOStage(**{**settings, **changes})


@dataclass
class RecordedRun:
    """Stands in for `PPORun`: steps and metrics in memory, nothing on disk."""

    steps_total: int
    metrics: list[dict[str, float]] = field(default_factory=list)
    progress: Any = field(default_factory=lambda: SimpleNamespace(advance=lambda n: None, console=None))

    def steps(self) -> range:
        """0-based steps."""
        return range(self.steps_total)

    def phase(self, name: str) -> Any:
        """Nobody measures."""
        return nullcontext()

    def on_tokens(self, count: int) -> None:
        """Nobody looks."""

    def end_if_asked(self, step: int) -> None:
        """Nobody asks."""

    def keeping_on_failure(self, step: int, rollouts: Any) -> Any:
        """Nothing is kept."""
        return nullcontext()

    def log(self, step: int, metrics: dict[str, float], batch: Any, rollouts: Any) -> None:
        """Keep the metrics."""
        self.metrics.append(metrics)

    def save_if_due(self, step: int) -> None:
        """Never."""

    def finish(self, roles: Roles) -> None:
        """Nothing to write."""


@dataclass
class Experiment:
    """Models before (`reference`) and after training (`lm`), and the metrics of every step."""

    mdp: TokenMDP
    cfg: PPOStage
    lm: Any
    reference: Any
    actor_critic: ActorCritic
    metrics: list[dict[str, float]]

    @property
    def policy_R(self) -> Tensor:
        """log pi(y) of what the sampler samples now."""
        return self.mdp.logprobs_R(self.lm, self.cfg.sampling.temperature)

    @property
    def reference_R(self) -> Tensor:
        """log pi_ref(y)."""
        return self.mdp.logprobs_R(self.reference, self.cfg.sampling.temperature)

    @property
    def optimum_R(self) -> Tensor:
        """log pi*(y)."""
        return optimum(self.reference_R, self.mdp.effective_rewards_R(self.cfg), self.cfg.kl.coef)[0]

    @property
    def distance(self) -> float:
        """Total variation between the trained policy and the optimum."""
        return total_variation(self.policy_R, self.optimum_R)


def build_roles(lm: Any, classifier: Any, reference: Any, runtime: Runtime) -> Roles:
    """As `rlhf.models.roles.build_roles` does it, without files."""
    return Roles(
        tokenizer=SimpleNamespace(decode=lambda tokens, skip_special_tokens: " ".join(map(str, tokens))),
        eos_ids=(EOS,),
        actor_critic=ActorCritic(Policy(lm), Critic(ScalarModel(classifier))).eval(),
        reference=runtime.shard(runtime.freeze(Policy(reference))),
        sampler=Sampler(lm, runtime),
        policy_handle=None,
        critic_handle=None,
    )


def run_ppo(mdp: TokenMDP, cfg: PPOStage, lm: Any, classifier: Any) -> Experiment:
    """`rlhf.stages.ppo.main` with the given models, reward and prompt; `lm` is trained in place."""
    reference = copy.deepcopy(lm)
    run = RecordedRun(cfg.steps)
    made: list[Roles] = []

    @contextmanager
    def opened(*_: Any, **__: Any) -> Any:
        yield run

    def roles_of(_: PPOStage, runtime: Runtime) -> Roles:
        made.append(build_roles(lm, classifier, reference, runtime))
        return made[0]

    prompt = TokenizedPrompt(PromptRecord("", "prompt"), PROMPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "build_roles", roles_of)
        patch.setattr(ppo, "build_reward", lambda *_: mdp.score)
        patch.setattr(ppo, "load_prompts", lambda *_: ([prompt] * cfg.batch_size, ""))
        patch.setattr(ppo, "show_prompts", lambda *_: None)
        patch.setattr(ppo, "PPORun", SimpleNamespace(open=opened))
        ppo.main(cfg, RunOptions())
    return Experiment(mdp, cfg, lm, reference, made[0].actor_critic, run.metrics)


def run_table(**changes: Any) -> Experiment:
    """The tabular experiment under `ppo_config(**changes)`."""
    return run_ppo(TokenMDP(), ppo_config(**changes), TableLM(), TableClassifier())
