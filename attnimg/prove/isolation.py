"""Prove on the real model that packed documents can't see each other, before the first step.

Two short documents are shown packed, laid out as in training, and apart. Each must get the same
logits both ways, and no document's loss may send any gradient into another one's embeddings. A
table of model types would not do: whether position_ids reach the mask depends on the model, the
backend and the version of transformers, and where they don't, training is wrong without a word.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from attnimg.errors import AttnimgError
from attnimg.facts import DType
from attnimg.layout import lay_out
from attnimg.prove.packed_probe import (
    document_bounds,
    draw_documents,
    forward_apart,
    forward_packed,
    gradients,
    undisturbed,
)

# Rows are padded to a multiple of this, so that the probe has padding as training has.
PAD_TO = 8
# Share of the largest logit by which packed and apart may differ, by the coarsest precision in use.
# Nine model types of 2 and 12 layers differ by up to 9e-7, 1.7e-3 and 1.2e-2 of it, five that leak
# by 0.3 and more (CPU, 2026-11-21). The gradient is exact in any precision.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True, kw_only=True, slots=True)
class IsolationProof:
    """What the check found.

    Attributes:
        model_type: transformers' model_type.
        backend: the attention implementation the model ran with.
        one_row: whether rows were flattened to (1, T) and came with document boundaries.
        isolated: whether packed documents are safe from one another.
        why: the figures in a sentence, or what the model raised.
        logits_error: largest difference between packed and apart; below float32 that of a
            document's median token. None, as the other figures, when it never came to that.
        logits_tolerance: what is allowed.
        leaked_gradient: largest gradient of a document's loss on what is not its own; 0.0 exactly
            where documents are isolated.
        own_gradient: largest gradient of a document's loss on its own embeddings, the smallest of
            the documents; 0.0 means a cut backward pass, where leaked_gradient says nothing.
    """

    model_type: str
    backend: str
    one_row: bool
    isolated: bool
    why: str
    logits_error: float | None = None
    logits_tolerance: float | None = None
    leaked_gradient: float | None = None
    own_gradient: float | None = None


def check_isolation(
    model: nn.Module, *, implementation: str, one_row: bool, autocast: DType | None = None
) -> IsolationProof:
    """Show a model two documents packed and apart, and compare.

    The model is left as it was: mode of every module, gradients, hooks and random state. Dropout
    is off meanwhile.

    Args:
        model: a transformers causal language model, PEFT-wrapped and quantized ones included.
        implementation: the attention it runs with, for the proof.
        one_row: the layout PackedCollator uses in this run.
        autocast: the precision the run autocasts to, None for none.

    Returns:
        The proof. A model that raises on packed documents has failed; nothing is raised here.
    """
    proof = IsolationProof(
        model_type=model.config.model_type,
        backend=implementation,
        one_row=one_row,
        isolated=False,
        why="",
    )
    try:
        figures = _compare(model, one_row=one_row, autocast=autocast)
    # Model code and kernels raise anything: ValueError where transformers refuses packing,
    # TypeError on an unknown argument, IndexError past a position table. The reason is kept.
    except Exception as error:
        return replace(proof, why=f"the model raised {type(error).__name__}: {error}")
    if not all(map(math.isfinite, figures)):
        return replace(
            proof, why="the model's logits or gradients are not finite (NaN or infinite)"
        )
    return _judge(proof, figures)


def require_isolation(proof: IsolationProof) -> None:
    """Stop the run unless documents are isolated.

    Raises:
        AttnimgError: they are not (`packing-not-isolated`).
    """
    if proof.isolated:
        return
    other = (
        "attn_implementation: sdpa (isolates most models by a mask)"
        if proof.one_row
        else "attn_implementation: flash_attention_2 (its kernels get the documents' boundaries)"
    )
    raise AttnimgError(
        f"{proof.model_type} on {proof.backend} does not keep packed documents apart",
        why=f"{proof.why}\nneeded: equal logits packed and apart, no gradient between documents",
        do=f"set sample_packing: false, or try {other}",
        code="packing-not-isolated",
        key="sample_packing",
        exit_code=1,
    )


class _Figures(NamedTuple):
    """The figures of IsolationProof."""

    logits_error: float
    logits_tolerance: float
    leaked_gradient: float
    own_gradient: float


def _compare(model: nn.Module, *, one_row: bool, autocast: DType | None) -> _Figures:
    """Measure how far documents packed and apart differ, and what crosses between them."""
    documents = draw_documents(model)
    rows = [documents, documents[::-1]]
    lengths = [[len(document) for document in row] for row in rows]
    layout = lay_out(lengths, one_row=one_row, pad_to=PAD_TO)
    bounds = document_bounds(layout)
    dtype = getattr(torch, autocast) if autocast else None
    precision = torch.autocast(documents[0].device.type, dtype=dtype) if dtype else nullcontext()
    with undisturbed(model), precision:
        apart = [forward_apart(model, document).float() for document in documents]
        packed, embeddings = forward_packed(model, rows, layout=layout)
        leaked, own = gradients(packed, embeddings, rows=rows, bounds=bounds)
    coarsest = _coarsest_dtype(model, packed.dtype, autocast=dtype)
    errors = []
    for (begin, end), logits in zip(bounds, [*apart, *apart[::-1]], strict=True):
        by_token = (packed[begin:end].float() - logits).abs().amax(-1)
        # A mixture of experts may send a token elsewhere on a rounding difference, which low
        # precision makes likely. That moves a token or two, a leak most of a document.
        errors.append(by_token.max() if coarsest is torch.float32 else by_token.median())
    return _Figures(
        logits_error=torch.stack(errors).max().item(),
        logits_tolerance=TOLERANCE[coarsest] * torch.cat(apart).abs().max().item(),
        leaked_gradient=leaked,
        own_gradient=own,
    )


def _judge(proof: IsolationProof, figures: _Figures) -> IsolationProof:
    """Complete the proof with the figures and what follows from them."""
    faults = []
    if figures.logits_error > figures.logits_tolerance:
        faults.append(
            f"logits differ by {figures.logits_error:.1e} packed and apart (allowed"
            f" {figures.logits_tolerance:.1e})"
        )
    if figures.leaked_gradient:
        faults.append(
            f"a document's loss has a gradient of {figures.leaked_gradient:.1e} on another document"
        )
    if not figures.own_gradient:
        faults.append("a document's loss has no gradient on the document itself")
    good = (
        f"logits packed and apart agree to {figures.logits_error:.1e} (allowed"
        f" {figures.logits_tolerance:.1e}), no gradient between documents"
    )
    why = "; ".join(faults) or good
    return replace(proof, isolated=not faults, why=why, **figures._asdict())


def _coarsest_dtype(
    model: nn.Module, logits: torch.dtype, *, autocast: torch.dtype | None
) -> torch.dtype:
    """Tell the coarsest precision at work, in weights, logits, autocast or matrix products."""
    dtypes = {logits, autocast, *(weight.dtype for weight in model.parameters())}
    dtypes |= {getattr(module, "compute_dtype", None) for module in model.modules()}
    quantized = any(weight.dtype in (torch.int8, torch.uint8) for weight in model.parameters())
    if torch.bfloat16 in dtypes or quantized:
        return torch.bfloat16
    tf32 = torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
    return torch.float16 if torch.float16 in dtypes or tf32 else torch.float32
