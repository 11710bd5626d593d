"""scaled_dot_product_attention pinned to its plain kernel, one document at a time.

Slow, and it holds all scores of a document at once; but it runs on every device and refuses no
size. This is the file to copy for a new backend. Source: torch 2.13, the docstring of
torch.nn.functional.scaled_dot_product_attention: only "fused kernels" have limits (2026-11-25).
"""

from functools import partial

from attnimg.facts import AttentionFunction, Backend, Needs

_FEATURES = frozenset({"window", "dropout"})


def _load() -> AttentionFunction:
    from attnimg.backends._pinned import attend_pinned

    return partial(attend_pinned, "sdpa_math", "MATH", _FEATURES)


BACKEND = Backend(
    name="sdpa_math",
    rank=85,
    rank_why="stores the attention scores of one document, where eager stores those of a row",
    rank_source="torch 2.13, docstring of scaled_dot_product_attention (2026-11-25)",
    summary="PyTorch's plain attention",
    packing="native",
    in_config=False,
    applied_as="attnimg_torch_math",
    load_attend=_load,
    needs=Needs(features=_FEATURES),
)
