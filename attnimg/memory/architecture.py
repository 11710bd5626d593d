"""Read the sizes of a decoder's layers from its config.json: weights by name and shape.

Only model types whose blocks are described in _BLOCKS are read. tests/unit/memory compares the
number of weights of each with transformers' own class.
Source: the modeling files of transformers 5.22.2 (2026-11-27).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attnimg.run_facts import LayerGroup, Model
from attnimg.selection.attention_shapes import language_model
from attnimg.selection.model_config import LANGUAGE_PARTS

# Parts of a config.json that describe encoders beside the language model.
_TOWERS = ("vision_config", "audio_config", "vq_config", "speech_config")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """How the layers of a model type differ from llama's.

    Attributes:
        norms: number of norms over hidden_size in each layer.
        qk_norm: whether q and k have norms, over each head or over all heads; None for none.
        qkv_bias: whether q, k and v always have a bias; otherwise attention_bias decides.
        fused: whether q, k and v are one layer, and gate and up one.
        experts: whether the feed-forward block has experts.
    """

    norms: int = 2
    qk_norm: Literal["head", "all"] | None = None
    qkv_bias: bool = False
    fused: bool = False
    experts: bool = False


_BLOCKS = {
    "llama": _Block(),
    "mistral": _Block(),
    "ministral": _Block(),
    "ministral3": _Block(),
    "ernie4_5": _Block(),
    "smollm3": _Block(),
    "granite": _Block(),
    "gemma": _Block(),
    "qwen2": _Block(qkv_bias=True),
    "qwen3": _Block(qk_norm="head"),
    "exaone4": _Block(qk_norm="head"),
    "hunyuan_v1_dense": _Block(qk_norm="head"),
    "gemma2": _Block(norms=4),
    "gemma3_text": _Block(norms=4, qk_norm="head"),
    "olmo2": _Block(qk_norm="all"),
    "olmo3": _Block(qk_norm="all"),
    "phi3": _Block(fused=True),
    "mixtral": _Block(experts=True),
    "olmoe": _Block(qk_norm="all", experts=True),
    "qwen3_moe": _Block(qk_norm="head", experts=True),
}
TYPES = tuple(_BLOCKS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A linear layer of a block.

    Attributes:
        name: its name within a decoder layer, "self_attn.q_proj".
        inputs: size of its input.
        outputs: size of its output.
        bias: whether it has a bias.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Return the number of weights, without the bias."""
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The experts of a layer: two fused weights, and the router.

    Attributes:
        count: number of experts.
        used: experts per token.
        size: their intermediate size.
    """

    count: int
    used: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """A group of decoder layers with the same sizes.

    Attributes:
        count: how many layers.
        attention: heads and head sizes.
        qkv: the linear layers before the attention.
        out: the linear layer after the attention.
        gate_up: the linear layers before the activation function; empty for experts.
        down: the linear layer after the activation function; None for experts.
        size: intermediate size; that of an expert for experts.
        experts: the experts; None for a dense layer.
        norms: number of norms over hidden_size.
        qk_norm: number of weights in the norms of q and k; 0 without norms.
    """

    count: int
    attention: LayerGroup
    qkv: tuple[Linear, ...]
    out: Linear
    gate_up: tuple[Linear, ...]
    down: Linear | None
    size: int
    experts: Experts | None
    norms: int
    qk_norm: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Return its linear layers."""
        return (*self.qkv, self.out, *self.gate_up, *((self.down,) if self.down else ()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The sizes of a decoder.

    Attributes:
        type: its model_type.
        hidden: size of the hidden states.
        vocabulary: rows of the embeddings.
        tied: whether the output layer shares its weight with the input embeddings.
        layers: groups of layers with the same sizes.
    """

    type: str
    hidden: int
    vocabulary: int
    tied: bool
    layers: tuple[LayerShape, ...]

    @property
    def linear_weights(self) -> int:
        """Return the weights of the layers' linear layers."""
        return sum(
            layer.count * linear.weights for layer in self.layers for linear in layer.linears
        )

    @property
    def expert_weights(self) -> int:
        """Return the weights of the experts, without routers."""
        return sum(
            layer.count * layer.experts.count * 3 * layer.experts.size * self.hidden
            for layer in self.layers
            if layer.experts
        )

    @property
    def small_weights(self) -> int:
        """Return the weights of norms, biases and routers."""
        total = self.hidden  # the last norm
        for layer in self.layers:
            router = layer.experts.count * self.hidden if layer.experts else 0
            biases = sum(linear.outputs for linear in layer.linears if linear.bias)
            total += layer.count * (layer.norms * self.hidden + layer.qk_norm + router + biases)
        return total

    @property
    def embeddings(self) -> int:
        """Return the weights of one embedding."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Return the number of weights; tied ones count once."""
        embeddings = self.embeddings * (1 if self.tied else 2)
        return embeddings + self.linear_weights + self.expert_weights + self.small_weights


# The number of weights in the files may differ by this share: older checkpoints contain buffers.
_COUNT_ERROR = 0.001


def read_architecture(
    raw: Mapping[str, Any], model: Model | None, *, stored_weights: int | None = None
) -> Architecture | str:
    """Return the sizes of a decoder's layers, or why they are not known.

    Args:
        raw: the model's config.json.
        model: its attention layers, as `read_model` returns them; None where they are not known.
        stored_weights: number of weights in the files of the model; None where they are not known.

    Raises:
        AttnimgError: a field has a wrong type (code "bad-model").
    """
    if model is None:
        return "the model's config.json is not on this machine"
    if raw.get("quantization_config") or raw.get("compression_config"):
        return "the checkpoint is quantized, in a format of its own"
    found = _read(raw, model)
    if isinstance(found, str) or not stored_weights:
        return found
    counts = (found.parameters, found.parameters + (found.embeddings if found.tied else 0))
    if any(abs(stored_weights - count) <= _COUNT_ERROR * count for count in counts):
        return found
    return f"its files have {stored_weights:,} weights, config.json describes {counts[0]:,}"


def _read(raw: Mapping[str, Any], model: Model) -> Architecture | str:
    """Return the sizes of the layers that config.json describes, or why they are not known.

    Raises:
        AttnimgError: a field has a wrong type (code "bad-model").
    """
    type_, _, fields = language_model(raw, "config.json")
    part = next((raw[name] for name in LANGUAGE_PARTS if isinstance(raw.get(name), dict)), raw)
    names = (str(part.get("model_type")), f"{part.get('model_type')}_text", f"{type_}_text")
    block = next((_BLOCKS[name] for name in names if name in _BLOCKS), None)
    if block is None or model.other_layers or not model.layers:
        return f"the layers of model_type {type_} are not described in attnimg"
    if any(isinstance(raw.get(name), dict) for name in _TOWERS):
        return "the model has parts beside its language model, whose sizes are not known"
    hidden, vocabulary = fields.whole("hidden_size"), fields.whole("vocab_size")
    size = fields.whole("intermediate_size")
    if hidden is None or vocabulary is None or size is None:
        return "config.json has no hidden_size, vocab_size or intermediate_size"
    experts = None
    if block.experts:
        count, used = fields.whole("num_experts"), fields.whole("num_experts_per_tok")
        sparse_only = not fields.config.get("mlp_only_layers")
        if (
            count is None
            or used is None
            or not sparse_only
            or part.get("decoder_sparse_step", 1) != 1
        ):
            return "which layers have experts, or how many a token has, is not known"
        size = fields.whole("moe_intermediate_size") or size
        experts = Experts(count=count, used=used, size=size)
    bias = fields.flag("attention_bias")
    return Architecture(
        type=type_,
        hidden=hidden,
        vocabulary=vocabulary,
        tied=fields.flag("tie_word_embeddings"),
        layers=tuple(
            _layer(group, block, hidden=hidden, size=size, experts=experts,
                   bias=bias, mlp_bias=fields.flag("mlp_bias"))
            for group in model.layers
        ),
    )  # fmt: skip


def _layer(
    group: LayerGroup, block: _Block, *, hidden: int, size: int, experts: Experts | None,
    bias: bool, mlp_bias: bool,
) -> LayerShape:  # fmt: skip
    q = group.heads * group.head_dim_qk
    k, v = group.kv_heads * group.head_dim_qk, group.kv_heads * group.head_dim_v
    with_bias = bias or block.qkv_bias
    sizes = {"qkv_proj": q + k + v} if block.fused else {"q_proj": q, "k_proj": k, "v_proj": v}
    wide = {"gate_up_proj": 2 * size} if block.fused else {"gate_proj": size, "up_proj": size}
    qk_norm = {None: 0, "head": 2 * group.head_dim_qk, "all": q + k}[block.qk_norm]
    return LayerShape(
        count=group.count,
        attention=group,
        qkv=tuple(
            Linear(name=f"self_attn.{name}", inputs=hidden, outputs=outputs, bias=with_bias)
            for name, outputs in sizes.items()
        ),
        out=Linear(
            name="self_attn.o_proj",
            inputs=group.heads * group.head_dim_v,
            outputs=hidden,
            bias=bias,
        ),
        gate_up=() if experts else tuple(
            Linear(name=f"mlp.{name}", inputs=hidden, outputs=outputs, bias=mlp_bias)
            for name, outputs in wide.items()
        ),
        down=None if experts
        else Linear(name="mlp.down_proj", inputs=size, outputs=hidden, bias=mlp_bias),
        size=size,
        experts=experts,
        norms=block.norms,
        qk_norm=qk_norm,
    )  # fmt: skip
