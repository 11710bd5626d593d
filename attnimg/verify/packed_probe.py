"""Show a model documents packed and apart, and differentiate losses by the embeddings.

Each forward pass has one backward pass, as in training: a kernel may free what it saved, or write
into it, once it went backward.
Letters: T tokens of the flattened batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from attnimg.facts import DType, RunContext
from attnimg.layout import PackedLayout

# Tokens of the two documents: different, and no multiples of a kernel's tile.
LENGTHS = (13, 21)
# The documents are made longer than a sliding window or an attention chunk of up to this size.
TINY_WINDOW = 64


def draw_documents(model: Any) -> list[Tensor]:
    """Draw two documents of ordinary tokens; int64, (length,), on the device of the embeddings.

    They are longer than a tiny sliding window, so that a window across a boundary would show, and
    no longer than the model's positions.
    """
    settings = model.config.get_text_config(decoder=True).to_dict()
    windows = (settings.get("sliding_window"), settings.get("attention_chunk_size"))
    window = max((w for w in windows if isinstance(w, int) and w <= TINY_WINDOW), default=0)
    limits = (
        settings.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len")
    )
    longest = min((limit for limit in limits if isinstance(limit, int) and limit > 1), default=4096)
    special = {
        number
        for name, value in settings.items()
        if name.endswith("_token_id")
        for number in (value if isinstance(value, list) else [value])
    }
    embedding = model.get_input_embeddings()
    ordinary = [n for n in range(settings["vocab_size"]) if n not in special] or [0]
    # A generator of its own: the run's random state stays as it is.
    generator = torch.Generator().manual_seed(0)
    lengths = (
        min(longest - 1, max(LENGTHS[0], window + 3)),
        min(longest, max(LENGTHS[1], window + 7)),
    )
    return [
        torch.tensor(ordinary)[torch.randint(len(ordinary), (length,), generator=generator)].to(
            next(embedding.parameters()).device
        )
        for length in lengths
    ]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run with dropout off and gradients on, and leave modes and random state as they were.

    Layers of bitsandbytes keep their mode: on a CPU with AVX512-BF16 a 4-bit layer in evaluation
    mode repacks its weight for a kernel without a backward pass, and never packs it back.
    Source: bitsandbytes/nn/modules.py, Linear4bit.forward, 0.50.2 (2026-11-21).
    """
    training = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            for module, _ in training:
                module.training &= type(module).__module__.startswith("bitsandbytes.")
            yield
    finally:
        for module, mode in training:
            module.training = mode


def forward_apart(model: nn.Module, document: Tensor, *, context: RunContext) -> Tensor:
    """Return the logits of one document alone; (length, V)."""
    positions = torch.arange(len(document), device=document.device)
    inputs = {"input_ids": document[None], "position_ids": positions[None]}
    logits, _ = _forward(model, inputs, autocast=context.autocast)
    return logits.detach()


def packed_inputs(
    rows: list[list[Tensor]], *, layout: PackedLayout, context: RunContext
) -> dict[str, Any]:
    """Return the arguments of a model for rows of documents, as PackedCollator makes them."""
    device = rows[0][0].device
    position_ids = torch.from_numpy(layout.position_ids).to(device)
    is_token = torch.from_numpy(layout.is_token).to(device)
    input_ids = torch.full_like(position_ids, int(rows[0][0][0]))
    input_ids[is_token] = torch.cat([document for row in rows for document in row])
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
    if context.one_row:
        boundaries = torch.from_numpy(layout.cu_seq_lens).to(device)
        inputs |= {f"cu_seq_lens_{side}": boundaries for side in "qk"}
        inputs |= {f"max_length_{side}": layout.max_length for side in "qk"}
    if context.seq_idx:
        inputs["seq_idx"] = torch.from_numpy(layout.seq_idx).to(device)
    return inputs


def _forward(
    model: Any, inputs: dict[str, Any], *, autocast: DType | None
) -> tuple[Tensor, list[Tensor]]:
    """Run a model with leaves in place of its embeddings; logits (T, V) and the leaves."""
    embeddings: list[Tensor] = []

    def swap_in_leaf(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().clone().requires_grad_())
        # A clone, because a model may write into its embeddings, which a leaf does not allow.
        return embeddings[-1].clone()

    hook = model.get_input_embeddings().register_forward_hook(swap_in_leaf)
    try:
        # As in training: the backward pass runs outside of autocast.
        with _precision(inputs["input_ids"].device.type, autocast):
            logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    return logits.flatten(0, 1), embeddings


def _precision(device_type: str, autocast: DType | None) -> AbstractContextManager[object]:
    if autocast is None:
        return nullcontext()
    cast: AbstractContextManager[object] = torch.autocast(device_type, getattr(torch, autocast))
    return cast


def document_bounds(layout: PackedLayout) -> list[tuple[int, int]]:
    """List where each document begins and ends in the flattened batch, padding left out."""
    is_token = layout.is_token.reshape(-1)
    pairs = zip(layout.cu_seq_lens[:-1].tolist(), layout.cu_seq_lens[1:].tolist(), strict=True)
    return [(begin, end) for begin, end in pairs if is_token[begin]]


def with_loss(rows: list[list[Tensor]]) -> list[int]:
    """Choose the documents whose loss is differentiated: the first one and the last of each row.

    The last document of a row has others before it, in its row and in the rows above; the first
    one has all others behind it. The rest would repeat one of these directions.
    """
    last = [sum(map(len, rows[: place + 1])) - 1 for place in range(len(rows))]
    return sorted({0, *last})


def differentiate(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    document: Tensor,
    bounds: tuple[int, int],
    autocast: DType | None,
) -> tuple[Tensor, Tensor]:
    """Run a model on packed rows, and differentiate the loss of one document by all embeddings.

    Args:
        model: with its dropout off.
        inputs: what packed_inputs gave.
        document: the tokens of the document, (length,).
        bounds: where it begins and ends in the flattened batch.
        autocast: the precision of the forward pass.

    Returns:
        The logits (T, V), and for each token the largest gradient of its embedding, float32 (T,).
    """
    logits, embeddings = _forward(model, inputs, autocast=autocast)
    begin, end = bounds
    # Summed, not averaged: float16 gradients of a mean would underflow.
    loss = nn.functional.cross_entropy(
        logits[begin : end - 1].float(), document[1:].to(logits.device), reduction="sum"
    )
    by_token_T = torch.zeros(len(logits), device=logits.device)
    for gradient in torch.autograd.grad(loss, embeddings, allow_unused=True):
        if gradient is not None:
            by_token_T += gradient.float().abs().reshape(len(logits), -1).amax(-1)
    return logits.detach(), by_token_T
