"""The contract's checks on values alone, one function a row or two; nothing else is read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from attnimg.backends import arch_code, backend_named, is_hub_path, runs_on
from attnimg.config.names import finding
from attnimg.config.schema import DATASET_TYPES, Config
from attnimg.facts import Arch, Backend, Finding, Needs

# Keys that say the same thing in two ways: setting both contradicts.
_EITHER_OR = (
    ("warmup_steps", "warmup_ratio"),
    ("save_steps", "saves_per_epoch"),
    ("eval_steps", "evals_per_epoch"),
    ("datasets", "pretraining_dataset"),
    ("dataset_num_proc", "dataset_processes"),
    ("test_datasets", "val_set_size"),
    ("load_in_4bit", "load_in_8bit"),
    ("deepspeed", "fsdp"),
)
# Backends to suggest where another one does not run on a GPU, fastest first.
_ALTERNATIVES = ("flash_attention_2", "xformers", "sdpa")
# Backends whose GPU rows the contract lists; on a CPU every backend is judged.
_ARCH_ROWS = frozenset(
    {"sage", "fp8", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What the rules look at.

    Attributes:
        config: the valid part of the config.
        backend: the one it names; None when it names none, "auto", or nothing that exists.
        resolved: whether attention can be judged: false for "auto" and for a name in error.
        on: the GPU of --on.
        torch: the version of --torch, as (major, minor).
    """

    config: Config
    backend: Backend | None
    resolved: bool
    on: Arch | None
    torch: tuple[int, int] | None


Found = Iterator[tuple[str, Finding]]  # ("error" or "warning", what was found)


def run_rules(view: View) -> Iterator[tuple[str, Finding]]:
    """Run every row over one config, in the contract's order."""
    for rule in _RULES:
        yield from rule(view)


def _packing(view: View) -> Found:
    backend, config = view.backend, view.config
    if not config.sample_packing or backend is None or backend.packing == "native":
        return
    name, key = backend.name, "sample_packing"
    if backend.packing == "mask":
        yield (
            "warning",
            Finding(
                code="packing-by-mask",
                key=key,
                what=f"{name} keeps packed documents apart by a mask: correct, but slower",
                do="use flash_attention_2, flex_attention or xformers where your GPU has them",
            ),
        )
    elif name == "s2":
        why = "s2 attends across groups of a whole row, so packed documents would see each other"
        do = "set sample_packing: false, or attn_implementation: flash_attention_2 or sdpa"
        yield "error", finding("s2-with-packing", key, "s2 cannot train packed rows", why, do)
    elif is_hub_path(name) and config.trust_remote_code:
        yield (
            "warning",
            Finding(
                code="packing-unproven",
                key=key,
                what=f"nobody here has read whether {name} keeps packed documents apart",
                do="train proves it before the first step, or stops",
            ),
        )
    else:
        why = f"{name} takes no document boundaries, so packed documents would see each other"
        do = "set sample_packing: false, or attn_implementation: flash_attention_2 or sdpa"
        if is_hub_path(name):
            do += "; with trust_remote_code: true the kernel is loaded and has to prove isolation"
        yield "error", finding("packing-not-isolated", key, f"{name} cannot pack", why, do)


def _sage_full_finetune(view: View) -> Found:
    if _is(view, "sage") and view.config.adapter is None:
        yield (
            "warning",
            Finding(
                code="sage-full-finetune",
                key="attn_implementation",
                what="sage approximates, and full fine-tuning with it has been seen to fail",
                do="set adapter: lora or qlora, for which it is recommended",
            ),
        )


def _arch(view: View) -> Found:
    backend, arch = view.backend, view.on
    if backend is None or arch is None or runs_on(backend.needs, arch):
        return
    if backend.name not in _ARCH_ROWS and arch.vendor != "cpu":
        return
    if backend.name == "flash_attention_2" and arch.vendor == "amd":
        return  # which AMD GPUs it serves depends on how it was built: explain judges that
    fitting = [name for name in _ALTERNATIVES if runs_on(_needs(name), arch)]
    do = f"set attn_implementation: {' or '.join(fitting)}"
    why = f"found {arch.name}, {backend.name} needs {backend.needs.arch_text}"
    what = f"{backend.name} does not run on {arch.name}"
    code = arch_code(backend.needs, arch)
    yield "error", finding(code, "attn_implementation", what, why, do)


def _torch(view: View) -> Found:
    if view.backend is None or view.torch is None or view.backend.needs.torch_min is None:
        return
    needed, code = view.backend.needs.torch_min
    if view.torch < _minor(needed):
        found = ".".join(map(str, view.torch))
        name = view.backend.name
        yield (
            "error",
            finding(
                code,
                "attn_implementation",
                f"{name} does not run on this torch",
                f"found torch {found}, {name} needs {needed} or newer",
                f"pip install 'torch>={needed}', or set attn_implementation: sdpa",
            ),
        )


def _batch_flattening(view: View) -> Found:
    config, key = view.config, "batch_flattening"
    if config.batch_flattening is not True:
        return
    if view.resolved and (view.backend is None or view.backend.packing != "native"):
        name = view.backend.name if view.backend else "no attn_implementation"
        why = f"found {name}; rows without padding need a kernel that takes document boundaries"
        do = "set attn_implementation: flash_attention_2, or remove batch_flattening"
        what = "batch_flattening needs a varlen backend"
        yield "error", finding("batch-flattening-needs-varlen", key, what, why, do)
    if config.sample_packing:
        why = "sample_packing already leaves no padding; found both set to true"
        what = "batch_flattening and sample_packing exclude each other"
        yield "error", finding("batch-flattening-with-packing", key, what, why,
                                "remove batch_flattening")  # fmt: skip


