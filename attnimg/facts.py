"""The values that steps hand to one another: a machine, a model, a verdict, a plan.

Everything here is frozen and plain: no torch, no files, no methods that act.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

DType = Literal["float32", "float16", "bfloat16"]
Vendor = Literal["nvidia", "amd", "cpu"]
Packing = Literal["native", "mask", "none"]
# What a backend gets as attention_mask: None or True where a query may look, (B, 1, T, S) ("sdpa");
# the same added to the scores ("eager"); None or True where a token is none of the padding, (B, S)
# ("flash"); flex_attention's block mask ("flex").
MaskKind = Literal["sdpa", "eager", "flash", "flex"]
# Which keys a query sees besides the run's own limits: all of its past, or LongLoRA's groups.
Pattern = Literal["full", "shifted"]
# What a rule on known-bad backends can depend on.
Feature = Literal["packing", "window", "softcap", "sinks", "dropout", "training", "compiled"]
# transformers' attention interface: (module, query, key, value, attention_mask, **arguments) to
# (output, weights). Its tensors would need torch to name.
AttentionFunction = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arch:
    """What machine code runs here.

    Attributes:
        name: "sm_90", "gfx942" or "cpu"; the form that JSON carries.
        vendor: who made it.
        capability: NVIDIA's compute capability, (9, 0); None elsewhere.
    """

    name: str
    vendor: Vendor
    capability: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalKernel:
    """A folder that LOCAL_KERNELS serves in place of a hub kernel.

    Attributes:
        repo: the hub name it stands for, "kernels-community/flash-attn2".
        path: the folder, as the user wrote it.
        vendor: which kind of machine its metadata says it was built for.
        version: the version its metadata gives, for people to read.
        exports: top-level functions; None when they could not be read without importing it.
        varlen_takes: arguments of flash_attn_varlen_func; None when they could not be read.
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
        arch: what its first device is; "cpu" when it has no GPU.
        gpu: the name people know, "NVIDIA H100 80GB HBM3"; "cpu" without one.
        memory_bytes: of the first device; None when not known.
        driver: the GPU driver's version; None without one.
        packages: distribution name -> version of what is installed. None: not this machine, so
            every package that fits the GPU is assumed.
        torch: torch's version, None when absent or not given.
        local_kernels: what LOCAL_KERNELS serves.
        other_archs: architectures of further devices where they differ from the first one's.
        shadowed: distributions whose files another one has overwritten.
        driver_problem: what a GPU driver said besides naming its devices; None when it worked.
        variables: those that are set and choose among a package's kernels.
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
        window: tokens a sliding window sees; None for all.
        softcap: tanh cap on the logits; None for none.
        sinks: whether a learned sink logit joins the softmax.
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
    def features(self) -> frozenset[str]:
        """Return what its attention needs beyond plain softmax: "window", "softcap", "sinks"."""
        used = {"window": self.window is not None, "softcap": self.softcap, "sinks": self.sinks}
        return frozenset(name for name, is_used in used.items() if is_used)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What a model's config.json says of its attention.

    Attributes:
        type: transformers' model_type, "llama".
        layers: groups of equal attention layers; empty when they could not be read.
        other_layers: layers that mix tokens without softmax attention (linear attention, state
            space, convolution): (kind as the config names it, count).
        parameters: rough count of weights, None when not known.
        unknown: sentences on what the config did not say.
        brings_code: whether its repository has model code of its own, which trust_remote_code runs.
    """

    type: str
    layers: tuple[LayerGroup, ...]
    other_layers: tuple[tuple[str, int], ...] = ()
    parameters: int | None = None
    unknown: tuple[str, ...] = ()
    brings_code: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelClass:
    """What a class of transformers does not take.

    Attributes:
        name: "LlamaForCausalLM".
        lacks: which of "sdpa", "flash" and "flex" it says that it has not; and "others" where its
            attention code is its own, so that no function can be put there.
        flash_names: what it takes in place of every other name with "flash" in it; empty when it
            swaps none.
    """

    name: str
    lacks: frozenset[str] = frozenset()
    flash_names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What attention has to do in one run.

    What a proof is made for has no default: who makes a Problem says it.

    Attributes:
        model: the model's geometry; None when its config is not at hand.
        dtype: the precision of q, k and v.
        packing: whether rows hold several documents that must not see each other.
        dropout: attention dropout while training.
        compiled: whether torch.compile is on.
        checkpointing: whether activations are dropped and computed again in the backward pass.
        sequence_len: tokens of the longest row; None when not known.
        rows: rows of the largest batch.
        autocast: whether the forward pass runs under torch.autocast.
        model_class: what its class in transformers does not take; None when it takes everything,
            or is not known.
        training: whether a backward pass is needed.
        forward_only_ok: whether a kernel without a backward pass may train all the same.
        trusted: whether the user lets code from the hub run.
        known_bad: rules on where backends are known to fail.
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
    """How a run calls its model: the proof, the isolation check and the trainer share one value.

    `attnimg.context.context_of` makes it. No field has a default: a value left out would prove
    something else than what is trained.

    Attributes:
        dtype: the precision of matrix multiplications, and so of q, k and v.
        autocast: what torch.autocast casts to in a forward pass; None where it is off.
        packing: whether rows hold several documents.
        padding_free: whether the rows of a batch are flattened to (1, T) with cu_seqlens, as
            kernels with native packing take them; False for (B, S), where a mask isolates
            documents.
        rows: rows of the largest batch.
        sequence_len: tokens of the longest row; None when not known.
        compiled: whether torch.compile is on.
        checkpointing: whether activations are computed again in the backward pass.
        seq_idx: whether batches carry seq_idx, the number of each token's document, which the
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
    """Why a backend does not fit: a code of the contract and a sentence with found and needed."""

    code: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One candidate's judgement.

    Attributes:
        backend: the candidate.
        rank: place among the candidates, 1 is tried first.
        reasons: all reasons against it; none means it fits.
        kernel: what would run, "flash-attn 2.8.3"; None when it does not fit.
    """

    backend: Backend
    rank: int
    reasons: tuple[Reason, ...]
    kernel: str | None = None

    @property
    def fits(self) -> bool:
        """Return whether no reason speaks against it."""
        return not self.reasons


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupChoice:
    """What one group of equal layers runs, where groups run different backends."""

    layers: LayerGroup
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The choice and everything it was chosen from.

    Attributes:
        asked: the name in the config, "auto" when there was none.
        chosen: the verdict that won, None when nothing may be used.
        because: one sentence.
        verdicts: every candidate, by rank.
        do: what to change when nothing was chosen.
        strict: whether nothing may stand in for what was asked.
        groups: what each group of layers runs, where that is better than `chosen` for all of
            them; empty where every layer runs `chosen`.
    """

    asked: str
    chosen: Verdict | None
    because: str
    verdicts: tuple[Verdict, ...]
    do: str = ""
    strict: bool = False
    groups: tuple[GroupChoice, ...] = ()


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
    """Head sizes that a kernel takes; a layer fits when one such rule does.

    Attributes:
        majors: NVIDIA capability majors it speaks of; empty for every machine.
        qk: lowest and highest head_dim of q and k.
        v: lowest and highest head_dim of v.
        multiple: what that of q and k must be a multiple of.
        multiple_v: what that of v must be a multiple of, where it is not padded to that of q and k.
        equal: whether v must have the head_dim of q and k.
        ungrouped: whether there must be as many key heads as query heads.
        without: features the kernel lacks at these sizes, such as "window".
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
    """What a backend asks of a machine and of a problem, as data.

    Attributes:
        vendors: whose devices it runs on.
        capability_min: lowest NVIDIA compute capability; None for any.
        capability_max: highest one; None for any.
        capabilities: the exact list where it has holes; empty for none.
        gfx: AMD architectures it runs on; empty for all of them.
        arch_code: the contract's code when the architecture does not fit.
        arch_text: the architectures it needs, in words.
        dtypes: precisions of q, k and v.
        head_dims: rules on head sizes; empty for any size.
        features: which of "window", "softcap", "sinks", "dropout" it honours.
        features_missing: NVIDIA capability major, or AMD architecture -> features it lacks there.
        exclusive: features of which it does one at a time; empty for none.
        dtypes_missing: NVIDIA capability major -> precisions it lacks there.
        backward: whose devices it has a backward pass on.
        backward_code: the contract's code when it has none.
        packages: (distribution, lowest version or None, code when absent or too old).
        torch_min: lowest torch, with the code when it is older.
        model_types: the only transformers model types it takes; empty for all.
        model_code: the contract's code for another model type.
        packed_only: whether it is there for packed rows alone.
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
    """One of several sets of kernels in a package, of which its import takes one.

    Attributes:
        name: what people call it, "Triton".
        variables: the environment variables that choose it.
    """

    name: str
    variables: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """A backend's place where it is not its general one. It holds where all of it holds.

    Attributes:
        rank: lower is tried first.
        why: half a sentence, of which the backend is the subject.
        source: where that is read, with the day.
        archs: "sm_90" and the like; empty for all.
        packed: whether rows hold several documents; None for either.
        compiled: whether torch.compile is on; None for either.
        head_dim: lowest and highest of q and k; one layer within is enough. None for any.
        routed: whether a router calls it document by document; None for either.
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
        name: as written in attn_implementation.
        rank: its general place, lower is tried first; that of a family is the contract's order.
        summary: what it is, in half a line.
        needs: what it asks for.
        rank_why: why that place, half a sentence of which the backend is the subject.
        rank_source: where that is read, with the day.
        ranks: places that hold for `auto` in particular situations, in place of the general one:
            the first that holds.
        packing: how packed documents are kept apart: by the kernel, by a mask, or not at all.
        uses_flash_lib: the contract's flag of that name.
        needs_dtype_cast: the contract's flag of that name.
        in_config: whether attn_implementation may name it; the others are for `auto` alone.
        automatic: whether `auto` may take it; never true for one that approximates.
        applied_as: transformers' name for it; None until attnimg can apply it.
        hub_repo: the hub kernel transformers takes for it, which LOCAL_KERNELS may serve.
        family: members of one family stand in for one another.
        mask: what its attention_mask is.
        load_function: imports the kernel and returns its function, for a hub kernel with the
            argument `trusted`; None where transformers has the function.
        module: the module of its package that has FlashAttention's two entry points.
        forward_only: its kernel has no backward pass; where a run allows it, gradients are those
            of exact attention.
        unpadded_v: its kernel takes v with another head size than q and k, which transformers
            would pad.
        k_forward: allowed error of the output, as a multiple of what plain attention in the run's
            own precision has; None for a backend judged by sqnr_db.
        k_backward: the same for the gradients.
        sqnr_db: lowest ratio of signal to quantisation noise of the output, in decibels.
        tolerance_source: where these bounds come from.
        unreviewed: a hub kernel that nobody here has read.
        pattern: which keys its queries see.
        variants: AMD architecture -> the kernels of its package that run there; empty where the
            package has one set.
        for_process: variables that choose its kernel at each call, and so for every layer of the
            process that another backend would run with the same package.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """One kind of attention call that a run makes, and that a backend is proven on.

    No field has a default: a proof on another geometry than the run's would prove nothing.

    Attributes:
        heads: query heads, H.
        kv_heads: key/value heads, G; H is a multiple of it.
        head_dim_qk: size of a query and of a key.
        head_dim_v: size of a value.
        window: tokens a sliding window sees; None for all.
        softcap: tanh cap on the logits; None for none.
        sinks: whether a learned sink logit joins the softmax.
        dtype: the precision of q, k and v.
        packing: whether rows hold several documents.
        dropout: attention dropout while training.
        sequence_len: tokens of the longest row of the run.
        dense: whether rows of one document occur, which reach a kernel's entry without boundaries.
        deterministic: whether gradients must repeat bit for bit.
        rows: rows of a batch, which a packed run may lay one after another.
        autocast: whether calls are made under torch.autocast, which reaches into what a kernel
            computes with torch's own functions.
        every_length: whether documents of each length are to be shown, as to a kernel that nobody
            here has read.
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
    """How far a backend is from the reference, where it comes closest to the bound.

    Attributes:
        quantity: "out", or the gradient: "dq", "dk", "dv", "dsinks".
        error: largest difference from the reference; decibels below the signal for a backend that
            quantizes.
        allowed: what the backend's rule allows there.
        case: the probe.
    """

    quantity: str
    error: float
    allowed: float
    case: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What came out when a backend was run against the reference.

    Attributes:
        backend: its name.
        reasons: all that was found wrong; none means that it passed.
        figures: one for each quantity.
        cases: how many probes it went through.
        longest: tokens of the longest document it was shown.
        seconds: what the proof took.
        cached: whether it was read from the disk instead of run.
        note: what the reader should know, such as a bound on the length; "" for nothing.
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
        """Return whether no check found a fault."""
        return not self.reasons


