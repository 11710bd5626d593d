"""Define the dataclasses about one run that steps pass to one another: Model, Problem, Plan, Proof.

Those about machines and backends are in facts.py. All are frozen and hold plain values: they import
no torch, read no file and have no side effects.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from attnimg.facts import Backend, DType, Feature, LayerKind, LayerOp, RequestedBy


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGroup:
    """Layers whose attention has the same shape.

    Attributes:
        count: how many layers.
        heads: query heads, H.
        kv_heads: key/value heads, G; H is a multiple of it.
        head_dim_qk: size of a query and of a key.
        head_dim_v: size of a value; differs from head_dim_qk in MLA models.
        window: size of the sliding window in tokens; None for none.
        softcap: tanh cap on the logits; None for none.
        sinks: whether each head has a learned sink logit in the softmax.
    """

    count: int
    heads: int
    kv_heads: int
    head_dim_qk: int
    head_dim_v: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def kind(self) -> LayerKind:
        """Return its name in `attn_backends`."""
        return "full" if self.window is None else "sliding"

    @property
    def features(self) -> frozenset[str]:
        """Return the features that its attention needs: "window", "softcap", "sinks"."""
        used = {"window": self.window is not None, "softcap": self.softcap, "sinks": self.sinks}
        return frozenset(name for name, is_used in used.items() if is_used)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What a model's config.json says about its attention.

    Attributes:
        type: transformers' model_type, "llama".
        layers: groups of equal attention layers; empty when they could not be read.
        other_layers: layers that mix tokens without softmax attention (linear attention, state
            space, convolution): (kind as the config names it, count).
        parameters: rough count of weights, None when not known.
        unknown: sentences about what the config does not say.
        brings_code: whether its repository has model code, which trust_remote_code runs.
    """

    type: str
    layers: tuple[LayerGroup, ...]
    other_layers: tuple[tuple[str, int], ...] = ()
    parameters: int | None = None
    unknown: tuple[str, ...] = ()
    brings_code: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelClass:
    """The attention implementations that a transformers model class does not support.

    Attributes:
        name: "LlamaForCausalLM".
        lacks: which of "sdpa", "flash" and "flex" it declares unsupported; also "others" where it
            has its own attention code, which does not call registered functions.
        flash_names: the flash implementations that it supports: transformers replaces any other
            name with "flash" in it by the first of them. Empty when it replaces none.
    """

    name: str
    lacks: frozenset[str] = frozenset()
    flash_names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What attention has to compute in one run.

    The fields that a proof depends on have no default, so that callers can't leave them out.

    Attributes:
        model: the model's attention layers; None when its config.json is not available.
        dtype: the precision of q, k and v.
        packing: whether rows hold several documents that must not see each other.
        dropout: attention dropout while training.
        compiled: whether torch.compile is on.
        checkpointing: whether activations are recomputed in the backward pass.
        sequence_len: tokens of the longest row; None when not known.
        rows: rows of the largest batch.
        autocast: whether the forward pass runs under torch.autocast.
        model_class: what its transformers class does not support; None when it supports everything
            or is not known.
        training: whether a backward pass is needed.
        forward_only_ok: whether a kernel without a backward pass may be used for training.
        trusted: whether the user allows code from the hub to run (trust_remote_code).
        known_bad: rules that list where backends are known to fail.
    """

    model: Model | None
    dtype: DType
    packing: bool
    dropout: float
    compiled: bool
    checkpointing: bool
    sequence_len: int | None
    rows: int
    autocast: bool
    model_class: ModelClass | None = None
    training: bool = True
    forward_only_ok: bool = False
    trusted: bool = False
    known_bad: tuple[KnownBad, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """How a run calls its model: the proof, the isolation check and the trainer use the same value.

    It is built by `attnimg.context.build_context`. No field has a default: with a field left out,
    the proof could test other calls than the training run makes.

    Attributes:
        dtype: the precision of matrix multiplications, and therefore of q, k and v.
        autocast: the dtype that torch.autocast casts to; None where it is off.
        packing: whether rows hold several documents.
        padding_free: whether the rows of a batch are flattened to (1, T) with cu_seqlens, the input
            of varlen kernels; False for (B, S), where a mask isolates documents.
        rows: rows of the largest batch.
        sequence_len: tokens of the longest row; None when not known.
        compiled: whether torch.compile is on.
        checkpointing: whether activations are recomputed in the backward pass.
        seq_idx: whether batches contain seq_idx, the number of each token's document, which the
            short convolutions and the scans of linear-attention layers need.
    """

    dtype: DType
    autocast: DType | None
    packing: bool
    padding_free: bool
    rows: int
    sequence_len: int | None
    compiled: bool
    checkpointing: bool
    seq_idx: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """Why a backend does not fit: an error code, and a sentence with what was found and needed."""

    code: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether one candidate fits, and the reasons if it does not.

    Attributes:
        backend: the candidate.
        rank: its position among the candidates; 1 is tried first.
        reasons: all reasons against it; empty when it fits.
        kernel: the kernel that would run, "flash-attn 2.8.3"; None when it does not fit.
    """

    backend: Backend
    rank: int
    reasons: tuple[Reason, ...]
    kernel: str | None = None

    @property
    def fits(self) -> bool:
        """Return whether there is no reason against it."""
        return not self.reasons


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupChoice:
    """The backend of one group of equal layers, where groups run different backends."""

    layers: LayerGroup
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The chosen backend, and the verdicts on all candidates.

    Attributes:
        requested: the name in the config; "auto" when there was none.
        chosen: the verdict on the chosen backend; None when no backend may be used.
        reason: why it was chosen, in one sentence.
        verdicts: every candidate, by rank.
        remedy: what to change when nothing was chosen.
        strict: whether no other backend may replace the requested one.
        groups: the backend of each group of layers, where groups run different backends; empty
            where every layer runs `chosen`.
        requested_by: what named the backend: the config (or the API's argument), the environment
            variable, or the config key for kinds of layers.
    """

    requested: str
    chosen: Verdict | None
    reason: str
    verdicts: tuple[Verdict, ...]
    remedy: str = ""
    strict: bool = False
    groups: tuple[GroupChoice, ...] = ()
    requested_by: RequestedBy = "config"


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """The properties of one kind of attention call of a run, on which a backend is verified.

    No field has a default: a proof for other properties than the run's would be worthless.

    Attributes:
        heads: query heads, H.
        kv_heads: key/value heads, G; H is a multiple of it.
        head_dim_qk: size of a query and of a key.
        head_dim_v: size of a value.
        window: size of the sliding window in tokens; None for none.
        softcap: tanh cap on the logits; None for none.
        sinks: whether each head has a learned sink logit in the softmax.
        dtype: the precision of q, k and v.
        packing: whether rows hold several documents.
        dropout: attention dropout while training.
        sequence_len: tokens of the longest row of the run.
        dense: whether the run has rows of one document, for which the dense entry point is called,
            without document boundaries.
        deterministic: whether gradients must be bitwise reproducible.
        rows: rows of a batch, which a packed run may flatten into one.
        autocast: whether calls are made under torch.autocast, which also changes the precision of
            torch operations inside a kernel.
        every_length: whether to test documents of every length, as for an unreviewed kernel.
    """

    heads: int
    kv_heads: int
    head_dim_qk: int
    head_dim_v: int
    window: int | None
    softcap: float | None
    sinks: bool
    dtype: DType
    packing: bool
    dropout: float
    sequence_len: int
    dense: bool
    deterministic: bool
    rows: int
    autocast: bool
    every_length: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """The error of a backend against the reference, in the case nearest to its bound.

    Attributes:
        quantity: "out", or the gradient: "dq", "dk", "dv", "dsinks".
        error: largest difference from the reference; for a backend that quantizes, the
            signal-to-noise ratio in decibels.
        allowed: the bound on `error`.
        case: the test case.
    """

    quantity: str
    error: float
    allowed: float
    case: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """The result of comparing a backend with the reference.

    Attributes:
        backend: its name.
        reasons: all faults that were found; empty when it passed.
        figures: one for each quantity.
        cases: the number of test cases.
        longest: tokens of the longest document among them.
        seconds: the duration of the proof.
        cached: whether it was read from the disk instead of run.
        note: a remark for the user, such as a limit on the length; "" for none.
    """

    backend: str
    reasons: tuple[Reason, ...]
    figures: tuple[Figure, ...] = ()
    cases: int = 0
    longest: int = 0
    seconds: float = 0.0
    cached: bool = False
    note: str = ""

    @property
    def passed(self) -> bool:
        """Return whether no fault was found."""
        return not self.reasons


@dataclass(frozen=True, kw_only=True, slots=True)
class HubLayer:
    """A layer of a hub kernel that replaces layers of a run's model.

    Attributes:
        name: transformers' name for the replaced layers, "RMSNorm".
        op: what they compute.
        repo: the kernel's org/name.
        layer: the class in the kernel, "LigerRMSNorm".
        revision: the kernel's commit; None where LOCAL_KERNELS names its folder.
        folder: of its files.
        files: the hash of its files.
        trusted: whether the user set trust_remote_code.
    """

    name: str
    op: LayerOp
    repo: str
    layer: str
    revision: str | None
    folder: str
    files: str
    trusted: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class LayersTask:
    """The layers that Liger or a hub kernel replaces in a run's model, to be proven.

    Attributes:
        op: what they compute.
        model_class: module:name of the model's class, in transformers.
        config_class: module:name of its config's class.
        config: the config as JSON.
        dtype: the precision of the run.
        autocast: whether the forward pass runs under torch.autocast.
        tokens: tokens of a batch.
        hub: the layer of a hub kernel; None for Liger's.
    """

    op: LayerOp
    model_class: str
    config_class: str
    config: str
    dtype: DType
    autocast: bool
    tokens: int
    hub: HubLayer | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerTask:
    """An optimizer with quantized states, to be proven.

    Attributes:
        optimizer: the config's value.
        dtype: of the trained weights.
        weight_decay, beta1, beta2, epsilon: of the run.
    """

    optimizer: str
    dtype: DType
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float


@dataclass(frozen=True, kw_only=True, slots=True)
class QatTask:
    """The rounding of a later quantization that training simulates, to be proven.

    Attributes:
        activation_dtype: of the inputs of linear layers, "int8"; None where they are not rounded.
        group_size: numbers of a weight, which has 4 bits, that share a scale.
        embeddings: whether embeddings are rounded too.
        dtype: the precision of the run.
    """

    activation_dtype: Literal["int8"] | None
    group_size: int
    embeddings: bool
    dtype: DType


# What is proven beside attention.
ProvenTask = LayersTask | OptimizerTask | QatTask


@dataclass(frozen=True, kw_only=True, slots=True)
class CallCheck:
    """The comparison of one attention call of a training step with the reference.

    Attributes:
        backend: the one that computed the call.
        layer: the layer's number in the model.
        figures: one for each compared quantity; `case` names the row, tokens and heads.
        faults: the rules that the call broke; empty when it is correct.
        close_to_bound: whether all errors are so close to their bounds that rounding may explain
            them.
        repeated: whether the repeated call was wrong too; None without faults.
        skipped: why the call was not compared; "" where it was.
    """

    backend: str
    layer: int
    figures: tuple[Figure, ...] = ()
    faults: tuple[Reason, ...] = ()
    close_to_bound: bool = False
    repeated: bool | None = None
    skipped: str = ""

    @property
    def confirmed(self) -> bool:
        """Return whether the repeated call was wrong too, by more than rounding can explain."""
        return bool(self.repeated) and not self.close_to_bound

    @property
    def margin(self) -> float:
        """Return the largest ratio of an error to its bound."""
        return max((figure.error / figure.allowed for figure in self.figures), default=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownBad:
    """A rule of known_bad.toml: where backends are known to fail. All conditions must match.

    Attributes:
        id: "kb07".
        backends: the backends that it is about.
        effect: what happens, in a few words.
        link: the report.
        date: the day the report was read.
        expires: the day from which the rule is ignored; None for never.
        status: "reported", or "seen" once attnimg's authors have reproduced it.
        packages: distribution -> versions, "<4.0.0b30,>=4.0.0b26"; all of them must match.
        archs: "sm_86" and the like; empty for all.
        dtypes: empty for all.
        head_dim_qk: lowest and highest; None for all.
        head_dim_v: lowest and highest; None for all.
        heads_differ: whether there are fewer key heads than query heads; None for either.
        features: those that must be in use (true) or must not be (false).
        row_tokens_min: lowest number of tokens in a row; rows that a packed batch flattens count
            as one. None for any.
    """

    id: str
    backends: frozenset[str]
    effect: str
    link: str
    date: datetime.date
    expires: datetime.date | None = None
    status: Literal["reported", "seen"] = "reported"
    packages: Mapping[str, str] = field(default_factory=dict, hash=False)
    archs: frozenset[str] = frozenset()
    dtypes: frozenset[DType] = frozenset()
    head_dim_qk: tuple[int, int] | None = None
    head_dim_v: tuple[int, int] | None = None
    heads_differ: bool | None = None
    features: Mapping[Feature, bool] = field(default_factory=dict, hash=False)
    row_tokens_min: int | None = None
