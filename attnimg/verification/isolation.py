"""Check on the real model that packed documents can't see each other, before the first step.

The model is called with short documents packed, as in the run, and one by one. Each document must
get the same logits both ways, and its loss must have no gradient with respect to the embeddings of
another document. A table of model types would not suffice: whether position_ids affect the mask
depends on the model, the backend and the version of transformers. Where they don't, training is
wrong without any error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnimg.context import describe_context
from attnimg.errors import AttnimgError, PackingLeak, out_of_memory_error, set_backend
from attnimg.facts import DType
from attnimg.layout import PackedLayout, lay_out
from attnimg.run_facts import RunContext

# A collator: rows of documents, int64 (length,) each, to the arguments of the model.
Collate = Callable[[list[list[Tensor]]], dict[str, Any]]

# Rows are padded to a multiple of this, so that they have padding as in training.
PAD_TO = 8

# Largest difference between the logits of packed and separate documents, as a share of the largest
# logit, by the coarsest precision in use. Nine model types of 2 and 12 layers differ by up to 9e-7,
# 1.7e-3 and 1.2e-2; five that leak differ by 0.3 and more (CPU, 2026-11-21).
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}

# Largest gradient that a document's loss may have on another document, as a share of that on its
# own embeddings, in any precision: 8 roundings of float32. It is 0 where other documents have an
# attention weight of 0, as with a mask of -inf or of the dtype's lowest number, since exp()
# underflows to 0 below -104. Such a gradient is a sum of zeros, which atomic adds and other orders
# of summation do not change, so noise can't look like a leak. The tolerance is for code that masks
# with a number like -50 (exp(-50) is 2e-22), or subtracts two sums over the row; real leaks are
# larger.
LEAK = 2.0**-20


class CollatorError(AttnimgError):
    """A collator raised, or did not return a batch with the documents that it got."""

    def __init__(self, why: str) -> None:
        super().__init__(
            "packing can't be checked with this collator",
            why=why,
            do="pass the collator that the trainer packs with, or none",
            code="bad-value",
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Return how to pickle it."""
        return type(self), (self.why,)


@dataclass(frozen=True, kw_only=True, slots=True)
class IsolationProof:
    """The result of the check.

    Attributes:
        model_type: transformers' model_type.
        backend: the attention implementation that the model ran with.
        context: how it was called.
        isolated: whether packed documents do not affect one another.
        code: the error code where they do: packing-not-isolated; model-raised if the model raised;
            not-finite if its logits or gradients are NaN or inf; otherwise None.
        why: the figures in a sentence, or what the model raised.
        logits_error: largest difference of the logits between packed and separate documents; in
            precisions below float32 that of a document's median token. None, like the other
            figures, if the model raised.
        logits_tolerance: the allowed difference.
        leaked_gradient: largest gradient of a document's loss on the embeddings of another one.
        own_gradient: largest gradient of a document's loss on its own embeddings, the smallest of
            all documents; 0.0 means that the backward pass is cut off, so that leaked_gradient
            proves nothing.
    """

    model_type: str
    backend: str
    context: RunContext
    isolated: bool
    code: str | None
    why: str
    logits_error: float | None = None
    logits_tolerance: float | None = None
    leaked_gradient: float | None = None
    own_gradient: float | None = None


def check_isolation(
    model: nn.Module,
    *,
    implementation: str,
    context: RunContext,
    collate: Collate | None = None,
) -> IsolationProof:
    """Run a model on documents packed and one by one, and compare the results.

    The modes of all modules, gradients, hooks and random states are restored. Dropout and
    checkpointing are off during the check: checkpointing calls a layer twice with the same
    arguments, which the kernel's own proof covers.

    Args:
        model: a transformers causal language model, PEFT-wrapped and quantized ones included.
        implementation: the attention that it runs with, recorded in the proof.
        context: how the run calls the model.
        collate: makes the model's inputs from rows of documents; None for batches as attnimg's own
            trainer makes them.

    Returns:
        The proof. A model that raises on packed documents has failed.

    Raises:
        CollatorError: `collate` raised, or its batch does not have the documents.
        PackingLeak: `collate` raised it.
        AttnimgError: out of memory, which proves nothing about the model (code out-of-memory).
    """
    proof = IsolationProof(
        model_type=model.config.model_type,
        backend=implementation,
        context=context,
        isolated=False,
        code="model-raised",
        why="",
    )
    try:
        figures = _compare(model, context=context, collate=collate)
    except (CollatorError, PackingLeak):
        raise
    # Model code and kernels may raise anything: ValueError where transformers refuses packing,
    # TypeError on an unknown argument, IndexError beyond a position table. The reason is kept.
    except Exception as error:
        if (full := out_of_memory_error(error)) is not None:
            raise full from error
        return replace(proof, why=f"the model raised {type(error).__name__}: {error}")
    if not all(map(math.isfinite, figures)):
        why = "the model's logits or gradients are not finite (NaN or infinite)"
        return replace(proof, code="not-finite", why=why)
    return _judge(proof, figures)


