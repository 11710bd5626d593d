"""Keep freed memory in the process while it trains on a CPU.

Each training step allocates the tensors that the step before has freed. glibc returns freed memory
at the end of its heap to the system, and the next step gets it back page by page, each filled with
zeros. How much is returned depends on which small blocks happen to lie at the end of the heap.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from attnimg.memory.amounts import SMALL

# Source: glibc 2.36, malloc/malloc.h, and man mallopt(3): -1 keeps all of the heap (2026-11-28).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEEP_ALL = -1

# Variables with which a user chooses what glibc returns. Source: man mallopt(3) (2026-11-28).
_VARIABLES = (
    "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_",
)  # fmt: skip


@contextmanager
def keep_freed_memory(environ: Mapping[str, str], *, cpu: bool) -> Iterator[None]:
    """Keep freed blocks of less than SMALL bytes inside the block; return all of them after it.

    It has no effect where the C library has no mallopt (musl), or another allocator is in use.

    Args:
        environ: os.environ; with glibc's own variables, the user decides.
        cpu: whether the run is on a CPU; on a GPU, the tensors are in the memory of the GPU.
    """
    library = ctypes.CDLL(None)
    chosen = any(environ.get(name) for name in _VARIABLES)
    chosen = chosen or "glibc.malloc." in environ.get("GLIBC_TUNABLES", "")
    if not cpu or chosen or not hasattr(library, "mallopt"):
        yield
        return
    # glibc raises the second threshold to SMALL itself as soon as a block of that size is freed,
    # but no longer once the first one is set.
    library.mallopt(_TRIM_THRESHOLD, _KEEP_ALL)
    library.mallopt(_MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:
        # glibc's own ratio of the two.
        library.mallopt(_TRIM_THRESHOLD, 2 * SMALL)
        library.malloc_trim(0)
