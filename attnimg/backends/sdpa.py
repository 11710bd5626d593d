"""PyTorch's own scaled_dot_product_attention: always there, and it picks its inner kernel.

Packed rows reach it with a block-diagonal mask, which costs memory quadratic in the row and rules
out its flash kernel. Source: transformers 5.22.2, masking_utils.py (read 2026-11-21).
"""

from attnimg.facts import Backend, Needs

BACKEND = Backend(
    name="sdpa",
    rank=50,
    summary="PyTorch scaled_dot_product_attention",
    packing="mask",
    needs_dtype_cast=False,
    applied_as="sdpa",
    mask="sdpa",
    # No argument for a soft cap or for sinks: transformers refuses the first and has models of the
    # second say that they do not support it. Source: torch 2.13 signature; transformers 5.22.2.
    needs=Needs(features=frozenset({"window", "dropout"})),
)
