"""Define the dataclasses that steps pass to one another, such as Machine, Model and Plan.

All are frozen and hold plain values: they import no torch, read no file and have no side effects.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

DType = Literal["float32", "float16", "bfloat16"]
Vendor = Literal["nvidia", "amd", "cpu"]
Packing = Literal["native", "mask", "none"]
# What a backend gets as attention_mask. "sdpa": None, or (B, 1, T, S), True where a query attends
# to a key. "eager": the same as numbers that are added to the scores. "flash": None, or (B, S),
# False on padding. "flex": flex_attention's block mask.
MaskKind = Literal["sdpa", "eager", "flash", "flex"]
# Which keys a query attends to: all earlier ones, or LongLoRA's groups (s2). The causal mask,
# packing and sliding windows limit them further.
Pattern = Literal["full", "shifted"]
# What a rule on known-bad backends can depend on.
Feature = Literal["packing", "window", "softcap", "sinks", "dropout", "training", "compiled"]
# What may name a backend; see Plan.
RequestedBy = Literal["config", "ATTNIMG_BACKEND", "attn_backends"]
# The layers that `attn_backends` names: those with a sliding window, and all others.
LayerKind = Literal["sliding", "full"]
# What Liger and hub kernels replace in a model; the names are those of axolotl's keys, without
# "liger_". Liger has no rms_norm_gated.
LayerOp = Literal["rope", "rms_norm", "glu_activation", "layer_norm", "rms_norm_gated"]
# transformers' attention interface: (module, query, key, value, attention_mask, **arguments) ->
# (output, weights). The types are Any because this file does not import torch.
AttentionFunction = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arch:
    """The architecture of a GPU or CPU, which decides what machine code it runs.

    Attributes:
        name: "sm_90", "gfx942" or "cpu", as in JSON output.
        vendor: the vendor of the device.
        capability: NVIDIA's compute capability, (9, 0); None elsewhere.
    """

    name: str
    vendor: Vendor
    capability: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalKernel:
    """A folder that LOCAL_KERNELS names in place of a hub kernel.

    Attributes:
        repo: the hub name that it replaces, "kernels-community/flash-attn2".
        path: the folder, as the user wrote it.
        vendor: the vendor of the devices that it was built for, from its metadata.
        version: the version in its metadata, for messages.
        exports: top-level functions; None when they could not be read without importing it.
        varlen_takes: arguments of its flash_attn_varlen_func; None when they could not be read.
    """

    repo: str
    path: str
    vendor: Vendor
    version: str
    exports: frozenset[str] | None
    varlen_takes: frozenset[str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The machine a plan is made for: this one, or one named with --on.

    Attributes:
        arch: the architecture of its first device; "cpu" without a GPU.
        gpu: the GPU's name, "NVIDIA H100 80GB HBM3"; "cpu" without one.
        memory_bytes: of the first device; None when not known.
        driver: the GPU driver's version; None without one.
        packages: distribution name -> version of what is installed. None: not this machine, so
            every package that fits the GPU is assumed.
        torch: torch's version, None when absent or not given.
        local_kernels: the folders that LOCAL_KERNELS names.
        other_archs: architectures of further devices where they differ from the first one's.
        shadowed: distributions whose files another one has overwritten.
        driver_problem: the error message of the GPU driver; None when it worked.
        variables: environment variables that are set and select kernels of a package.
    """

    arch: Arch
    gpu: str
    memory_bytes: int | None = None
    driver: str | None = None
    packages: Mapping[str, str] | None = None
    torch: str | None = None
    local_kernels: tuple[LocalKernel, ...] = ()
    other_archs: tuple[str, ...] = ()
    driver_problem: str | None = None
    shadowed: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


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
class Finding:
    """An error or a warning about one config key, as `check` prints it."""

    code: str
    key: str | None
    what: str
    why: str = ""
    do: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadDims:
    """Head sizes that a kernel supports; a layer fits when one of a backend's rules allows it.

    Attributes:
        majors: major compute capabilities that the rule is for; empty for every machine.
        qk: lowest and highest head_dim of q and k.
        v: lowest and highest head_dim of v.
        multiple: the head_dim of q and k must be a multiple of it.
        multiple_v: the head_dim of v must be a multiple of it, where v is not padded to the
            head_dim of q and k.
        equal: whether v must have the same head_dim as q and k.
        ungrouped: whether the number of key heads must equal that of query heads.
        without: features that the kernel does not support at these sizes, such as "window".
    """

    majors: frozenset[int] = frozenset()
    qk: tuple[int, int] = (1, 1 << 16)
    v: tuple[int, int] = (1, 1 << 16)
    multiple: int = 1
    multiple_v: int = 1
    equal: bool = False
    ungrouped: bool = False
    without: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """The requirements of a backend on the machine and on the run.

    Attributes:
        vendors: the vendors of the devices that it runs on.
        capability_min: lowest NVIDIA compute capability; None for any.
        capability_max: highest one; None for any.
        capabilities: the exact list, where it is not a range; empty where it is.
        gfx: AMD architectures it runs on; empty for all of them.
        arch_code: the error code when the architecture does not fit.
        arch_text: the architectures it needs, for messages.
        dtypes: precisions of q, k and v.
        head_dims: rules on head sizes; empty for any size.
        features: which of "window", "softcap", "sinks", "dropout" it supports.
        features_missing: major compute capability, AMD architecture or "cpu" -> features that it
            does not support there.
        exclusive: features that it can't combine with one another; empty for none.
        dtypes_missing: major compute capability -> precisions that it does not support there.
        backward: vendors on whose devices it has a backward pass.
        backward_code: the error code when it has none.
        packages: (distribution, lowest version or None, error code when absent or too old).
        torch_min: lowest torch version, with the error code when it is older.
        model_types: the only transformers model types it supports; empty for all.
        model_code: the error code for another model type.
        packed_only: whether it is used for packed rows only.
    """

    vendors: frozenset[Vendor] = frozenset({"nvidia", "amd", "cpu"})
    capability_min: tuple[int, int] | None = None
    capability_max: tuple[int, int] | None = None
    capabilities: frozenset[tuple[int, int]] = frozenset()
    gfx: frozenset[str] = frozenset()
    arch_code: str = "arch-mismatch"
    arch_text: str = "any device"
    dtypes: frozenset[DType] = frozenset({"float32", "float16", "bfloat16"})
    head_dims: tuple[HeadDims, ...] = ()
    features: frozenset[str] = frozenset({"window", "softcap", "sinks", "dropout"})
    features_missing: Mapping[int | str, frozenset[str]] = field(default_factory=dict)
    exclusive: frozenset[str] = frozenset()
    dtypes_missing: Mapping[int, frozenset[DType]] = field(default_factory=dict)
    backward: frozenset[Vendor] = frozenset({"nvidia", "amd", "cpu"})
    backward_code: str = "no-backward"
    packages: tuple[tuple[str, str | None, str], ...] = ()
    torch_min: tuple[str, str] | None = None
    model_types: frozenset[str] = frozenset()
    model_code: str = "model-type"
    packed_only: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One of several sets of kernels in a package, one of which is selected at import.

    Attributes:
        name: its usual name, "Triton".
        variables: the environment variables that choose it.
    """

    name: str
    variables: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """A backend's rank in a particular situation. It applies where all conditions match.

    Attributes:
        rank: lower is tried first.
        why: the reason, as the rest of a sentence that begins with the backend's name.
        source: the source of `why`, with the date it was read.
        archs: "sm_90" and the like; empty for all.
        packed: whether rows hold several documents; None for either.
        compiled: whether torch.compile is on; None for either.
        head_dim: lowest and highest head_dim of q and k; it applies when one layer is in this
            range. None for any.
        routed: whether a router calls it, one document at a time; None for either.
    """

    rank: int
    why: str
    source: str
    archs: frozenset[str] = frozenset()
    packed: bool | None = None
    compiled: bool | None = None
    head_dim: tuple[int, int] | None = None
    routed: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """One way to compute attention, and the name the config has for it.

    Attributes:
        name: as written in a config.
        rank: its general rank; lower is tried first. Within a family, ranks give the order 4, 3, 2.
        summary: a short description.
        needs: its requirements.
        rank_why: the reason for `rank`, as the rest of a sentence that begins with its name.
        rank_source: the source of `rank_why`, with the date it was read.
        ranks: ranks in particular situations, which `auto` uses in place of `rank`: the first one
            that applies.
        packing: how packed documents are isolated: by the kernel, by a mask, or not at all.
        uses_flash_lib: the value of attn_uses_flash_lib in a validated config.
        needs_dtype_cast: the value of attn_needs_dtype_cast in a validated config.
        in_config: whether a config may name it; otherwise only `auto` may choose it.
        automatic: whether `auto` may choose it; false for approximations.
        applied_as: transformers' name for it; None when attnimg can't apply it.
        hub_repo: the hub kernel that transformers uses for it; LOCAL_KERNELS may replace it.
        family: backends of the same family may replace one another.
        mask: the kind of attention_mask that it gets.
        load_function: imports the kernel and returns its function; that of a hub kernel takes the
            argument `trusted`. None where transformers has the function.
        module: the module of its package that has FlashAttention's two entry points.
        forward_only: its kernel has no backward pass; gradients come from exact attention where a
            run allows that.
        unpadded_v: its kernel supports a head_dim of v other than that of q and k; transformers
            would pad v.
        k_forward: allowed error of the output, as a multiple of the error of eager attention in
            the run's precision; None for a backend judged by sqnr_db.
        k_backward: the same for the gradients.
        sqnr_db: lowest signal-to-quantization-noise ratio of the output, in decibels.
        tolerance_source: where these bounds come from.
        unreviewed: a hub kernel whose code attnimg's authors have not reviewed.
        pattern: which keys its queries attend to.
        variants: AMD architecture -> the kernels of its package that run there; empty where the
            package has one set.
        for_process: environment variables that select its kernel and are read at each call. They
            therefore affect every layer whose backend uses the same package.
        added_by: the top-level module of the package that added it by an entry point; None for
            attnimg's own.
    """

    name: str
    rank: int
    summary: str
    needs: Needs
    packing: Packing
    rank_why: str = ""
    rank_source: str = ""
    ranks: tuple[Rank, ...] = ()
    uses_flash_lib: bool = False
    needs_dtype_cast: bool = True
    in_config: bool = True
    automatic: bool = True
    applied_as: str | None = None
    hub_repo: str | None = None
    family: str | None = None
    mask: MaskKind = "flash"
    load_function: Callable[..., AttentionFunction] | None = None
    module: str | None = None
    forward_only: bool = False
    unpadded_v: bool = False
    k_forward: float | None = 2.0
    k_backward: float | None = 3.0
    sqnr_db: float | None = None
    tolerance_source: str = "flash-attention 2.8.3.post2, tests/test_flash_attn.py:1121-1132"
    unreviewed: bool = False
    pattern: Pattern = "full"
    variants: Mapping[str, Variant] = field(default_factory=dict)
    for_process: Mapping[str, str] = field(default_factory=dict)
    added_by: str | None = None


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