def require_isolation(proof: IsolationProof) -> None:
    """Raise unless documents are isolated.

    Raises:
        AttnimgError: they are not, or the model raised; the code is the proof's.
    """
    if proof.isolated:
        return
    other = (
        f"{set_backend('sdpa')} (isolates most models by a mask)"
        if proof.context.padding_free
        else f"{set_backend('flash_attention_2')} (its kernels get document boundaries)"
    )
    what = f"{proof.model_type} on {proof.backend} does not isolate packed documents"
    needed = "the same logits for a document packed and alone, no gradient between documents"
    do = f"set sample_packing: false, or {other}"
    if proof.code == "model-raised":
        what = f"{proof.model_type} on {proof.backend} raised an error on packed documents"
        needed = f"a model that runs on packed rows ({describe_context(proof.context)})"
        do = f"if the error names a package or a setting, correct that; else {do}"
    if proof.code == "not-finite":
        what = f"{proof.model_type} on {proof.backend} computes NaN or infinite values"
        needed = f"finite logits and gradients ({describe_context(proof.context)})"
        do = f"{set_backend('eager')} to rule out the attention kernel, or {other}"
        if proof.context.dtype == "float16":
            do = "set bf16: true, which has the range of float32 (the largest float16 is 65504)"
    raise PackingLeak(
        what,
        why=f"{proof.why}\nneeded: {needed}",
        do=do,
        code=proof.code or "packing-not-isolated",
        key="sample_packing",
        exit_code=1,
    )


class _Figures(NamedTuple):
    """The figures of IsolationProof."""

    logits_error: float
    logits_tolerance: float
    leaked_gradient: float
    own_gradient: float


def _compare(model: nn.Module, *, context: RunContext, collate: Collate | None) -> _Figures:
    """Measure the differences between packed and separate documents, and leaked gradients."""
    documents = make_documents(model)
    rows = [documents, documents[::-1]] if context.rows > 1 else [documents]
    flat = [document for row in rows for document in row]
    if collate is not None:
        inputs, bounds = _collated(collate, rows)
    else:
        lengths = [[len(document) for document in row] for row in rows]
        layout = lay_out(lengths, padding_free=context.padding_free, pad_to=PAD_TO)
        bounds = document_bounds(layout)
        inputs = packed_inputs(rows, layout=layout, context=context)
    with evaluation_mode(model):
        alone = [forward_alone(model, document, context=context).float() for document in documents]
        leaked, own = [], []
        for place in documents_with_loss(rows):
            packed, by_token_T = differentiate(
                model,
                inputs,
                document=flat[place],
                bounds=bounds[place],
                autocast=context.autocast,
            )
            begin, end = bounds[place]
            own.append(by_token_T[begin:end].max())
            by_token_T[begin:end] = 0.0
            leaked.append(by_token_T.max())
    coarsest = _coarsest_dtype(model, packed.dtype, context=context)
    errors = []
    for (begin, end), logits in zip(bounds, [*alone, *alone[::-1]][: len(bounds)], strict=True):
        by_token = (packed[begin:end].float() - logits).abs().amax(-1)
        # In low precision, rounding may make a mixture of experts route a token to other experts.
        # That changes one or two tokens; a leak changes most tokens of a document.
        errors.append(by_token.max() if coarsest is torch.float32 else by_token.median())
    # torch.stack, because Python's max and min may ignore a NaN.
    return _Figures(
        logits_error=torch.stack(errors).max().item(),
        logits_tolerance=TOLERANCE[coarsest] * torch.cat(alone).abs().max().item(),
        leaked_gradient=torch.stack(leaked).max().item(),
        own_gradient=torch.stack(own).min().item(),
    )


def _judge(proof: IsolationProof, figures: _Figures) -> IsolationProof:
    """Return the proof with the figures and the conclusion from them."""
    faults = []
    if figures.logits_error > figures.logits_tolerance:
        faults.append(
            f"logits of packed and separate documents differ by {figures.logits_error:.1e} (allowed"
            f" {figures.logits_tolerance:.1e})"
        )
    if figures.leaked_gradient > LEAK * figures.own_gradient:
        faults.append(
            f"a document's loss has a gradient of {figures.leaked_gradient:.1e} on another document"
        )
    if not figures.own_gradient:
        faults.append("a document's loss has no gradient on the document itself")
    good = (
        f"logits of packed and separate documents agree to {figures.logits_error:.1e} (allowed"
        f" {figures.logits_tolerance:.1e}), no gradient between documents"
    )
    return replace(
        proof,
        isolated=not faults,
        code="packing-not-isolated" if faults else None,
        why="; ".join(faults) or good,
        **figures._asdict(),
    )


def _coarsest_dtype(model: nn.Module, logits: torch.dtype, *, context: RunContext) -> torch.dtype:
    """Return the coarsest precision of weights, logits, autocast and matrix products."""
    cast = getattr(torch, context.autocast) if context.autocast else None
    dtypes = {logits, cast, *(weight.dtype for weight in model.parameters())}
    dtypes |= {getattr(module, "compute_dtype", None) for module in model.modules()}
    quantized = any(weight.dtype in (torch.int8, torch.uint8) for weight in model.parameters())
    if torch.bfloat16 in dtypes or quantized:
        return torch.bfloat16
    tf32 = torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
    return torch.float16 if torch.float16 in dtypes or tf32 else torch.float32


