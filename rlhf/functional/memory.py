"""Bytes that training a decoder-only transformer needs: counted from shapes, as our code keeps them.

    weights that learn      4 per parameter: float32, whatever the products run in; frozen ones in the run's precision
    gradients, optimizer    4, and AdamW's two moments 8
    sharded over N ranks    stage 1 the optimizer, stage 2 gradients too, stage 3 weights too: Rajbhandari et al. 2020
                            (arXiv:1910.02054), section 5; DeepSpeed's optimizer also holds copies of both, 8
    activations             what autograd keeps of a layer for its backward, Korthikanti et al. 2022 (arXiv:2205.05198),
                            section 4.1, for the layers that we run: `kept_per_token`
    cache, logits           of decoding: keys and values of all rows; a few tables [rows, V]

Not counted: norms of one number per token, masks, token ids, and what a kernel takes for a moment.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from rlhf.functional.flops import Shape

MASTER, MOMENTS = 4, 8
"""Bytes per trained parameter of weight and gradient, and of AdamW's moments."""


@dataclass(frozen=True)
class Dimensions:
    """What decides the memory of a transformer whose layers are alike.

    Attributes:
        shape: its layers and matrices.
        hidden: width of the states between layers.
        heads: query heads.
        key_width: key heads x size of a head.
        mlp_width: units inside the MLP.
        layer_parameters: entries of one layer, norms and biases included.
        embedding: entries of the token embedding.
        outputs: entries of the head that are no embedding: 0 where the two are tied.
        further: what is neither layer nor embedding nor head: the final norm.
        vocabulary: outputs of the head.
    """

    shape: Shape
    hidden: int
    heads: int
    key_width: int
    mlp_width: int
    layer_parameters: int
    embedding: int
    outputs: int
    further: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.shape.layers * self.layer_parameters + self.embedding + self.outputs + self.further

    @property
    def products(self) -> int:
        """Entries of all matrices of the layers."""
        return self.shape.layers * self.shape.layer_weights

    def top(self, layers: int) -> int:
        """Parameters of so many top layers and the final norm."""
        return layers * self.layer_parameters + self.further

    def adapters(self, rank: int, layers: int) -> int:
        """Parameters of LoRA on all matrices of so many layers: rank x (inputs + outputs) each."""
        return layers * rank * sum(rows + columns for rows, columns in self.shape.matrices)


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    kv_cache: float = 0.0
    logits: float = 0.0

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(getattr(self, f.name) for f in fields(self))