def _scaling_softmax(view: View) -> Found:
    if view.config.scaling_softmax and view.resolved and not _is(view, "flex_attention"):
        name = view.backend.name if view.backend else "no attn_implementation"
        yield (
            "error",
            finding(
                "scaling-softmax-needs-flex",
                "scaling_softmax",
                "scaling_softmax needs flex_attention",
                f"found {name}; only flex_attention lets the logits be scaled by length",
                "remove scaling_softmax",
            ),
        )


def _context_parallel(view: View) -> Found:
    config, key = view.config, "context_parallel_size"
    if (config.context_parallel_size or 0) <= 1:
        return
    if view.resolved and (view.backend is None or not view.backend.uses_flash_lib):
        name = view.backend.name if view.backend else "no attn_implementation"
        why = f"found {name}; a sequence split over GPUs needs a flash-attn kernel"
        do = "set context_parallel_size: 1"
        yield "error", finding("cp-needs-flash", key, f"{key} needs flash-attn", why, do)
    if config.sample_packing and config.micro_batch_size > 1:
        why = f"found sample_packing and micro_batch_size: {config.micro_batch_size}, needed is 1"
        what = f"{key} with packing takes one row at a time"
        yield "error", finding("cp-packing-mbs1", key, what, why, "set context_parallel_size: 1")


def _packing_with_rl(view: View) -> Found:
    if view.config.sample_packing and view.config.rl:
        yield (
            "error",
            finding(
                "packing-with-rl",
                "rl",
                "sample_packing and rl exclude each other",
                f"found rl: {view.config.rl}; preference pairs are not packed",
                "remove rl",
            ),
        )


def _flex_uncompiled(view: View) -> Found:
    on_gpu = view.on is not None and view.on.vendor != "cpu"
    if on_gpu and _is(view, "flex_attention") and not view.config.torch_compile:
        yield (
            "warning",
            Finding(
                code="flex-uncompiled",
                key="torch_compile",
                what="flex_attention without torch_compile is several times slower",
                do="set torch_compile: true",
            ),
        )


def _contradictions(view: View) -> Found:
    config = view.config
    for first, second in _EITHER_OR:
        if getattr(config, first) and getattr(config, second):
            why = f"found both; {first} and {second} say the same thing in two ways"
            do = f"keep {first} or {second}"
            yield "error", finding("bad-value", second, f"{second} contradicts {first}", why, do)
    if config.fp16 and config.bf16 in (True, "full"):
        why = "found fp16: true and bf16: true; a run has one precision"
        yield "error", finding("bad-value", "fp16", "fp16 contradicts bf16", why,
                                "keep bf16 or fp16")  # fmt: skip
    if config.adapter == "qlora" and (config.load_in_4bit is False or config.load_in_8bit):
        key = "load_in_8bit" if config.load_in_8bit else "load_in_4bit"
        yield "error", finding("bad-value", key, f"{key} contradicts adapter: qlora",
                                "qlora trains on weights loaded in 4 bits",
                                f"remove {key}, or set adapter: lora")  # fmt: skip
    if config.adapter is None and (config.load_in_4bit or config.load_in_8bit):
        key = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
        yield "error", finding("bad-value", key, f"{key} needs an adapter",
                                f"found no adapter; weights of {key[8:]} take no gradient",
                                f"set adapter: {'qlora' if config.load_in_4bit else 'lora'}, "
                                f"or remove {key}")  # fmt: skip
    size = config.val_set_size
    if size == 1 or (size > 1 and not size.is_integer()):
        taken = "all documents (1 is 100 %)" if size == 1 else "a part of a document"
        yield "error", finding("bad-value", "val_set_size", f"val_set_size {size:g} is not valid",
                                f"it takes {taken}; needed a share below 1, or from 2 on a whole "
                                "number of documents", "set val_set_size: 0.05")  # fmt: skip


def _dataset_types(view: View) -> Found:
    for name in ("datasets", "pretraining_dataset", "test_datasets"):
        for number, spec in enumerate(getattr(view.config, name) or ()):
            if spec.type is None or spec.type in DATASET_TYPES:
                continue
            near = difflib.get_close_matches(spec.type, DATASET_TYPES, n=1)
            # Source: axolotl 067b021c, utils/schemas/validation.py:52 (2026-11-27)
            near = ["chat_template"] if spec.type.startswith("sharegpt") else near
            key = f"{name}[{number}].type"
            why = f"{key} is {spec.type}, needed one of {', '.join(DATASET_TYPES)}"
            do = f"set {key}: {' or '.join(near or DATASET_TYPES[:-1])}"
            yield "error", finding("bad-value", key, f"unknown dataset type {spec.type!r}", why, do)


_RULES: tuple[Callable[[View], Found], ...] = (
    _packing,
    _sage_full_finetune,
    _arch,
    _torch,
    _batch_flattening,
    _scaling_softmax,
    _context_parallel,
    _packing_with_rl,
    _flex_uncompiled,
    _contradictions,
    _dataset_types,
)


def _is(view: View, name: str) -> bool:
    return view.backend is not None and view.backend.name == name


def _needs(name: str) -> Needs:
    backend = backend_named(name)
    assert backend is not None, name
    return backend.needs


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
