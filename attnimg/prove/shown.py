"""How much of a run's geometry a probe shows: what its memory holds, and what tells most."""

from __future__ import annotations

from dataclasses import replace

from attnimg.facts import Geometry

# Scores held at once by plain attention, heads * tokens squared. The longest probe is cut to it, so
# that no machine runs out of memory on a proof: 134 MB in float32 on a CPU.
BUDGET = {"cpu": 1 << 25, "cuda": 1 << 31}
# The same for the one probe that shows all heads a long document.
_ALL_HEADS = 1 << 23
# A sliding window longer than the short probes would show nothing there.
_SHORT_WINDOW = 37


def longest_of(geometry: Geometry, *, device: str) -> int:
    """Give the longest document that is probed: sequence_len, or what the memory budget allows."""
    few = few_heads(geometry)
    return min(geometry.sequence_len, int((BUDGET[device] / few.heads) ** 0.5))


def rows_of(geometry: Geometry, longest: int, *, device: str) -> int:
    """Give how many rows of the longest are probed: the run's, or what the budget holds at once."""
    held = int((BUDGET[device] / few_heads(geometry).heads) ** 0.5) // longest
    return min(geometry.rows, held)


def longest_of_all_heads(geometry: Geometry, longest: int) -> int:
    """Give the longest document that all heads are shown: a few at a time tell most, and sooner."""
    return min(longest, max(129, int((_ALL_HEADS / geometry.heads) ** 0.5)))


def two_groups(geometry: Geometry) -> Geometry:
    """Keep two key heads and the number of query heads to each."""
    kv_heads = min(geometry.kv_heads, 2)
    heads = geometry.heads // geometry.kv_heads * kv_heads
    return replace(geometry, heads=heads, kv_heads=kv_heads)


def few_heads(geometry: Geometry) -> Geometry:
    """Keep one key head, and two query heads where the run has several to a key head."""
    heads = min(geometry.heads // geometry.kv_heads, 2)
    return replace(geometry, heads=heads, kv_heads=1)


def short_window(geometry: Geometry) -> Geometry:
    """Shorten a window, so that short documents outgrow it."""
    if geometry.window is None or geometry.window <= _SHORT_WINDOW:
        return geometry
    return replace(geometry, window=_SHORT_WINDOW)
