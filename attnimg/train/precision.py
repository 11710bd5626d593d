"""Which weights are kept in which precision.

Mixed precision is the run's precision for matrix multiplications; the weights themselves follow
axolotl's rule: in a full fine-tune embeddings and norms stay float32, unless the backend takes
q, k and v as they come (needs_dtype_cast) or an adapter is trained, and then everything is cast.
Source: axolotl src/axolotl/loaders/model.py, lines 422-477 and 1025-1047 (2026-11-21).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from attnimg.config.schema import Config
from attnimg.facts import DType, RunContext

if TYPE_CHECKING:
    import torch

# What modules that hold embeddings are called across model types.
EMBEDDING_NAMES = (
    "embed_tokens", "lm_head", "embed_in", "embed_out", "word_embeddings", "embeddings", "wte",
)  # fmt: skip


def loading_dtype(config: Config, dtype: DType) -> DType:
    """Tell in which precision the weights are loaded.

    float16 has too few exponent bits for the weights of a full fine-tune: they stay float32, and
    autocast computes in float16. Frozen weights under an adapter may be float16.
    """
    if dtype == "float16" and not config.adapter:
        return "float32"
    return dtype


def keeps_float32(config: Config, *, context: RunContext, needs_dtype_cast: bool) -> bool:
    """Return whether embeddings and norms stay float32 beside bfloat16 weights.

    Without autocast a float32 norm would hand float32 to a bfloat16 layer.
    """
    plain = not needs_dtype_cast and not config.adapter and not config.fsdp
    return context.autocast == "bfloat16" and plain


def cast_embeddings_and_norms(model: Any) -> None:
    """Cast embeddings and norms of `model` to float32, in place.

    Their loaded dtypes, by name, are kept in `model.attnimg_loaded_dtypes` for
    `restore_loaded_dtypes`.
    """
    import torch

    before = _floating(model)
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        norm = "norm" in leaf.lower() or "ln" in re.split(r"[_\d]", leaf)
        if norm or leaf in EMBEDDING_NAMES:
            module.to(torch.float32)
    after = _floating(model)
    model.attnimg_loaded_dtypes = {k: dtype for k, dtype in before.items() if after[k] != dtype}


def _floating(model: Any) -> dict[str, torch.dtype]:
    """Return the dtype of each floating-point parameter and buffer."""
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: weight.dtype for name, weight in weights.items() if weight.is_floating_point()}


def torch_dtype(dtype: DType) -> torch.dtype:
    """Give torch's object for a name of ours."""
    import torch

    named: torch.dtype = getattr(torch, dtype)
    return named
