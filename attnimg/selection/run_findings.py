"""Find the errors and warnings about a chosen plan: packed documents that would mix, memory, speed.

Attention backends and masks do not affect layers without softmax attention: in them, packed
documents are isolated by kernels that take document boundaries, or by one call per document.

Quadratic memory is what autograd keeps for the backward pass of one layer, for B rows of T tokens
and H query heads; with gradient_checkpointing only one layer at a time keeps it.

- eager: the softmax is (B, H, T, T). transformers computes it in float32 and casts it to the run's
  precision (eager_attention_forward, 5.22.2): 4 bytes per element, plus those of the cast copy, if
  there is one. The scores, in the run's precision, are freed after the softmax.
- sdpa with packed rows: transformers makes one boolean mask (B, 1, T, T) for all layers; torch adds
  a copy in the run's precision in each layer and keeps it for the backward pass (torch 2.13,
  convert_boolean_attn_mask and derivatives.yaml, attn_bias). Where its memory-efficient kernel does
  not support the layer, its math kernel also keeps scores and softmax in float32.

The memory of all other backends is linear in T. Read 2026-11-26.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnimg.errors import KernelError, counted, set_backend
from attnimg.facts import Backend, Finding, Machine
from attnimg.run_facts import LayerGroup, Model, Plan, Problem
from attnimg.selection.gpus_and_images import gpu_catalogue
from attnimg.selection.model_types import UNLISTED, other_layer_kinds
from attnimg.selection.plan import mixing_error

# The document boundaries in train's packed batches; see train/rows.py.
_IN_BATCH = frozenset({"cu_seq_lens_q", "seq_idx"})
# Layers that process each token on its own.
_TOKENWISE = frozenset({"moe", "mlp"})
# Packed sdpa and eager runs get a warning from a sixteenth of the memory of a T4 on: other
# activations of a model need more than smaller amounts.
WARN_FROM = 1 << 30
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherLayers:
    """One kind of layers without softmax attention in a model.

    Attributes:
        kind: the row of data/other_layers.toml, or the name in the config.
        label: its usual name.
        count: how many layers have it; None when the config does not say.
        needs: the distributions of its kernels.
        missing: those of them that are not installed.
        modules: classes of layers that are called once per document when documents are packed.
        keeps_apart: whether packed documents are isolated; None when not known.
        why: the reason for keeps_apart.
        source: the source of the reason.
    """

    kind: str
    label: str
    count: int | None
    needs: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    keeps_apart: bool | None = None
    why: str = ""
    source: str = ""


def run_findings(
    plan: Plan, problem: Problem, machine: Machine
) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """Return the errors and the warnings about a run with a plan."""
    errors, warnings = check_other_layers(problem, machine)
    if (mixing := mixing_error(plan, problem)) is not None:
        errors = (*errors, mixing)
    if (memory := memory_warning(plan, problem, memory_bytes=device_memory(machine))) is not None:
        warnings = (*warnings, memory)
    return errors, warnings


def other_layers(model: Model | None, machine: Machine) -> tuple[OtherLayers, ...]:
    """Return the kinds of layers without softmax attention that a model has.

    Args:
        model: the model; None when its config.json is not available.
        machine: the machine, with its packages; if they are not known, all are assumed.
    """
    if model is None:
        return ()
    found = {kind: count for kind, count in model.other_layers if kind not in _TOKENWISE}
    unlisted = found.pop(UNLISTED, None) is not None
    named = next(
        ((name, row) for name, row in other_layer_kinds().items() if model.type in row.types), None
    )
    if named is None:
        return tuple(
            OtherLayers(kind=kind, label=f"{kind!r}, of a kind that is not known here", count=count)
            for kind, count in found.items()
        )
    name, row = named
    if not (found or unlisted or row.every):
        return ()
    count = sum(found.values()) or None
    if row.every:
        count = sum(layer.count for layer in model.layers) or None
    installed = row.packages if machine.packages is None else machine.packages
    missing = tuple(package for package in row.packages if package not in installed)
    absent = [key for key in row.batch if key not in _IN_BATCH]
    if not row.batch:
        why = "transformers passes no document boundaries to it"
    elif missing:
        why = f"only the kernels of {' and '.join(row.packages)} take document boundaries"
    elif absent:
        why = (
            f"it takes document boundaries as {' and '.join(absent)}, which train's batches do not "
            "have yet"
        )
    else:
        why = f"it takes document boundaries as {' and '.join(row.batch)}"
    by_kernel = bool(row.batch) and not missing and not absent
    if row.modules and not by_kernel:
        why = f"it is called once per document, because {why}"
    return (
        OtherLayers(
            kind=name,
            label=row.label,
            count=count,
            needs=tuple(row.packages),
            missing=missing,
            modules=() if by_kernel else tuple(row.modules),
            keeps_apart=by_kernel or bool(row.modules),
            why=why,
            source=row.source,
        ),
    )


def check_other_layers(
    problem: Problem, machine: Machine
) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """Return the errors and the warnings about a model's layers without softmax attention.

    Args:
        problem: the run.
        machine: the machine, with its packages.
    """
    errors, warnings = [], []

    def warn(code: str, what: str, *, do: str, key: str = "sample_packing") -> None:
        warnings.append(Finding(code=code, key=key, what=what, do=do))

    for layers in other_layers(problem.model, machine):
        assert problem.model is not None
        count = "the layers" if layers.count is None else counted(layers.count, "layer")
        missing = " and ".join(layers.missing)
        if problem.packing and layers.keeps_apart is False:
            error = Finding(
                code="packing-not-isolated",
                key="sample_packing",
                what=f"packed documents would mix in {count} of {problem.model.type}, "
                f"which have {layers.label}",
                why=f"found: {layers.why}{f' ({missing} not installed)' if missing else ''}\n"
                f"needed: layers that get the boundaries of packed documents [{layers.source}]",
                do="set sample_packing: false",
            )
            errors.append(error)
        elif problem.packing and layers.keeps_apart is None:
            warn(
                "packing-unproven",
                f"it is not known whether packed documents are isolated in {count} "
                f"({layers.label})",
                do="nothing now: attnimg train checks this on the real model before the first "
                "step, and stops when documents leak",
            )
        elif problem.packing and layers.modules:
            what = f"{count} with {layers.label} are called once per document"
            do = "nothing, or set sample_packing: false if the steps are slow"
            if layers.missing:
                what = f"{what} and run in plain PyTorch: {missing} not installed"
                do = f"install {missing} on a GPU, or accept the speed"
            warn("slow-layers", what, do=do)
        elif missing:
            warn(
                "slow-layers",
                f"{count} with {layers.label} run in plain PyTorch, which is correct but slow: "
                f"{missing} not installed",
                do=f"install {missing}, or accept the speed",
                key="base_model",
            )
    return tuple(errors), tuple(warnings)


def describe_other_layers(layers: OtherLayers) -> str:
    """Return a description of one kind of layers without softmax attention, in one line."""
    count = "some" if layers.count is None else str(layers.count)
    text = f"{count} layers with {layers.label}"
    if layers.needs:
        text += f"; needs {', '.join(layers.needs)}"
    if layers.missing:
        text += f" (not installed: {', '.join(layers.missing)})"
    isolated = {True: "isolated", False: "not isolated", None: "not known to be isolated"}
    return f"{text}; packed documents {isolated[layers.keeps_apart]}" + (
        f": {layers.why}" if layers.why else ""
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuadraticMemory:
    """Memory quadratic in the row length.

    Attributes:
        layer: bytes of the largest layer.
        total: bytes of all layers together, without gradient_checkpointing.
        formula: how `layer` is computed, with the numbers.
    """

    layer: int
    total: int
    formula: str


def quadratic_memory(plan: Plan, problem: Problem) -> QuadraticMemory | None:
    """Return a plan's memory that is quadratic in the row length; None if none or unknown."""
    name = plan.chosen.backend.name if plan.chosen else ""
    model, tokens = problem.model, problem.sequence_len
    # A router calls sdpa and eager for one document at a time.
    if name not in ("eager", "sdpa") or plan.groups or model is None or not tokens:
        return None
    if not model.layers or (name == "sdpa" and not problem.packing):
        return None
    fused = _fits_efficient(plan)
    parts = [_of_layer(name, layer, problem, fused=fused) for layer in model.layers]
    square = problem.rows * tokens**2
    total = sum(
        layer.count * square * each for layer, (each, _) in zip(model.layers, parts, strict=True)
    )
    each, words = max(parts)
    rows = "1 row" if problem.rows == 1 else f"{problem.rows} rows"
    formula = f"{words}, {tokens} x {tokens} tokens, {rows}"
    return QuadraticMemory(layer=square * each, total=total, formula=formula)


