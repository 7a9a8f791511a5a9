"""One base model in several roles: a frozen trunk under a branch of top layers per role (hydra), or equal tensors once.

    trunk = Trunk.of(lm, top=6, remembered_rows=64)
    policy_backbone = trunk.branch(lm)          # the policy's own top layers over the common trunk
    trunk.grow(reference)                       # beside them the trunk goes on with the reference's, which are frozen
    critic_backbone = trunk.branch(classifier)  # begins where it learns or is no longer equal; below it is given up

The trunk's states of a row never change, so they are remembered from sampling or computed once: scoring with
reference, critic and reward model, and every epoch of the update, go through top layers only.
"""

from __future__ import annotations

import copy
import itertools
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
            if trunk.common_layers(scalar.classifier) >= trunk.depth:
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
    """The frozen layers of a language model, and their states of the rows that were read last.

    Attributes:
        depth: layers below the policy's branch; other branches may begin higher, none lower.
    """

    def __init__(self, backbone: Any, depth: int, remembered_rows: int) -> None:
        self._backbone, self._frozen = backbone, depth
        self.depth = depth
        self._capacity = remembered_rows
        self._levels: dict[int, OrderedDict[bytes, Tensor]] = {depth: OrderedDict()}

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
        trunk = cls(backbone, depth, remembered_rows)
        _check_split(backbone, trunk)
        return trunk

    def grow(self, reference: Any) -> None:
        """Beside the policy's branch go on with the layers of a frozen model, for other branches to begin there."""
        self._backbone, self._frozen = backbone_of(reference), len(layers_of(backbone_of(reference)))

    def branch(self, model: Any) -> Branch:
        """The backbone of `model` over this trunk: up to its first layer that is trained, or another than the trunk's,
        its layers become the trunk's.

        Raises:
            ModelError: it has fewer layers in common with the trunk than the policy.
        """
        backbone = backbone_of(model)
        begin = min(self.common_layers(model), len(layers_of(backbone)) - 1)  # something to compute
        if begin < self.depth:
            raise ModelError(
                f"the lowest {self.depth} layers of {model.config._name_or_path} are not those of the policy",
                fix="train it from the same model with tuning.layers, or set sharing: separate",
            )
        backbone.embed_tokens = self._backbone.embed_tokens
        for i in range(begin):
            backbone.layers[i] = self._backbone.layers[i]
        self._levels.setdefault(begin, OrderedDict())
        return Branch(self, begin, _part_of(backbone, begin, len(backbone.layers), with_norm=True))

    def common_layers(self, model: Any) -> int:
        """How many of its bottom layers are not trained and have the trunk's values, in the trunk's dtype; -1 where
        the embeddings are others."""
        backbone = backbone_of(model)
        pairs = zip(self._backbone.layers[: self._frozen], backbone.layers, strict=False)
        if not _equal(self._backbone.embed_tokens, backbone.embed_tokens):
            return -1
        return sum(1 for _ in itertools.takewhile(lambda pair: _equal(*pair), pairs))

    @torch.no_grad()
    def states(self, tokens_BT: Tensor, mask_BT: Tensor, level: int | None = None) -> Tensor:
        """Hidden states that go into layer `level`, [B, T, H], undefined on padding; computed for new rows only.

        Args:
            level: one where a branch begins; default: the policy's.
        """
        level = self.depth if level is None else level
        remembered = self._levels[level]
        keys = [_key(tokens[mask]) for tokens, mask in zip(tokens_BT, mask_BT, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in remembered]
        found: dict[bytes, Tensor] = {key: remembered[key] for key in keys if key in remembered}
        if new:
            tokens_NT, mask_NT = tokens_BT[new], mask_BT[new]
            below = max((lower for lower in self._levels if lower < level), default=None)
            inputs_NTH = None if below is None else self.states(tokens_NT, mask_NT, below)
            states_NTH = hidden_states(self._part(below or 0, level), tokens_NT, mask_NT, inputs_BTH=inputs_NTH)
            found |= {keys[i]: states_NTH[n][mask_BT[i]] for n, i in enumerate(new)}
        self._remember(level, found)
        out = found[keys[0]].new_zeros(*mask_BT.shape, found[keys[0]].shape[1])
        out[mask_BT] = torch.cat([found[key] for key in keys])
        return out

    def remember(self, tokens: Sequence[int], states_TH: Tensor) -> None:
        """States under the policy's branch that were met elsewhere: decoding runs the same layers
        (`rlhf.rollout.generate.Tap`)."""
        states_TH = states_TH.to(self._backbone.embed_tokens.weight.dtype)
        self._remember(self.depth, {_key(torch.tensor(tokens)): states_TH})

    def states_of_packed(self, tokens_BS: Tensor, mask_B1SS: Tensor, positions_BS: Tensor, level: int) -> Tensor:
        """The same for rows that hold several answers (`reward_model.packing`); not remembered."""
        with torch.no_grad():
            return hidden_states(self._part(0, level), tokens_BS, mask_B1SS, positions_BS)

    def _part(self, start: int, stop: int) -> Any:
        return _part_of(self._backbone, start, stop, with_norm=False)

    def _remember(self, level: int, found: dict[bytes, Tensor]) -> None:
        states = self._levels[level]
        for key, states_TH in found.items():
            states[key] = states_TH
            states.move_to_end(key)
        while len(states) > self._capacity:
            states.popitem(last=False)


class Branch(nn.Module):
    """Top layers, from number `level` on, and final norm over a trunk; stands where a backbone stands."""

    def __init__(self, trunk: Trunk, level: int, part: Any) -> None:
        super().__init__()
        self._trunk = (trunk,)  # in a tuple: a trunk is no part of this module's parameters
        self.level = level
        self.part = part

    def forward(self, tokens_BT: Tensor, attention_mask: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """As `hidden_states`."""
        trunk = self._trunk[0]
        if positions_BT is None:
            states_BTH = trunk.states(tokens_BT, attention_mask, self.level)
        else:
            states_BTH = trunk.states_of_packed(tokens_BT, attention_mask, positions_BT, self.level)
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
    """Not trained, and of the same values."""
    ours, others = dict(mine.named_parameters()), dict(theirs.named_parameters())
    return ours.keys() == others.keys() and all(
        others[name] is p
        or (not others[name].requires_grad and torch.equal(p.to(others[name].dtype), others[name].to(p.device)))
        for name, p in ours.items()
    )


@torch.no_grad()
def _check_split(backbone: Any, trunk: Trunk) -> None:
    """Tried on two ragged rows: some models scale what they are given as embeddings, or hand on more than states."""
    tokens_BT = ((torch.arange(8).view(2, 4) * 7919 + 11) % backbone.config.vocab_size).to(backbone.device)
    mask_BT = torch.tensor([[True] * 4, [True] * 2 + [False] * 2], device=backbone.device)
    top = Branch(trunk, trunk.depth, _part_of(backbone, trunk.depth, len(backbone.layers), with_norm=True))
    with agreed_precision(backbone) as tolerance:
        whole = hidden_states(backbone, tokens_BT, mask_BT)[mask_BT].float()
        split = top(tokens_BT, mask_BT)[mask_BT].float()
    trunk._levels[trunk.depth].clear()
    if float((whole - split).norm()) > tolerance * float(whole.norm()):
        raise _uncuttable(backbone)


def _uncuttable(backbone: Any) -> ModelError:
    kind = backbone.config.model_type
    return ModelError(f"{kind} models cannot be cut into trunk and branches", fix="set sharing: separate")
