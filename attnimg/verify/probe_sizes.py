"""Choose the size of probes: tokens, rows and heads that the device can compute."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnimg.facts import Backend, Geometry

# Scores of all heads in one call on a GPU, for kernels that do not store them: 32 heads of 32768
# tokens.
_COMPUTED = 1 << 35
# Bytes of a GPU's memory for each score that plain attention holds: scores, softmax and weights and
# the gradients of all three, in up to 4 bytes each, take 24.
_BYTES_A_SCORE = 40
# Bytes for each number in a whole row's q and v: drawing them holds 4 arrays in float64.
_DRAWN = 4 * 8
# Kernels that store all scores, besides those that get a mask for each pair of tokens.
_HOLDING = frozenset({"sdpa_math", "s2"})
# A sliding window longer than the short probes would show nothing there.
_SHORT_WINDOW = 37


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The limits of the longest probes.

    Attributes:
        held: scores that plain attention holds at once, in a probe with few heads.
        whole: scores of a call with all heads of the run.
        drawn: bytes of the inputs that are drawn for such a call.
    """

    held: int
    whole: int
    drawn: int


# 134 MB in float32. Time bounds the call with all heads: 32 heads of 829 tokens.
CPU = Budget(held=1 << 25, whole=21 << 20, drawn=1 << 30)


def budget_of(backend: Backend, *, memory_bytes: int | None) -> Budget:
    """Return the budget of a backend's probes.

    Args:
        backend: some store all scores.
        memory_bytes: of the GPU; None for a CPU.
    """
    if memory_bytes is None:
        return CPU
    held = memory_bytes // _BYTES_A_SCORE
    holding = backend.mask in ("sdpa", "eager") or backend.name in _HOLDING
    return Budget(held=held, whole=held if holding else _COMPUTED, drawn=memory_bytes // 4)


def longest_of(geometry: Geometry, budget: Budget) -> int:
    """Return the longest document that is probed: sequence_len, or what the budget allows."""
    few = int((budget.held / few_heads(geometry).heads) ** 0.5)
    return min(geometry.sequence_len, max(few, whole_row(geometry, budget)))


def rows_of(geometry: Geometry, longest: int, budget: Budget) -> int:
    """Return how many rows of that length are probed: the run's, or what the budget allows."""
    held = int((budget.held / few_heads(geometry).heads) ** 0.5) // longest
    return min(geometry.rows, held)


def whole_row(geometry: Geometry, budget: Budget) -> int:
    """Return the tokens of a probe with all heads: sequence_len, or what the budget allows."""
    size = geometry.heads * (geometry.head_dim_qk + geometry.head_dim_v) * _DRAWN
    tokens = min(int((budget.whole / geometry.heads) ** 0.5), budget.drawn // size)
    return min(geometry.sequence_len, max(129, tokens))


def two_groups(geometry: Geometry) -> Geometry:
    """Keep two key heads and the number of query heads to each."""
    kv_heads = min(geometry.kv_heads, 2)
    heads = geometry.heads // geometry.kv_heads * kv_heads
    return replace(geometry, heads=heads, kv_heads=kv_heads)


def one_group(geometry: Geometry) -> Geometry:
    """Keep one key head and all query heads to it."""
    return replace(geometry, heads=geometry.heads // geometry.kv_heads, kv_heads=1)


def few_heads(geometry: Geometry) -> Geometry:
    """Keep one key head, and two query heads where the run has several to a key head."""
    heads = min(geometry.heads // geometry.kv_heads, 2)
    return replace(geometry, heads=heads, kv_heads=1)


def short_window(geometry: Geometry) -> Geometry:
    """Shorten a window, so that short documents outgrow it."""
    if geometry.window is None or geometry.window <= _SHORT_WINDOW:
        return geometry
    return replace(geometry, window=_SHORT_WINDOW)
