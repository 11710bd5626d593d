"""Call layers without softmax attention once per document, where they take no boundaries.

Linear attention, state spaces and short convolutions carry a state from token to token, which only
some of their kernels reset at document boundaries. A layer that is called with one document at a
time never sees another one. That is correct on every device, and slower: a row of ten documents
takes ten calls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

# Arguments of a layer that describe documents, padding or a cache: not those of one document.
_OF_THE_BATCH = frozenset(
    {"attention_mask", "cache_params", "past_key_values", "cu_seq_lens_q", "cu_seq_lens_k",
     "cu_seqlens", "max_length_q", "max_length_k", "seq_idx", "position_ids"}
)  # fmt: skip
# A row of the batch, and the begin and end of a document in it.
Span = tuple[int, int, int]


def call_by_document(model: Any, class_names: Collection[str]) -> Callable[[], None]:
    """Change a model so that some of its layers are called with one document at a time.

    The documents are read from the arguments of the model's decoder: seq_idx (B, S), else
    position_ids (B, S), which start at 0 in each document. The layers take hidden_states (B, S, D)
    first, or by this name, and return a tensor (B, S, D).

    Args:
        model: a transformers model, which PEFT may have wrapped.
        class_names: names of the layers' classes.

    Returns:
        A function that undoes the change.

    Raises:
        LookupError: the model has no layer of these classes.
    """
    layers = [module for module in model.modules() if type(module).__name__ in class_names]
    if not layers:
        raise LookupError(f"the model has none of the layers {', '.join(sorted(class_names))}")
    spans: list[Span] = []

    def read_documents(_module: nn.Module, _args: Any, arguments: dict[str, Any]) -> None:
        spans[:] = _find_spans(arguments.get("seq_idx"), arguments.get("position_ids"))

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = base.base_model.register_forward_pre_hook(read_documents, with_kwargs=True)
    for layer in layers:
        layer.forward = _per_document(layer.forward, spans)

    def undo() -> None:
        hook.remove()
        for layer in layers:
            layer.__dict__.pop("forward", None)

    return undo


def _find_spans(seq_idx: Tensor | None, position_ids: Tensor | None) -> Iterator[Span]:
    """Yield the spans of all documents; none if each row is one document."""
    if seq_idx is not None:
        starts = seq_idx.diff(dim=-1) != 0
    elif position_ids is not None and position_ids.dim() == 2:
        starts = position_ids[:, 1:] == 0
    else:
        return
    if not starts.any():
        return
    for row, is_start in enumerate(starts.cpu()):
        bounds = [0, *(is_start.nonzero().flatten() + 1).tolist(), len(is_start) + 1]
        yield from ((row, begin, end) for begin, end in pairwise(bounds))


def _per_document(forward: Callable[..., Tensor], spans: list[Span]) -> Callable[..., Tensor]:
    def call(*args: Any, **arguments: Any) -> Tensor:
        if not spans:
            return forward(*args, **arguments)
        hidden_BSD = args[0] if args else arguments.pop("hidden_states")
        assert len(args) < 2, "a layer without softmax attention takes its arguments by name"
        rows, tokens = hidden_BSD.shape[:2]
        kept = {key: value for key, value in arguments.items() if key not in _OF_THE_BATCH}
        assert (spans[-1][0] + 1, spans[-1][2]) == (rows, tokens), "documents of another batch"
        parts: list[list[Tensor]] = [[] for _ in range(rows)]
        for row, begin, end in spans:
            parts[row].append(forward(hidden_BSD[row : row + 1, begin:end], **kept))
        return torch.cat([torch.cat(row, dim=1) for row in parts])

    # torch.compile would compile its loop again for each batch's documents.
    uncompiled: Callable[..., Tensor] = torch.compiler.disable(call)
    return uncompiled
