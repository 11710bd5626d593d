"""Check attn_implementation and axolotl's legacy flags against the other keys.

The rules read only values of the config; the GPU and torch version come from --on and --torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from attnimg.backends import (
    all_backends,
    arch_code,
    arch_mismatch,
    find_backend,
    is_hub_path,
    runs_on,
)
from attnimg.config.schema import Config, make_error, make_warning
from attnimg.facts import Arch, Backend, Finding, LayerKind, Needs

AUTO = "auto"
# The environment variable that replaces auto.
VARIABLE: Literal["ATTNIMG_BACKEND"] = "ATTNIMG_BACKEND"
# Short names that users try -> the backend. They are errors too, but not unknown-backend.
ALIASES = {
    "flash": "flash_attention_2",
    "flash_attn": "flash_attention_2",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "fa4": "flash_attention_4",
    "flex": "flex_attention",
    "sdp": "sdpa",
    "sdpa_attention": "sdpa",
    "xformer": "xformers",
    "sageattention": "sage",
}
# Legacy key -> value of attn_implementation. If several are set, the first one is used.
LEGACY = {
    "xformers_attention": "xformers",
    "s2_attention": "s2",
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}
# Backends to suggest if the configured one does not run on the GPU, fastest first.
_ALTERNATIVES = ("flash_attention_2", "xformers", "sdpa")
# Backends that are checked for a GPU; for a CPU every backend is checked.
_ARCH_ROWS = frozenset(
    {"sage", "fp8", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
)


def name_errors(name: object) -> Iterator[Finding]:
    """Yield the errors about the value of attn_implementation."""
    key = "attn_implementation"
    known = [AUTO, *(backend.name for backend in all_backends() if backend.in_config)]
    do = f"use one of {', '.join(known)}, or a hub kernel org/name"
    if not isinstance(name, str):
        why = f"found {name!r} ({type(name).__name__}), needed the name of a backend"
        yield make_error("not-a-string", key, f"{key} is not a string", why, do)
    elif name in ALIASES:
        what = f"{name} is an alias of {ALIASES[name]}"
        why = "found an alias, needed the backend's full name"
        yield make_error("alias-rejected", key, what, why, f"write {key}: {ALIASES[name]}")
    elif name != AUTO and not _is_known(name):
        similar = get_close_matches(name.strip().lower(), [*known, *ALIASES], n=3, cutoff=0.5)
        similar = list(dict.fromkeys(ALIASES.get(match, match) for match in similar))
        hint = f"did you mean {' or '.join(similar)}? " if similar else ""
        why = f"found {name!r}, needed one of {', '.join(known)}, or org/name[@rev][:fn]"
        yield make_error("unknown-backend", key, f"unknown backend {name!r}", why, f"{hint}{do}")


def layer_kind_findings(
    names: Mapping[LayerKind, str], settings: AttentionSettings, requested: object
) -> Iterator[Finding]:
    """Yield the findings about attn_backends: each backend in it has to obey the same rules.

    Args:
        names: the value of attn_backends.
        settings: the values of the config; their backend is replaced.
        requested: the value of attn_implementation.
    """
    key = "attn_backends"
    if requested not in (None, AUTO):
        what = f"{key} and attn_implementation: {requested} exclude each other"
        why = f"{key} refines auto; found {key}: {dict(names)}"
        yield make_error("bad-value", key, what, why, f"remove {key}, or attn_implementation")
    for kind, name in names.items():
        errors = [replace(error, key=f"{key}.{kind}") for error in name_errors(name)]
        if name == AUTO:
            what = f"{key}.{kind} is auto"
            do = f"remove {key}.{kind}: layers without a name in it get the best backend"
            errors.append(make_error("bad-value", f"{key}.{kind}", what, "needed a backend", do))
        yield from errors
        if not errors:
            chosen = replace(settings, backend=find_backend(name), resolved=True)
            yield from attention_findings(chosen)


def variable_findings(value: str, settings: AttentionSettings) -> Iterator[Finding]:
    """Yield the findings about ATTNIMG_BACKEND, with which `train` replaces auto.

    Args:
        value: the value of the variable.
        settings: the values of the config; their backend is replaced.
    """
    key = "attn_implementation"
    for error in name_errors(value):
        what, do = f"{VARIABLE}: {error.what}", f"{error.do}; or unset {VARIABLE}"
        yield make_error("bad-environment", key, what, error.why, do)
        return
    if value == AUTO:
        return
    what = f"{VARIABLE} replaces auto by {value} in this environment"
    yield make_warning("backend-of-environment", key, what, f"unset {VARIABLE}, or keep it")
    for found in attention_findings(replace(settings, backend=find_backend(value), resolved=True)):
        yield replace(found, what=f"{VARIABLE}={value}: {found.what}")


def _is_known(name: str) -> bool:
    backend = find_backend(name)
    return backend is not None and backend.in_config


def replace_legacy_keys(values: dict[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """Replace axolotl's legacy flags, such as flash_attention: true, by attn_implementation.

    Args:
        values: the YAML's mapping, without nulls.

    Returns:
        The mapping without the seven keys, and the findings. Each key that is true also causes a
        DeprecationWarning.
    """
    enabled = [key for key in LEGACY if _is_flag(values.get(key)) and values[key]]
    found = list[Finding]()
    for key, name in LEGACY.items():
        if key in values and not _is_flag(values[key]):
            why = f"found {values[key]!r}, needed true or false"
            do = f"replace it by attn_implementation: {name}, or remove it"
            found.append(make_error("bad-value", key, f"{key} is not true or false", why, do))
    for key in enabled:
        do = f"replace it by attn_implementation: {LEGACY[key]}"
        found.append(make_warning("legacy-flag-deprecated", key, f"{key} is deprecated", do))
    for key in enabled[1:]:
        what = f"{key} is ignored: {enabled[0]} takes precedence"
        do = f"remove it; {LEGACY[enabled[0]]} is used"
        found.append(make_warning("legacy-flag-ignored", key, what, do))
    rest = {key: value for key, value in values.items() if key not in LEGACY}
    if enabled and "attn_implementation" in rest:
        what = "attn_implementation and a legacy flag are both set"
        flags = ", ".join(f"{key}: true" for key in enabled)
        why = f"found attn_implementation: {rest['attn_implementation']} and {flags}; needed only "
        why += "attn_implementation"
        do = f"remove {' and '.join(enabled)}"
        found.append(make_error("canonical-plus-legacy", enabled[0], what, why, do))
    elif enabled:
        rest["attn_implementation"] = LEGACY[enabled[0]]
    for key in enabled:
        text = f"{key} is deprecated: write attn_implementation: {LEGACY[key]}"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
    return rest, found


def _is_flag(value: object) -> bool:
    return isinstance(value, bool) or (type(value) is int and value in (0, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSettings:
    """The values that the rules on attention read.

    Attributes:
        config: the valid part of the config.
        backend: the backend that it names; None for none, "auto", or an unknown name.
        resolved: whether attention can be checked: false for "auto" and for an invalid name.
        on: the GPU of --on.
        torch: the version of --torch, as (major, minor).
    """

    config: Config
    backend: Backend | None
    resolved: bool
    on: Arch | None
    torch: tuple[int, int] | None

    @property
    def name(self) -> str:
        """Return the backend's name, for messages."""
        return self.backend.name if self.backend else "no attn_implementation"