@dataclass(frozen=True, kw_only=True, slots=True)
class CallCheck:
    """The comparison of one attention call of a training step with the reference.

    Attributes:
        backend: the one that computed the call.
        layer: the layer's number in the model.
        figures: one for each compared quantity; `case` names the row, tokens and heads.
        faults: the rules that the call broke; none means that it is right.
        near: whether all errors are so close to their bounds that rounding may explain them.
        repeated: whether the repeated call was wrong too; None without faults.
        skipped: why the call was not compared; "" where it was.
    """

    backend: str
    layer: int
    figures: tuple[Figure, ...] = ()
    faults: tuple[Reason, ...] = ()
    near: bool = False
    repeated: bool | None = None
    skipped: str = ""

    @property
    def sure(self) -> bool:
        """Return whether the call is wrong beyond doubt."""
        return bool(self.repeated) and not self.near

    @property
    def margin(self) -> float:
        """Return the largest error as a share of what is allowed."""
        return max((figure.error / figure.allowed for figure in self.figures), default=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownBad:
    """A rule of known_bad.toml: where a backend is known to fail. It holds where all of it holds.

    Attributes:
        id: "kb07".
        backends: whose calls it concerns.
        effect: what happens, in half a line.
        link: where it was told.
        date: the day it was read there.
        expires: the day from which it no longer counts; None for never.
        status: "reported" until somebody here saw it, then "seen".
        packages: distribution -> versions, "<4.0.0b30,>=4.0.0b26"; all of them must match.
        archs: "sm_86" and the like; empty for all.
        dtypes: empty for all.
        head_dim_qk: lowest and highest; None for all.
        head_dim_v: lowest and highest; None for all.
        heads_differ: whether there are fewer key heads than query heads; None for either.
        features: those that must be in use (true) or must not (false).
        row_tokens_min: shortest row, in tokens, with all that a packed batch lays one after
            another; None for any.
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
