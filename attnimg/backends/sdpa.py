"""PyTorch's own scaled_dot_product_attention: always there, and it picks its inner kernel.

Packed rows reach it with a block-diagonal mask, which costs memory quadratic in the row and rules
out its flash kernel. Source: transformers 5.22.2, masking_utils.py (read 2026-11-21).
On sm_90 and sm_10x it takes cuDNN's kernel first, which builds a plan for each new shape of a call,
a second or less; TORCH_CUDNN_SDPA_DEPRIORITIZED=1 puts that kernel last. See verify/compiled.py.
"""

from attnimg.facts import Backend, Needs, Rank

BACKEND = Backend(
    name="sdpa",
    rank=50,
    rank_why="picks the best of PyTorch's own kernels by itself",
    rank_source="torch 2.13, docstring of scaled_dot_product_attention (2026-11-26)",
    ranks=(
        Rank(
            rank=62,
            packed=True,
            routed=False,
            why="gets packed rows with a mask, and scores each token against its whole row",
            source="transformers 5.22.2, masking_utils.py:find_packed_sequence_indices "
            "(2026-11-26)",
        ),
    ),
    summary="PyTorch scaled_dot_product_attention",
    packing="mask",
    needs_dtype_cast=False,
    applied_as="sdpa",
    mask="sdpa",
    # No argument for a soft cap or for sinks: transformers refuses the first and has models of the
    # second say that they do not support it. Source: torch 2.13 signature; transformers 5.22.2.
    needs=Needs(features=frozenset({"window", "dropout"})),
)