def attention_findings(settings: AttentionSettings) -> Iterator[Finding]:
    """Yield the findings of the rules on attention; warnings have no `why`."""
    for rule in _RULES:
        yield from rule(settings)


def _packing(settings: AttentionSettings) -> Iterator[Finding]:
    backend, config = settings.backend, settings.config
    if not config.sample_packing or backend is None or backend.packing == "native":
        return
    name, key = backend.name, "sample_packing"
    if backend.packing == "mask":
        what = f"{name} isolates packed documents by a mask, which is correct but slower"
        do = "use flash_attention_2, flex_attention or xformers if your GPU supports one of them"
        yield make_warning("packing-by-mask", key, what, do)
        return
    if is_hub_path(name) and config.trust_remote_code:
        what = f"attnimg does not know whether {name} isolates packed documents"
        do = "train tests it before the first step, and stops if documents are not isolated"
        yield make_warning("packing-unproven", key, what, do)
        return
    code, why = "packing-not-isolated", f"{name} does not read the boundaries of documents"
    do = "set sample_packing: false, or attn_implementation: flash_attention_2 or sdpa"
    if name == "s2":
        code, why = "s2-with-packing", "s2 computes attention across groups of a whole row"
    elif is_hub_path(name):
        do += "; with trust_remote_code: true, train loads the kernel and tests its isolation"
    why += ", so tokens would attend to other documents"
    yield make_error(code, key, f"{name} does not support sample_packing", why, do)


def _sage_full_finetune(settings: AttentionSettings) -> Iterator[Finding]:
    if settings.name == "sage" and settings.config.adapter is None:
        what = "sage computes approximate attention, with which full fine-tuning can fail"
        do = "set adapter: lora or qlora, for which it is recommended"
        yield make_warning("sage-full-finetune", "attn_implementation", what, do)


