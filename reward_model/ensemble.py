"""Several reward models in one: M linear heads over one trunk, or M LoRA adapters over one frozen base.

Where the members agree the score is known, and where they do not it is a guess: a pessimistic aggregate (the minimum,
or mean - k std) pays less for guesses, and the disagreement says which responses people should label.

Heads over one trunk that share everything end as one head, for the loss is convex in a head. So every member has two
things of its own:
    - its start: the model's head plus a draw of the size of a new head. The draws add up to 0, so that the mean of the
      heads begins where a single one would.
    - its data: every prompt gets an Exp(1) weight in every member's loss (the Bayesian bootstrap, Rubin 1981). No
      member loses a third of the data, as it would by drawing with replacement. One weight for all rankings of a
      prompt: they are not independent.
Members are centred one by one, for nothing in a ranking says where a member's 0 is, but have one unit, the log odds
that all learn. So the mean of M heads is itself a head: that of the plain model in `final/`.

Sources: Coste et al. 2023 (arXiv:2310.02743), minimum and mean - k std against over-optimisation; Eisenstein et al.
2023 (arXiv:2312.09244), members that differ in the fine-tuning alone; Zhai et al. 2023 (arXiv:2401.00243), LoRA.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.config_schema import RewardStage
from rlhf.errors import ModelError
from rlhf.models.adapters import save_adapter
from rlhf.models.sharing import Share, share_equal
from rlhf.models.tuning import apply_tuning, merge_tuning, shared_copy
from rlhf.models.value import ScalarModel, at_last_token, file_beside, load_scalar_model, read_with

DESCRIPTION, HEADS, MEMBERS = "ensemble.json", "heads.safetensors", "members"


@dataclass(frozen=True)
class Aggregate:
    """How the members' scores become one. `coef`: k of mean - k std."""

    kind: str = "mean"
    coef: float = 1.0

    def __call__(self, scores_MN: Tensor) -> Tensor:
        """One score per row, shape [N]."""
        if self.kind == "min":
            return scores_MN.amin(0)
        mean_N = scores_MN.mean(0)
        return mean_N if self.kind == "mean" else mean_N - self.coef * disagreement(scores_MN)


def disagreement(scores_MN: Tensor) -> Tensor:
    """Standard deviation over the members (divisor M) of every row's score, shape [N]."""
    return scores_MN.std(0, correction=0)


def member_weights(groups: Sequence[str], members: int, seed: int) -> Tensor:
    """[B, M]: each member's weight, from Exp(1), of every prompt; a function of seed, member and prompt alone."""
    rows = []
    for group in groups:
        digests = (hashlib.sha256(f"{seed}:{member}:{group}".encode()).digest() for member in range(members))
        rows.append([-math.log((int.from_bytes(digest[:8], "big") + 1) / 2**64) for digest in digests])
    return torch.tensor(rows).reshape(len(groups), members)