def memory_warning(plan: Plan, problem: Problem, *, memory_bytes: int | None) -> Finding | None:
    """Return a warning if the quadratic memory is large.

    Args:
        plan: the chosen plan.
        problem: the run.
        memory_bytes: of the device; None when not known.
    """
    found = quadratic_memory(plan, problem)
    if found is None or found.total < WARN_FROM:
        return None
    assert plan.chosen is not None
    what = (
        f"{plan.chosen.backend.name} keeps {_size(found.layer)} per layer, quadratic in the row "
        f"length ({found.formula}), and {_size(found.total)} in all layers without "
        "gradient_checkpointing"
    )
    if memory_bytes and found.layer > memory_bytes:
        what += f": more than the {_size(memory_bytes)} of this GPU, so it will run out of memory"
    elif memory_bytes and found.total > memory_bytes and not problem.checkpointing:
        what += f": likely out of memory, this GPU has {_size(memory_bytes)}"
    linear = [v.backend.name for v in plan.verdicts if v.fits and _is_linear(v.backend)]
    do = "reduce sequence_len (half of it needs a quarter of this memory)"
    if not problem.checkpointing:
        do += "; or set gradient_checkpointing: true"
    if linear:
        do = f"{set_backend(linear[0])}, or {do}"
    return Finding(code="quadratic-memory", key=KernelError.default_key, what=what, do=do)


