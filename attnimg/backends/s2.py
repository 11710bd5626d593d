"""Shifted sparse attention (LongLoRA): groups of tokens, half the heads shifted by half a group.

Another function than full attention, so `auto` never takes it. LLaMA only, no packing.
Source: LongLoRA, arXiv 2309.12307, and its llama_attn_replace.py: see _shifted_sparse.py.
"""

from functools import partial

from attnimg.facts import AttentionFunction, Backend, Needs


def _load() -> AttentionFunction:
    from attnimg.backends._shifted_kernels import group_kernels
    from attnimg.backends._shifted_sparse import attend_shifted

    return partial(attend_shifted, group_kernels())


BACKEND = Backend(
    name="s2",
    rank=80,
    rank_why="computes another function than full attention",
    rank_source="arXiv 2309.12307 (2026-11-21)",
    summary="shifted sparse attention",
    packing="none",
    uses_flash_lib=True,
    automatic=False,
    applied_as="attnimg_s2",
    load_attend=_load,
    # It is proven against a reference of its own: verify/shifted.py.
    pattern="shifted",
    needs=Needs(
        features=frozenset(),
        model_types=frozenset({"llama"}),
        model_code="s2-not-llama",
    ),
)