class _Members(nn.Module):
    """What both kinds of ensembles have: M members with a mean each and one unit."""

    means_M: Tensor
    std: Tensor

    def __init__(self, members: int, aggregate: Aggregate) -> None:
        super().__init__()
        self.members = members
        self.aggregate = aggregate
        self.register_buffer("means_M", torch.zeros(members), persistent=False)
        self.register_buffer("std", torch.tensor(1.0), persistent=False)

    def score_last(self, tokens_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Every member's normalised score at the last real token, [B, M]."""
        return at_last_token(self(tokens_BT, attention_mask_BT), attention_mask_BT)

    def set_normalisation(self, means: Sequence[float], std: float) -> None:
        """From now on member m's scores are (raw - means[m]) / std."""
        self.means_M.copy_(torch.tensor(means))
        self.std.fill_(std)

    def _describe(self, folder: Path, kind: str, *, plain: str) -> None:
        found = {
            "kind": kind,
            "members": self.members,
            "aggregate": self.aggregate.kind,
            "coef": self.aggregate.coef,
            "means": self.means_M.tolist(),
            "std": float(self.std),
            "plain": f"the model in this folder is {plain}",
        }
        (folder / DESCRIPTION).write_text(json.dumps(found, indent=1), encoding="utf-8")


class HeadEnsemble(_Members):
    """M linear heads that read the states of one scalar model; its own head is their mean, once they have learned."""

    def __init__(self, scalar: ScalarModel, heads_MH: Tensor, aggregate: Aggregate, handle: Any = None) -> None:
        """`handle`: what `apply_tuning` gave for the model, to end training."""
        super().__init__(len(heads_MH), aggregate)
        self.scalar = scalar
        self._handle = (handle,)  # in a tuple: it is no further part of this module
        self.score = nn.Linear(heads_MH.shape[1], len(heads_MH), bias=False, device=heads_MH.device)
        self.score.weight.data = heads_MH.float()

    @property
    def handle(self) -> Any:
        """What `apply_tuning` gave."""
        return self._handle[0]

    @property
    def passes(self) -> int:
        """Forwards through the layers."""
        return 1

    @property
    def branch(self) -> nn.Module | None:
        """See `ScalarModel`."""
        return self.scalar.branch

    def forward(self, tokens_BT: Tensor, attention_mask: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Every member's normalised score after every token, float32, [B, T, M]; masks as `hidden_states`."""
        raw_BTM = read_with(self.score, self.scalar.states(tokens_BT, attention_mask, positions_BT))
        return (raw_BTM - self.means_M) / self.std

    @property
    def plain_mean(self) -> float:
        """Raw score of the plain model that is 0 after normalisation."""
        return float(self.means_M.mean())

    def plain(self, dtype: torch.dtype) -> Any:
        """End training and give the plain model, whose states the heads read from now on: adapters folded in, in
        `dtype`, with the mean of the heads as its own. The heads stay in float32."""
        self.plain_head()
        self.scalar.classifier = merge_tuning(self.handle).to(dtype)
        return self.scalar.classifier

    def plain_head(self) -> nn.Linear:
        """The model's own head, made the members' mean."""
        head = self.scalar.classifier.score
        head.weight.data = self.score.weight.detach().mean(0, keepdim=True).to(head.weight)
        if head.bias is not None:  # of another's reward model; the members have none
            head.bias.data.zero_()
        return head

    def save(self, folder: Path) -> None:
        """Write the members beside the plain model."""
        save_file({"weight": self.score.weight.detach().cpu().contiguous()}, folder / HEADS, metadata={"format": "pt"})
        self._describe(folder, "heads", plain="the mean of the members")


class AdapterEnsemble(_Members):
    """M scalar models over the same frozen tensors, each with an adapter and a head of its own."""

    def __init__(self, scalars: Sequence[ScalarModel], aggregate: Aggregate, handles: Sequence[Any] = ()) -> None:
        """`handles`: what `apply_tuning` gave for each, to `save` them."""
        super().__init__(len(scalars), aggregate)
        self.scalars = nn.ModuleList(scalars)
        self.handles = handles

    @property
    def passes(self) -> int:
        """Forwards through the layers."""
        return self.members

    @property
    def branch(self) -> nn.Module | None:
        """The first member's, see `ScalarModel`; all members have one, or none has."""
        return self.scalars[0].branch  # type: ignore[return-value]

    def forward(self, tokens_BT: Tensor, attention_mask: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """As `HeadEnsemble.forward`."""
        raw = [scalar(tokens_BT, attention_mask, positions_BT) for scalar in self.scalars]
        return (torch.stack(raw, dim=2) - self.means_M) / self.std

    @property
    def plain_mean(self) -> float:
        """As `HeadEnsemble.plain_mean`."""
        return float(self.means_M[0])

    @property
    def handle(self) -> Any:
        """The first member's."""
        return self.handles[0]

    def plain(self, dtype: torch.dtype) -> Any:
        """The first member as a transformers model without adapters, in `dtype`; the members stay as they are."""
        first: Any = self.scalars[0]
        classifier = shared_copy(first.classifier)
        classifier.score = copy.deepcopy(classifier.score)
        return merge_tuning(classifier).to(dtype)

    def plain_head(self) -> nn.Linear:
        """The first member's."""
        first: Any = self.scalars[0]
        return first.classifier.score

    def save(self, folder: Path) -> None:
        """Write the members beside the plain model."""
        for i, (scalar, handle) in enumerate(zip(self.scalars, self.handles, strict=True)):
            classifier: Any = scalar.classifier
            save_adapter(handle, folder / MEMBERS / str(i), head=classifier.score)
        self._describe(folder, "adapters", plain="the first member")


Ensemble = HeadEnsemble | AdapterEnsemble


# --- made for training ---------------------------------------------------------------------------------------


def start_ensemble(scalar: ScalarModel, cfg: RewardStage, precision: torch.dtype) -> Ensemble:
    """The ensemble that is to be trained, with what `cfg.tuning` says trainable, from a model with raw scores."""
    assert cfg.ensemble is not None
    aggregate = Aggregate(cfg.ensemble.aggregate, cfg.ensemble.coef)
    if cfg.ensemble.kind == "heads":
        handle = apply_tuning(scalar.classifier, cfg.tuning, precision, head=scalar.classifier.score)
        scalar.classifier.score.requires_grad_(False)  # in its place the members' learn
        return HeadEnsemble(scalar, _first_heads(scalar, cfg), aggregate, handle)
    scalars, handles = [], []
    for head_H in _first_heads(scalar, cfg):
        classifier = shared_copy(scalar.classifier)
        classifier.score = nn.Linear(len(head_H), 1, bias=False)
        classifier.score.weight.data = head_H[None].clone()
        handles.append(apply_tuning(classifier, cfg.tuning, precision, head=classifier.score))
        scalars.append(ScalarModel(classifier))
    return AdapterEnsemble(scalars, aggregate, handles)


def _first_heads(scalar: ScalarModel, cfg: RewardStage) -> Tensor:
    """[M, H], around the model's own head; or those of the model, if it is such an ensemble itself."""
    assert cfg.ensemble is not None
    found = described(cfg.model)
    if found is not None and (found["kind"], found["members"]) == ("heads", cfg.ensemble.members):
        return _read_heads(cfg.model, found)
    head_1H = scalar.classifier.score.weight.detach().float()
    return head_1H + _draws(cfg.ensemble.members, head_1H.shape[1], cfg.seed)


def _draws(members: int, width: int, seed: int) -> Tensor:
    """[M, H] of the size of a new head (`load_sequence_classifier`), adding up to 0."""
    draws_MH = torch.randn(members, width, generator=torch.Generator().manual_seed(seed)) * (width + 1) ** -0.5
    return (draws_MH - draws_MH.mean(0)) * math.sqrt(members / (members - 1))


# --- read from a folder --------------------------------------------------------------------------------------


def described(name: str) -> dict[str, Any] | None:
    """What `ensemble.json` says of a reward model; None where it is a single one.

    Raises:
        ModelError: the file is damaged.
    """
    file = file_beside(name, DESCRIPTION)
    if file is None:
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        members, means = int(found["members"]), [float(mean) for mean in found["means"]]
        aggregate = Aggregate(str(found["aggregate"]), float(found["coef"]))
        known = found["kind"] in ("heads", "adapters") and aggregate.kind in ("mean", "min", "mean_minus_std")
        if not known or len(means) != members or float(found["std"]) <= 0:
            raise ValueError("unknown kind, or not one mean per member")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{file} is damaged ({error})", fix="restore it, or train the reward model again") from None
    return {**found, "means": means, "aggregate": aggregate}


def load_ensemble(name: str, found: dict[str, Any], *, dtype: torch.dtype, share: Share) -> Ensemble:
    """The ensemble that `described` found in the folder `name`, frozen.

    Args:
        share: see `models.sharing`; members share what they have in common in any case.

    Raises:
        ModelError: a member is missing or does not fit.
    """
    if found["kind"] == "heads":
        scalar = load_scalar_model(name, dtype=dtype, keep_adapter=True)
        scalar.requires_grad_(False)
        share(scalar)
        ensemble: Ensemble = HeadEnsemble(scalar, _read_heads(name, found), found["aggregate"])
    else:
        folder = Path(name).expanduser() / MEMBERS
        if not folder.is_dir():
            raise ModelError(f"there is no {folder}", fix="give the local folder of the whole ensemble")
        scalars: list[ScalarModel] = []
        for i in range(found["members"]):
            scalar = load_scalar_model(str(folder / str(i)), dtype=dtype, keep_adapter=True)
            scalar.requires_grad_(False)
            share(scalar)
            if scalars:
                share_equal(scalar.classifier, scalars[0].classifier)
            scalars.append(scalar)
        ensemble = AdapterEnsemble(scalars, found["aggregate"])
    ensemble.set_normalisation(found["means"], float(found["std"]))
    return ensemble.requires_grad_(False)


def _read_heads(name: str, found: dict[str, Any]) -> Tensor:
    file = file_beside(name, HEADS)
    try:
        if file is None:
            raise ValueError("it is missing")
        heads_MH = load_file(file)["weight"]
        if heads_MH.dim() != 2 or len(heads_MH) != found["members"]:
            raise ValueError(f"its shape is {tuple(heads_MH.shape)}")
        return heads_MH
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        where = file or f"{HEADS} of {name}"
        raise ModelError(f"{where} cannot be read ({error})", fix="restore it, or train the ensemble again") from None
