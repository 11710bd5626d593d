"""Add up the bytes of tensors; small ones separately, since a CPU allocates them differently."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Smaller blocks come from the heap, whose memory glibc keeps when they are freed; larger ones from
# mmap, and are returned. Source: glibc 2.36, malloc/malloc.c, DEFAULT_MMAP_THRESHOLD_MAX: the
# threshold grows to it as soon as a block of that size is freed (2026-11-27).
SMALL = 32 << 20


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes of several tensors.

    Attributes:
        total: bytes of all tensors.
        small: bytes of the tensors that are smaller than SMALL.
    """

    total: int = 0
    small: int = 0

    def __add__(self, other: Amount) -> Amount:
        """Return the sum of both."""
        return Amount(self.total + other.total, self.small + other.small)

    def times(self, count: int) -> Amount:
        """Return the bytes of `count` such sets of tensors."""
        return Amount(self.total * count, self.small * count)


def amount(sizes: Iterable[int]) -> Amount:
    """Return the bytes of tensors of these sizes."""
    found = list(sizes)
    return Amount(sum(found), sum(size for size in found if size < SMALL))
