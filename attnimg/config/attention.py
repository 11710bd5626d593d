"""Check attn_implementation and axolotl's legacy flags against the other keys.

The rules read only values of the config; the GPU and torch version come from --on and --torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from attnimg.backends import all_backends, arch_code, find_backend, is_hub_path, runs_on
from attnimg.config.schema import Config, finding
from attnimg.facts import Arch, Backend, Finding, Needs

AUTO = "auto"
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
    if not isinstance(name, str):
        kind = type(name).__name__
        why = f"found {name!r} ({kind}), a backend's name is a string"
        yield finding("not-a-string", key, f"{key} is not a string", why, _names_text())
    elif name in ALIASES:
        yield finding(
            "alias-rejected",
            key,
            f"{name} is a short form",
            "found an alias; one backend has one name",
            f"write {key}: {ALIASES[name]}",
        )
    elif name != AUTO and not _is_known(name):
        near = get_close_matches(name.strip().lower(), [AUTO, *_names(), *ALIASES], n=3, cutoff=0.5)
        near = list(dict.fromkeys(ALIASES.get(match, match) for match in near))
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        why = f"found {name!r}, known are {', '.join([*_names(), AUTO])} and org/name[@rev][:fn]"
        yield finding("unknown-backend", key, f"no backend is called {name!r}", why,
                       f"{hint}{_names_text()}")  # fmt: skip


def _is_known(name: str) -> bool:
    backend = find_backend(name)
    return backend is not None and backend.in_config


def _names() -> list[str]:
    return [backend.name for backend in all_backends() if backend.in_config]


def _names_text() -> str:
    return f"use one of {', '.join([AUTO, *_names()])}, or a hub kernel org/name"


def replace_legacy_keys(values: dict[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """Replace axolotl's legacy flags, such as flash_attention: true, by attn_implementation.

    Args:
        values: the YAML's mapping, without nulls.

    Returns:
        The mapping without the seven keys, and the findings. Each key that is true also causes a
        DeprecationWarning.
    """
    asked = [key for key in LEGACY if values.get(key) in (True, 1) and _is_flag(values[key])]
    found = [
        finding(
            "bad-value",
            key,
            f"{key} is neither true nor false",
            f"found {values[key]!r}, a legacy flag is true or false",
            f"replace it by attn_implementation: {LEGACY[key]}, or remove it",
        )
        for key in LEGACY
        if key in values and not _is_flag(values[key])
    ]
    for key in asked:
        do = f"replace it by attn_implementation: {LEGACY[key]}"
        what = f"{key} is an old name"
        found.append(Finding(code="legacy-flag-deprecated", key=key, what=what, do=do))
    for key in asked[1:]:
        what = f"{key} is ignored: {asked[0]} goes first"
        do = f"remove it; {LEGACY[asked[0]]} is used"
        found.append(Finding(code="legacy-flag-ignored", key=key, what=what, do=do))
    rest = {key: value for key, value in values.items() if key not in LEGACY}
    if asked and "attn_implementation" in rest:
        flags = ", ".join(f"{key}: true" for key in asked)
        why = f"found attn_implementation: {rest['attn_implementation']} and {flags}; one backend "
        why += "is chosen in one place"
        found.append(
            finding(
                "canonical-plus-legacy",
                asked[0],
                "attn_implementation and a legacy flag are both set",
                why,
                f"remove {' and '.join(asked)}",
            )
        )
    elif asked:
        rest["attn_implementation"] = LEGACY[asked[0]]
    for key in asked:
        warnings.warn(
            f"{key} is deprecated: write attn_implementation: {LEGACY[key]}",
            DeprecationWarning,
            stacklevel=2,
        )
    return rest, found


def _is_flag(value: object) -> bool:
    return isinstance(value, bool) or (type(value) is int and value in (0, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The values that the rules read.

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


def attention_findings(view: View) -> Iterator[Finding]:
    """Yield the findings of the rules on attention; warnings have no `why`."""
    for rule in _RULES:
        yield from rule(view)


def _packing(view: View) -> Iterator[Finding]:
    backend, config = view.backend, view.config
    if not config.sample_packing or backend is None or backend.packing == "native":
        return
    name, key = backend.name, "sample_packing"
    if backend.packing == "mask":
        yield Finding(
            code="packing-by-mask",
            key=key,
            what=f"{name} keeps packed documents apart by a mask: correct, but slower",
            do="use flash_attention_2, flex_attention or xformers where your GPU has them",
        )
    elif name == "s2":
        why = "s2 attends across groups of a whole row, so packed documents would see each other"
        do = "set sample_packing: false, or attn_implementation: flash_attention_2 or sdpa"
        yield finding("s2-with-packing", key, "s2 cannot train packed rows", why, do)
    elif is_hub_path(name) and config.trust_remote_code:
        yield Finding(
            code="packing-unproven",
            key=key,
            what=f"nobody here has read whether {name} keeps packed documents apart",
            do="train proves it before the first step, or stops",
        )
    else:
        why = f"{name} takes no document boundaries, so packed documents would see each other"
        do = "set sample_packing: false, or attn_implementation: flash_attention_2 or sdpa"
        if is_hub_path(name):
            do += "; with trust_remote_code: true the kernel is loaded and has to prove isolation"
        yield finding("packing-not-isolated", key, f"{name} cannot pack", why, do)


def _sage_full_finetune(view: View) -> Iterator[Finding]:
    if _is(view, "sage") and view.config.adapter is None:
        yield Finding(
            code="sage-full-finetune",
            key="attn_implementation",
            what="sage approximates, and full fine-tuning with it has been seen to fail",
            do="set adapter: lora or qlora, for which it is recommended",
        )


def _arch(view: View) -> Iterator[Finding]:
    backend, arch = view.backend, view.on
    if backend is None or arch is None or runs_on(backend.needs, arch):
        return
    if backend.name not in _ARCH_ROWS and arch.vendor != "cpu":
        return
    if backend.name == "flash_attention_2" and arch.vendor == "amd":
        return  # the supported AMD GPUs depend on its build, which only `explain` checks
    fitting = [name for name in _ALTERNATIVES if runs_on(_needs(name), arch)]
    do = f"set attn_implementation: {' or '.join(fitting)}"
    why = f"found {arch.name}, {backend.name} needs {backend.needs.arch_text}"
    what = f"{backend.name} does not run on {arch.name}"
    code = arch_code(backend.needs, arch)
    yield finding(code, "attn_implementation", what, why, do)


def _torch(view: View) -> Iterator[Finding]:
    if view.backend is None or view.torch is None or view.backend.needs.torch_min is None:
        return
    needed, code = view.backend.needs.torch_min
    if view.torch < _minor(needed):
        found = ".".join(map(str, view.torch))
        name = view.backend.name
        yield finding(
            code,
            "attn_implementation",
            f"{name} does not run on this torch",
            f"found torch {found}, {name} needs {needed} or newer",
            f"pip install 'torch>={needed}', or set attn_implementation: sdpa",
        )


def _batch_flattening(view: View) -> Iterator[Finding]:
    config, key = view.config, "batch_flattening"
    if config.batch_flattening is not True:
        return
    if view.resolved and (view.backend is None or view.backend.packing != "native"):
        name = view.backend.name if view.backend else "no attn_implementation"
        why = f"found {name}; rows without padding need a kernel that takes document boundaries"
        do = "set attn_implementation: flash_attention_2, or remove batch_flattening"
        what = "batch_flattening needs a varlen backend"
        yield finding("batch-flattening-needs-varlen", key, what, why, do)
    if config.sample_packing:
        why = "sample_packing already leaves no padding; found both set to true"
        what = "batch_flattening and sample_packing exclude each other"
        yield finding("batch-flattening-with-packing", key, what, why,
                                "remove batch_flattening")  # fmt: skip


def _scaling_softmax(view: View) -> Iterator[Finding]:
    if view.config.scaling_softmax and view.resolved and not _is(view, "flex_attention"):
        name = view.backend.name if view.backend else "no attn_implementation"
        yield finding(
            "scaling-softmax-needs-flex",
            "scaling_softmax",
            "scaling_softmax needs flex_attention",
            f"found {name}; only flex_attention lets the logits be scaled by length",
            "remove scaling_softmax",
        )


def _context_parallel(view: View) -> Iterator[Finding]:
    config, key = view.config, "context_parallel_size"
    if (config.context_parallel_size or 0) <= 1:
        return
    if view.resolved and (view.backend is None or not view.backend.uses_flash_lib):
        name = view.backend.name if view.backend else "no attn_implementation"
        why = f"found {name}; a sequence split over GPUs needs a flash-attn kernel"
        do = "set context_parallel_size: 1"
        yield finding("cp-needs-flash", key, f"{key} needs flash-attn", why, do)
    if config.sample_packing and config.micro_batch_size > 1:
        why = f"found sample_packing and micro_batch_size: {config.micro_batch_size}, needed is 1"
        what = f"{key} with packing takes one row at a time"
        yield finding("cp-packing-mbs1", key, what, why, "set context_parallel_size: 1")


def _packing_with_rl(view: View) -> Iterator[Finding]:
    if view.config.sample_packing and view.config.rl:
        yield finding(
            "packing-with-rl",
            "rl",
            "sample_packing and rl exclude each other",
            f"found rl: {view.config.rl}; preference pairs are not packed",
            "remove rl",
        )


def _flex_uncompiled(view: View) -> Iterator[Finding]:
    on_gpu = view.on is not None and view.on.vendor != "cpu"
    if on_gpu and _is(view, "flex_attention") and not view.config.torch_compile:
        yield Finding(
            code="flex-uncompiled",
            key="torch_compile",
            what="flex_attention without torch_compile is several times slower",
            do="set torch_compile: true",
        )


_RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (
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


def _is(view: View, name: str) -> bool:
    return view.backend is not None and view.backend.name == name


def _needs(name: str) -> Needs:
    backend = find_backend(name)
    assert backend is not None, name
    return backend.needs


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
