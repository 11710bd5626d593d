"""Call layers without softmax attention once per document, if they take no boundaries.

Linear attention, state spaces and short convolutions carry a state from token to token, which only
some of their kernels reset at document boundaries. A layer that is called with one document at a
time never sees another one. That is correct on every device, and slower: a row of ten documents
takes ten calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from attnimg.application.model import inner_model

# Arguments about documents, padding or cache of a whole batch; a call for one document has none.
_OF_THE_BATCH = frozenset(
    {"attention_mask", "cache_params", "past_key_values", "cu_seq_lens_q", "cu_seq_lens_k",
     "cu_seqlens", "max_length_q", "max_length_k", "seq_idx", "position_ids"}
)  # fmt: skip
# A document: its row in the batch, its first token, and the token after its last one.
Span = tuple[int, int, int]


def call_by_document(model: Any, class_names: Collection[str]) -> None:
    """Change a model so that some of its layers are called with one document at a time.

    The documents are read from the arguments of the model's decoder: seq_idx (B, S), else
    position_ids (B, S), which start at 0 in each document, with B rows of S tokens. The layers take
    hidden_states (B, S, D), with hidden size D, as the first argument or by this name, and return a
    tensor (B, S, D).

    Args:
        model: a transformers model, which PEFT may have wrapped.
        class_names: names of the layers' classes.

    Raises:
        LookupError: the model has no layer of these classes.
    """
    layers = [module for module in model.modules() if type(module).__name__ in class_names]
    if not layers:
        raise LookupError(f"the model has none of the layers {', '.join(sorted(class_names))}")
    call_whole_rows(model)
    documents = _Documents()
    decoder = inner_model(model).base_model
    decoder.register_forward_pre_hook(documents, with_kwargs=True)
    for layer in layers:
        # A partial of the layer, which copy.deepcopy and pickle bind to the copy.
        layer.forward = partial(_forward_by_document, layer, documents)


def call_whole_rows(model: Any) -> None:
    """Undo call_by_document, also for a copy of the model."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Documents)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        forward = module.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func is _forward_by_document:
            del module.forward


class _Documents:
    """The documents of the batch that the model computes, read before its decoder runs."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def __call__(self, _module: nn.Module, _args: Any, arguments: dict[str, Any]) -> None:
        self.spans = list(_find_spans(arguments.get("seq_idx"), arguments.get("position_ids")))


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


# Its loop depends on the documents of the batch: torch.compile would compile it for each batch.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch 2.13 has no types for it
def _forward_by_document(layer: Any, documents: _Documents, *args: Any, **arguments: Any) -> Tensor:
    forward = partial(type(layer).forward, layer)
    if not documents.spans:
        return forward(*args, **arguments)
    hidden_BSD = args[0] if args else arguments.pop("hidden_states")
    assert len(args) < 2, "a layer without softmax attention takes its arguments by name"
    kept = {key: value for key, value in arguments.items() if key not in _OF_THE_BATCH}
    rows: list[list[Tensor]] = [[] for _ in hidden_BSD]
    for row, begin, end in documents.spans:
        rows[row].append(forward(hidden_BSD[row : row + 1, begin:end], **kept))
    return torch.cat([torch.cat(parts, dim=1) for parts in rows])
