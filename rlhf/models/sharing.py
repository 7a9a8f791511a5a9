"""One base model in several roles: a frozen trunk under a branch of top layers per role (hydra), or equal tensors once.

    trunk = Trunk.of(lm, top=6, remembered_rows=64)
    policy_backbone = trunk.branch(lm)          # the policy's own top layers over the common trunk
    critic_backbone = trunk.branch(classifier)  # its bottom layers must equal the trunk's; they are then given up

The trunk's states of a row never change, so they are remembered from sampling or computed once: scoring with
reference, critic and reward model, and every epoch of the update, go through top layers only.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import ModelError
from rlhf.models.packed_forward import agreed_precision
from rlhf.models.policy import hidden_states
from rlhf.models.tuning import backbone_of, layers_of
from rlhf.models.value import ScalarModel

_log = logging.getLogger(__name__)

Share = Callable[[ScalarModel], None]
"""Makes a scalar model use what it has in common with the policy, in place."""


def keep_apart(scalar: ScalarModel) -> None:
    """Share nothing."""


def sharing_of(kind: str, lm: Any, trunk: Trunk | None) -> Share:
    """`hydra`: a branch over the trunk; `lora`: in place of equal tensors those of the policy, or of a scalar model
    that came before; else `keep_apart`.

    A model that has nothing in common with them is left as it is, and named.
    """
    if trunk is not None:

        def graft(scalar: ScalarModel) -> None:
            if trunk.is_under(scalar.classifier):
                scalar.branch = trunk.branch(scalar.classifier)
                return
            _log.warning(
                "%s stays whole: its lowest %d layers are not the policy's. To share them, train it from the policy "
                "with tuning.layers: %d or fewer.",
                scalar.classifier.config._name_or_path,
                trunk.depth,
                len(layers_of(backbone_of(lm))) - trunk.depth,
            )

        return graft

    known = [lm]

    def reuse(scalar: ScalarModel) -> None:
        shared = sum(share_equal(scalar.classifier, other) for other in known)
        known.append(scalar.classifier)
        own = [name for name, _ in backbone_of(scalar.classifier).named_parameters() if "lora_" not in name]
        if shared < len(own) / 2:
            _log.warning(
                "%s stays whole: its layers are not the policy's. To share them, train it from the policy with "
                "tuning.kind: lora and give its adapter folder.",
                scalar.classifier.config._name_or_path,
            )

    return reuse if kind == "lora" else keep_apart


def share_equal(model: Any, base: Any) -> int:
    """Replace frozen parameters of `model` by those of `base` that have their name and value; returns how many."""
    known = {_plain_name(name): p for name, p in backbone_of(base).named_parameters() if not p.requires_grad}
    count = 0
    for name, parameter in list(backbone_of(model).named_parameters()):
        other = known.get(_plain_name(name))
        if other is None or other is parameter or parameter.requires_grad or other.dtype != parameter.dtype:
            continue
        if torch.equal(other, parameter.to(other.device)):
            owner, _, leaf = name.rpartition(".")
            setattr(backbone_of(model).get_submodule(owner), leaf, other)
            count += 1
    return count


def _plain_name(name: str) -> str:
    """Without what an adapted layer puts between itself and its weight."""
    return name.replace(".base_layer.", ".")


class Trunk:
    """The frozen bottom layers of a language model, and their states of the rows that were read last."""

    def __init__(self, part: Any, depth: int, remembered_rows: int) -> None:
        self._part = part
        self.depth = depth
        self._capacity = remembered_rows
        self._states: OrderedDict[bytes, Tensor] = OrderedDict()

    @classmethod
    def of(cls, lm: Any, *, top: int, remembered_rows: int) -> Trunk:
        """All layers of `lm` but its `top` last ones, over the same tensors.

        Raises:
            ModelError: the model's forward is more than embedding, layers and norm in turn.
        """
        backbone = backbone_of(lm)
        if not all(hasattr(backbone, name) for name in ("embed_tokens", "layers", "norm")):
            raise _uncuttable(backbone)
        depth = len(layers_of(backbone)) - top
        trunk = cls(_part_of(backbone, 0, depth, with_norm=False), depth, remembered_rows)
        _check_split(backbone, trunk)
        return trunk

    def branch(self, model: Any) -> Branch:
        """The backbone of `model` over this trunk: its top layers stay its own, its bottom ones become the trunk's.

        Raises:
            ModelError: its bottom layers are others than the trunk's.
        """
        backbone = backbone_of(model)
        if not self.is_under(model):
            raise ModelError(
                f"the lowest {self.depth} layers of {model.config._name_or_path} are not those of the policy",
                fix="train it from the same model with tuning.layers, or set sharing: separate",
            )
        backbone.embed_tokens = self._part.embed_tokens
        for i, layer in enumerate(self._part.layers):
            backbone.layers[i] = layer
        return Branch(self, _part_of(backbone, self.depth, len(backbone.layers), with_norm=True))

    def is_under(self, model: Any) -> bool:
        """Whether the bottom layers and embeddings of `model` have the trunk's values, in the trunk's dtype."""
        backbone = backbone_of(model)
        if len(backbone.layers) < self.depth:
            return False
        mine = [self._part.embed_tokens, *self._part.layers]
        theirs = [backbone.embed_tokens, *backbone.layers[: self.depth]]
        return all(map(_equal, mine, theirs))

    @torch.no_grad()
    def states(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Hidden states under the branches, [B, T, H], undefined on padding; computed for new rows only."""
        keys = [_key(tokens[mask]) for tokens, mask in zip(tokens_BT, mask_BT, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in self._states]
        found: dict[bytes, Tensor] = {key: self._states[key] for key in keys if key in self._states}
        if new:
            states_BTH = hidden_states(self._part, tokens_BT[new], mask_BT[new])
            found |= {keys[i]: states_BTH[n][mask_BT[i]] for n, i in enumerate(new)}
        self._remember(found)
        out = found[keys[0]].new_zeros(*mask_BT.shape, found[keys[0]].shape[1])
        out[mask_BT] = torch.cat([found[key] for key in keys])
        return out

    def remember(self, tokens: Sequence[int], states_TH: Tensor) -> None:
        """States of a row that were met elsewhere: decoding runs the same layers, `rlhf.rollout.generate.Tap`."""
        self._remember({_key(torch.tensor(tokens)): states_TH.to(self._part.embed_tokens.weight.dtype)})

    def states_of_packed(self, tokens_BS: Tensor, mask_B1SS: Tensor, positions_BS: Tensor) -> Tensor:
        """The same for rows that hold several answers (`reward_model.packing`); not remembered."""
        with torch.no_grad():
            return hidden_states(self._part, tokens_BS, mask_B1SS, positions_BS)

    def _remember(self, found: dict[bytes, Tensor]) -> None:
        for key, states in found.items():
            self._states[key] = states
            self._states.move_to_end(key)
        while len(self._states) > self._capacity:
            self._states.popitem(last=False)


class Branch(nn.Module):
    """Top layers and final norm over a trunk; stands where a backbone stands."""

    def __init__(self, trunk: Trunk, part: Any) -> None:
        super().__init__()
        self._trunk = (trunk,)  # in a tuple: a trunk is no part of this module's parameters
        self.part = part

    def forward(self, tokens_BT: Tensor, attention_mask: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """As `hidden_states`."""
        trunk = self._trunk[0]
        if positions_BT is None:
            states_BTH = trunk.states(tokens_BT, attention_mask)
        else:
            states_BTH = trunk.states_of_packed(tokens_BT, attention_mask, positions_BT)
        return hidden_states(self.part, tokens_BT, attention_mask, positions_BT, inputs_BTH=states_BTH)


def _key(tokens_T: Tensor) -> bytes:
    return tokens_T.cpu().numpy().tobytes()


def _part_of(backbone: Any, start: int, stop: int, *, with_norm: bool) -> Any:
    """The backbone with layers `start` to `stop` alone, over the same modules."""
    part = copy.copy(backbone)
    part._modules = dict(backbone._modules)
    part.layers = nn.ModuleList(list(backbone.layers)[start:stop])
    if not with_norm:
        part.norm = nn.Identity()
    return part


def _equal(mine: nn.Module, theirs: nn.Module) -> bool:
    ours, others = dict(mine.named_parameters()), dict(theirs.named_parameters())
    return ours.keys() == others.keys() and all(
        others[name] is p or torch.equal(p.to(others[name].dtype), others[name].to(p.device))
        for name, p in ours.items()
    )


@torch.no_grad()
def _check_split(backbone: Any, trunk: Trunk) -> None:
    """Tried on two ragged rows: some models scale what they are given as embeddings, or hand on more than states."""
    tokens_BT = ((torch.arange(8).view(2, 4) * 7919 + 11) % backbone.config.vocab_size).to(backbone.device)
    mask_BT = torch.tensor([[True] * 4, [True] * 2 + [False] * 2], device=backbone.device)
    top = Branch(trunk, _part_of(backbone, trunk.depth, len(backbone.layers), with_norm=True))
    with agreed_precision(backbone) as tolerance:
        whole = hidden_states(backbone, tokens_BT, mask_BT)[mask_BT].float()
        split = top(tokens_BT, mask_BT)[mask_BT].float()
    trunk._states.clear()
    if float((whole - split).norm()) > tolerance * float(whole.norm()):
        raise _uncuttable(backbone)


def _uncuttable(backbone: Any) -> ModelError:
    kind = backbone.config.model_type
    return ModelError(f"{kind} models cannot be cut into trunk and branches", fix="set sharing: separate")
