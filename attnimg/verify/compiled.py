"""Prove a kernel that is made for each shape of a call with few shapes: flex_attention and cuDNN's.

transformers compiles flex_attention once for the process, with torch.compile's defaults
(integrations/flex_attention.py, WrappedFlexAttention, 5.22.2). Dynamo compiles it again for what
its guards do not cover: the first change of a size makes that size dynamic, but sizes of 1, a
length below one block of 128 or no multiple of it, another number of heads, another order of
strides, and each set of tensors that need a gradient ask for a graph of their own. After
recompile_limit of them, 8, the function runs uncompiled: slow, with all scores in memory, and not
what training runs. So the probes are laid out in few shapes, and passing the limit is an error.

Documents share a row by a mask, whose contents no guard looks at: packed rows of any documents have
one shape when they are filled up to a common length.

On Hopper and the large Blackwell GPUs, scaled_dot_product_attention takes cuDNN's kernel first, and
cuDNN builds a plan for each new shape: 0.44 s forward and 0.55 s backward on a B200 with torch
2.11. On an H200 with torch 2.11 a proof of sdpa in float16 took 39.6 s, of other backends 3 to 6 s.
Sources: https://github.com/modelscope/FunASR/issues/3704, pytorch/pytorch#155958 (2026-11-26);
docs/gpu-runs.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from attnimg.facts import Backend
from attnimg.verify.cases import Case

# Rows of packed documents are filled up to these: three blocks of 128, and fifteen.
FILLED = (384, 1920)
# Rows of one document that say the most: about the edges of tiles of 64 and of blocks of 128.
EDGES = frozenset({1, 17, 64, 65, 127, 128, 129, 192, 257})
# Graphs that a proof may compile: about twice those that 30 shapes and the ways of
# company.py to ask for gradients come to.
RECOMPILE_LIMIT = 128


def is_compiled(backend: Backend, *, device: str) -> bool:
    """Check whether a backend's kernel is compiled in its first call of a shape."""
    return backend.mask == "flex" and device == "cuda"


def builds_plans(backend: Backend, *, device: str, capability: tuple[int, int] | None) -> bool:
    """Check whether a backend's calls go to cuDNN, which builds a plan for each shape.

    Args:
        backend: which.
        device: "cpu" or "cuda".
        capability: the GPU's compute capability; None for a CPU or an AMD GPU.
    """
    first = capability is not None and capability[0] in (9, 10)
    return backend.name == "sdpa" and device == "cuda" and first


def few_shapes(cases: list[Case]) -> list[Case]:
    """Lay probes out in few shapes: packed rows filled up, other rows around the edges alone."""
    longest = max(max(case.lengths) for case in cases)
    kept = []
    for case in cases:
        plain = case.scores == "spread" and case.scale_factor == case.gradient_scale == 1.0
        heads, length = case.geometry.kv_heads, max(case.lengths)
        # The probes with all heads and the longest ones keep their lengths and layouts.
        special = heads > 2 or length == longest or (heads > 1 and length > max(EDGES))
        # The first probe has two groups of heads, and later ones have its lengths with one.
        fewer = case.geometry.heads < cases[0].geometry.heads
        one_length = len(set(case.lengths)) == 1 and not case.queries
        dropped = one_length and (fewer or length not in EDGES)
        if not case.packed and plain and dropped and not special:
            continue
        laid_out = case if special else replace(case, layout="fused")
        kept.append(_filled(laid_out) if case.packed else laid_out)
    return kept


def shapes_of(cases: list[Case]) -> set[tuple[int | str, ...]]:
    """List the distinct shapes of calls: batch, heads, key heads, queries, keys and layout."""
    found: set[tuple[int | str, ...]] = set()
    for case in cases:
        rows, keys = (
            (1, sum(case.lengths)) if case.packed else (len(case.lengths), max(case.lengths))
        )
        heads = case.geometry.heads, case.geometry.kv_heads
        found.add((rows, *heads, case.queries or keys, keys, case.layout))
    return found


@contextmanager
def compiling_each_shape(backend: Backend, *, device: str) -> Iterator[None]:
    """Let Dynamo compile as many graphs as a proof needs, and raise rather than run uncompiled."""
    if not is_compiled(backend, device=device):
        yield
        return
    import torch._dynamo.config as dynamo

    with dynamo.patch(recompile_limit=RECOMPILE_LIMIT, fail_on_recompile_limit_hit=True):
        yield


def _filled(case: Case) -> Case:
    """Fill a packed row up with one more document, to the next common length."""
    total = sum(case.lengths)
    length = next((length for length in FILLED if length >= total), total)
    # The probe of isolation is left as it is: its last document is one of those that change.
    if length == total or case.repeated:
        return case
    return replace(case, lengths=(*case.lengths, length - total))
