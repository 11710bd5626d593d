"""Plain matrix products and softmax, in PyTorch: slow, exact, runs everywhere."""

from attnimg.facts import Backend, Needs

BACKEND = Backend(
    name="eager",
    rank=90,
    rank_why="takes every model, and stores all attention scores of a row",
    rank_source="transformers 5.22.2, eager_attention_forward (2026-11-26)",
    summary="plain PyTorch attention",
    packing="mask",
    needs_dtype_cast=False,
    applied_as="eager",
    mask="eager",
    needs=Needs(),
)