def sharded(
    weights: float, gradients: float, optimizer: float, *, stage: int, ranks: int
) -> tuple[float, float, float]:
    """What each of `ranks` holds of the three under ZeRO `stage` 0 to 3 (arXiv:1910.02054, figure 1).

    Raises ValueError for another stage.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO has the stages 0 to 3, not {stage}")
    by_stage = (weights, 3), (gradients, 2), (optimizer, 1)
    shares = [held / ranks if stage >= first else held for held, first in by_stage]
    return shares[0], shares[1], shares[2]


def trained_state(parameters: float, *, stage: int, ranks: int) -> Memory:
    """Weights, gradients and optimizer of trained parameters on each rank.

    Without ZeRO, several ranks exchange gradients through buckets that hold them once more (PyTorch's DDP). With it,
    DeepSpeed's optimizer works on flat copies of its weights, even of float32 ones, and of their gradients.
    """
    buckets = MASTER if stage == 0 and ranks > 1 else 0
    copies = 2 * MASTER if stage else 0
    state = (MASTER * parameters, (MASTER + buckets) * parameters, (MOMENTS + copies) * parameters)
    return Memory(*sharded(*state, stage=stage, ranks=ranks))


@dataclass(frozen=True)
class Forward:
    """How a forward that is to be differentiated runs.

    Attributes:
        size: bytes per number of matrix products: 2 or 4.
        stream: bytes per number of the states between layers: 4 where float32 embeddings begin them.
        packed: real tokens in one matrix (`rlhf.models.packed_forward`), else transformers' own layers.
        trains_weights: False for adapters over frozen weights.
        rank: of the adapters; 0: none.
        recomputes: gradient checkpointing.
    """

    size: int
    stream: int
    packed: bool
    trains_weights: bool = True
    rank: int = 0
    recomputes: bool = False


def kept_per_token(dims: Dimensions, how: Forward) -> float:
    """Bytes per token that one layer keeps for its backward.

    With H the hidden width, E and K the widths of all query and key heads, F the MLP's, s the size of a number in
    products and r of one in the stream, the packed layers keep

        r H    into each of two norms            s H    what comes out of each
        s (2 E + 2 K) and 4 per head: queries, keys, values, the attention's output and logsumexp
        s 3 F  gate, up, and what goes into the last product
        s R    inside each of the adapters

    transformers' layers also keep each norm's input in float32 and what it multiplies with a trained weight, convert a
    norm's output anew for every product that reads it, and keep the activated gate; peft's adapters read float32, so
    that their inputs are converted in any case.
    """
    hidden, query, key, size = dims.hidden, dims.shape.query_width, dims.key_width, how.size
    attention = size * (2 * query + 2 * key) + 4 * dims.heads
    adapters = size * how.rank * len(dims.shape.matrices)
    if how.packed:
        return 2 * (how.stream + size) * hidden + attention + 3 * size * dims.mlp_width + adapters
    converted = size < MASTER and (how.rank > 0 or how.stream > size)
    norms = 2 * 4 * hidden + (2 * how.stream * hidden if how.trains_weights else 0)
    inputs = (5 if converted else 2) * size * hidden + (size * query if converted and how.rank else 0)
    return norms + inputs + attention + 4 * size * dims.mlp_width + adapters


def activations(dims: Dimensions, how: Forward, *, rows: int, width: int, layers: int) -> float:
    """Bytes that one forward of `rows` x `width` tokens leaves for its backward in the `layers` that have one.

    With gradient checkpointing a layer leaves its input; one layer at a time is made anew in the backward.
    """
    tokens, stream = rows * width, how.stream * dims.hidden
    layer = kept_per_token(dims, how) * tokens
    kept = layers * stream * tokens + layer if how.recomputes else layers * layer
    ends = 3 * stream * tokens  # into and out of the final norm, and in its place among the rows
    return kept + ends


def converted_weights(dims: Dimensions, how: Forward, *, layers: int) -> float:
    """Bytes of float32 matrices in the dtype of the products: autocast keeps them until the backward is done."""
    if not how.trains_weights or how.size == MASTER:
        return 0.0
    return how.size * layers * dims.shape.layer_weights


def working_set(dims: Dimensions, how: Forward, *, rows: int, width: int) -> float:
    """Bytes that the backward of the widest layer takes for itself.

    Attention's holds scores, their gradient and probabilities in float32; an MLP's the gradients of its inner states,
    and one matrix's gradient in both dtypes.
    """
    scores = 3 * 4 * dims.heads * rows * width * width if how.packed else 0
    largest = max((out * inner for out, inner in dims.shape.matrices), default=0)
    gradient = (how.size + MASTER) * largest if how.trains_weights else 0
    return max(scores, 4 * how.size * dims.mlp_width * rows * width + gradient)


def head_tile(dims: Dimensions, tile: tuple[int, int], *, actions: int, size: int) -> float:
    """Bytes of the logits that are looked at together, their exponentials and their gradient; and the head's weights
    in the dtype of the products, where they are converted."""
    looked_at = min(tile[0], actions) * min(tile[1], dims.vocabulary)
    return (size + 3 * 4) * looked_at


def kv_cache(dims: Dimensions, *, rows: int, width: int, size: int) -> float:
    """Bytes of the keys and values of `rows` answers of up to `width` tokens, prompt included."""
    return 2.0 * dims.shape.layers * dims.key_width * rows * width * size


def sampling_logits(dims: Dimensions, *, rows: int, size: int) -> float:
    """Bytes of the logits of the next token, their log-probabilities and probabilities in float32, and a product of
    the two."""
    return float(rows * dims.vocabulary * (size + 3 * 4))