# Lengths of the two documents: different, and not multiples of a kernel's tile.
LENGTHS = (13, 21)

# The documents are made longer than a sliding window or an attention chunk of up to this size.
TINY_WINDOW = 64


def make_documents(model: Any) -> list[Tensor]:
    """Generate two documents of random ordinary tokens; int64, (length,), on the model's device.

    They are longer than a tiny sliding window, so that a window across a boundary is detected, and
    no longer than the model's maximum of positions.
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
    # A separate generator, so that the run's random state does not change.
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
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run with dropout off and gradients on; restore modes and random state after the block.

    Layers of bitsandbytes keep their mode: on a CPU with AVX512-BF16 a 4-bit layer in evaluation
    mode repacks its weight for a kernel without a backward pass, and never undoes that.
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


def forward_alone(model: nn.Module, document: Tensor, *, context: RunContext) -> Tensor:
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
    if context.padding_free:
        boundaries = torch.from_numpy(layout.cu_seq_lens).to(device)
        inputs |= {f"cu_seq_lens_{side}": boundaries for side in "qk"}
        inputs |= {f"max_length_{side}": layout.max_length for side in "qk"}
    if context.seq_idx:
        inputs["seq_idx"] = torch.from_numpy(layout.seq_idx).to(device)
    return inputs


def _forward(
    model: Any, inputs: dict[str, Any], *, autocast: DType | None
) -> tuple[Tensor, list[Tensor]]:
    """Run a model with its embeddings as leaves; return the logits (T, V) and the leaves."""
    embeddings: list[Tensor] = []

    def swap_in_leaf(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().clone().requires_grad_())
        # A clone, because a model may write into its embeddings, which a leaf does not allow.
        return embeddings[-1].clone()

    hook = model.get_input_embeddings().register_forward_hook(swap_in_leaf)
    try:
        # As in training, the backward pass runs outside of autocast.
        with _autocast(inputs["input_ids"].device.type, autocast):
            logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    return logits.flatten(0, 1), embeddings


def _autocast(device_type: str, autocast: DType | None) -> AbstractContextManager[object]:
    if autocast is None:
        return nullcontext()
    context: AbstractContextManager[object] = torch.autocast(device_type, getattr(torch, autocast))
    return context


def document_bounds(layout: PackedLayout) -> list[tuple[int, int]]:
    """Return the start and end of each document in the flattened batch, without padding."""
    is_token = layout.is_token.reshape(-1)
    pairs = zip(layout.cu_seq_lens[:-1].tolist(), layout.cu_seq_lens[1:].tolist(), strict=True)
    return [(begin, end) for begin, end in pairs if is_token[begin]]


def _collated(
    collate: Collate, rows: list[list[Tensor]]
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Return a collator's batch, and the start and end of each document in it, flattened.

    Raises:
        CollatorError: the collator raised, or its batch does not have the documents in order.
    """
    try:
        inputs = collate(rows)
        flat = inputs["input_ids"].flatten()
    except PackingLeak:  # raised for a batch without the boundaries of its documents
        raise
    # A collator is the user's code, and may raise anything. The reason is kept.
    except Exception as error:
        raise CollatorError(f"the collator raised {type(error).__name__}: {error}") from error
    bounds, begin = [], 0
    for document in (document for row in rows for document in row):
        while not torch.equal(flat[begin : begin + len(document)], document):
            begin += 1
            if begin + len(document) > len(flat):
                shape = tuple(inputs["input_ids"].shape)
                raise CollatorError(
                    f"the collator returned input_ids of shape {shape}, which do not have the "
                    "tokens of all documents in order"
                )
        bounds.append((begin, begin + len(document)))
        begin += len(document)
    return inputs, bounds


def documents_with_loss(rows: list[list[Tensor]]) -> list[int]:
    """Return the documents whose loss is differentiated: the first one and the last of each row.

    The last document of a row has others before it, in its row and in earlier rows; the first one
    has all others after it. Other documents would only repeat one of these directions.
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
    """Run a model on packed rows; return one document's loss gradient on all embeddings.

    Args:
        model: with its dropout off.
        inputs: as packed_inputs returns them.
        document: the tokens of the document, (length,).
        bounds: where it begins and ends in the flattened batch.
        autocast: the precision of the forward pass.

    Returns:
        The logits (T, V), and for each token the largest gradient of its embedding, float32 (T,).
    """
    logits, embeddings = _forward(model, inputs, autocast=autocast)
    begin, end = bounds
    # A sum, because float16 gradients of a mean would underflow.
    loss = nn.functional.cross_entropy(
        logits[begin : end - 1].float(), document[1:].to(logits.device), reduction="sum"
    )
    by_token_T = torch.zeros(len(logits), device=logits.device)
    for gradient in torch.autograd.grad(loss, embeddings, allow_unused=True):
        if gradient is not None:
            by_token_T += gradient.float().abs().reshape(len(logits), -1).amax(-1)
    return logits.detach(), by_token_T