def _arch(settings: AttentionSettings) -> Iterator[Finding]:
    backend, arch = settings.backend, settings.on
    if backend is None or arch is None or runs_on(backend.needs, arch):
        return
    if backend.name not in _ARCH_ROWS and arch.vendor != "cpu":
        return
    if backend.name == "flash_attention_2" and arch.vendor == "amd":
        return  # the supported AMD GPUs depend on its build, which only `explain` checks
    fitting = [name for name in _ALTERNATIVES if runs_on(_needs(name), arch)]
    do = f"set attn_implementation: {' or '.join(fitting)}"
    why = arch_mismatch(backend.name, backend.needs, arch)
    what = f"{backend.name} does not run on {arch.name}"
    yield make_error(arch_code(backend.needs, arch), "attn_implementation", what, why, do)


def _torch(settings: AttentionSettings) -> Iterator[Finding]:
    torch, backend = settings.torch, settings.backend
    if backend is None or torch is None or backend.needs.torch_min is None:
        return
    needed, code = backend.needs.torch_min
    if torch < tuple(map(int, needed.split(".")[:2])):
        what = f"{backend.name} does not run with this version of torch"
        why = f"found torch {torch[0]}.{torch[1]}, {backend.name} needs {needed} or newer"
        do = f"pip install 'torch>={needed}', or set attn_implementation: sdpa"
        yield make_error(code, "attn_implementation", what, why, do)


def _batch_flattening(settings: AttentionSettings) -> Iterator[Finding]:
    config, backend, key = settings.config, settings.backend, "batch_flattening"
    if config.batch_flattening is not True:
        return
    if settings.resolved and (backend is None or backend.packing != "native"):
        what = "batch_flattening needs a varlen backend"
        why = f"found {settings.name}; rows without padding need a kernel that reads cu_seqlens"
        do = "set attn_implementation: flash_attention_2, or remove batch_flattening"
        yield make_error("batch-flattening-needs-varlen", key, what, why, do)
    if config.sample_packing:
        what = "batch_flattening and sample_packing cannot be combined"
        why = "found both set to true; sample_packing already leaves no padding"
        yield make_error("batch-flattening-with-packing", key, what, why, f"remove {key}")


def _scaling_softmax(settings: AttentionSettings) -> Iterator[Finding]:
    if settings.config.scaling_softmax and settings.resolved and settings.name != "flex_attention":
        key, what = "scaling_softmax", "scaling_softmax needs flex_attention"
        why = f"found {settings.name}; only flex_attention can scale the logits by sequence length"
        yield make_error("scaling-softmax-needs-flex", key, what, why, f"remove {key}")


def _context_parallel(settings: AttentionSettings) -> Iterator[Finding]:
    config, backend, key = settings.config, settings.backend, "context_parallel_size"
    if (config.context_parallel_size or 0) <= 1:
        return
    do = f"set {key}: 1"
    if settings.resolved and (backend is None or not backend.uses_flash_lib):
        why = f"found {settings.name}; a sequence split over GPUs needs a flash-attn kernel"
        yield make_error("cp-needs-flash", key, f"{key} needs flash-attn", why, do)
    if config.sample_packing and config.micro_batch_size > 1:
        what = f"{key} with sample_packing needs micro_batch_size: 1"
        why = f"found sample_packing and micro_batch_size: {config.micro_batch_size}, needed 1"
        yield make_error("cp-packing-mbs1", key, what, why, do)


def _packing_with_rl(settings: AttentionSettings) -> Iterator[Finding]:
    if settings.config.sample_packing and settings.config.rl:
        what = "sample_packing and rl cannot be combined"
        why = f"found rl: {settings.config.rl}; preference pairs are not packed"
        yield make_error("packing-with-rl", "rl", what, why, "set sample_packing: false")


def _flex_uncompiled(settings: AttentionSettings) -> Iterator[Finding]:
    on_gpu = settings.on is not None and settings.on.vendor != "cpu"
    if on_gpu and settings.name == "flex_attention" and not settings.config.torch_compile:
        what = "flex_attention without torch_compile is several times slower"
        yield make_warning("flex-uncompiled", "torch_compile", what, "set torch_compile: true")


_RULES: tuple[Callable[[AttentionSettings], Iterator[Finding]], ...] = (
    _packing,
    _sage_full_finetune,
    _arch,
    _torch,
    _batch_flattening,
    _scaling_softmax,
    _context_parallel,
    _packing_with_rl,
    _flex_uncompiled,
)


def _needs(name: str) -> Needs:
    backend = find_backend(name)
    assert backend is not None, name
    return backend.needs
