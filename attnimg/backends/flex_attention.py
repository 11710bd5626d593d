"""Define PyTorch's FlexAttention: a Triton kernel that is compiled for each mask.

On a CPU it has a forward pass only: torch 2.13 raises NotImplementedError, "FlexAttention does not
support backward on CPU" (seen 2026-11-21).
"""

from attnimg.facts import Backend, Needs, Rank

BACKEND = Backend(
    name="flex_attention",
    rank=60,
    rank_why="supports any mask, and compiles a kernel for it at its first use",
    rank_source="torch 2.13, flex_attention.py (2026-11-26)",
    ranks=(
        Rank(
            rank=64,
            head_dim=(257, 1 << 16),
            why="exceeds shared memory at large head sizes",
            source="pytorch #180278: OutOfResources at head_dim 192 with its default tiles "
            "(2026-11-21)",
        ),
    ),
    summary="PyTorch FlexAttention (Triton)",
    packing="native",
    applied_as="flex_attention",
    mask="flex",
    needs=Needs(
        capability_min=(8, 0),
        arch_code="arch-too-old",
        # torch requires 7.0, but there is no evidence that its kernels run below 8.0.
        arch_text="sm_80 or newer, AMD CDNA or RDNA, or a CPU (forward only)",
        features=frozenset({"window", "softcap", "sinks"}),
        # Source: transformers 5.22.2, flex_attention_forward, which raises ValueError (2026-11-27).
        features_missing={"cpu": frozenset({"sinks"})},
        backward=frozenset({"nvidia", "amd"}),
        torch_min=("2.6", "flex-torch"),
    ),
)