def _of_layer(name: str, layer: LayerGroup, problem: Problem, *, fused: bool) -> tuple[int, str]:
    """Return the bytes for each pair of tokens of a row, and a description of them."""
    size = _BYTES[problem.dtype]
    if name == "eager":
        cast = f" + {size} cast" if size < 4 else ""
        words = f"{layer.heads} heads x (4 softmax{cast}) bytes"
        return layer.heads * (4 + (size if size < 4 else 0)), words
    if fused:
        return size, f"mask of {size} bytes"
    return size + layer.heads * 8, f"mask of {size} bytes + {layer.heads} heads x 8 bytes of scores"


def _fits_efficient(plan: Plan) -> bool:
    """Return whether torch's memory-efficient kernel, or its CPU flash kernel, takes the mask."""
    verdict = next((v for v in plan.verdicts if v.backend.name == "sdpa_efficient"), None)
    return verdict is None or not {"head-dim", "head-dim-v", "dtype"} & {
        reason.code for reason in verdict.reasons
    }


def _is_linear(backend: Backend) -> bool:
    return backend.in_config and backend.automatic and backend.name not in ("eager", "sdpa")


def device_memory(machine: Machine) -> int | None:
    """Return a device's memory in bytes, as detected or from the catalogue of GPUs."""
    if machine.memory_bytes is not None:
        return machine.memory_bytes
    gigabytes = {gpu.label: gpu.memory_gb for gpu in gpu_catalogue().values()}.get(machine.gpu)
    return gigabytes * 10**9 if gigabytes else None


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
