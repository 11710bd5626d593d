"""Define the dataclasses about machines and backends that steps pass to one another.

Those about one run are in run_facts.py, which `attnimg check` does not import. All are frozen and
hold plain values: they import no torch, read no file and have no side effects.
"""

from __future__ import annotations

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
