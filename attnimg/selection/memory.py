"""Estimate the attention memory that is quadratic in the row length.

It is the memory that autograd keeps for the backward pass of one layer, for B rows of T tokens and
H query heads; with gradient_checkpointing only one layer at a time keeps it.

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

from attnimg.facts import Backend, Finding, LayerGroup, Plan, Problem

# A sixteenth of the memory of a T4. Other activations of a model need more than smaller amounts.
WARN_FROM = 1 << 30
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


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
        do = f"set attn_implementation: {linear[0]}, or {do}"
    return Finding(code="quadratic-memory", key="attn_implementation", what=what, do=do)


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


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
