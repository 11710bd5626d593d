"""Find the documents of a batch, packed or padded, and lay their tokens one after another.

Letters: see arguments.py; N and M are the query and key tokens of all documents together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnimg.backends._arguments import Call
from attnimg.errors import AttnimgError


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """A batch without padding, its documents one after another.

    Attributes:
        q: (N, H, D).
        k: (M, G, D).
        v: (M, G, V).
        bounds_q: where documents begin and end in q, int32 (documents + 1,).
        bounds_k: the same in k and v.
        longest_q: queries of the longest document.
        longest_k: keys of the longest one.
        places: where q's tokens stood in the flattened batch, (N,); None for everywhere.
        shape: (B, T) of the batch.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bounds_q: Tensor
    bounds_k: Tensor
    longest_q: int
    longest_k: int
    places: Tensor | None
    shape: tuple[int, int]


def documents_of(call: Call) -> Documents | None:
    """Find the documents of a call; None when each row is one document without padding.

    Padding comes first, then the bounds that a collator passed, then position_ids that begin anew
    within a row. transformers takes the latter for one row only; here each row is looked at.
    """
    if call.padding is not None:
        return _without_padding(call, call.padding)
    if call.bounds_q is not None:
        return _flattened(call, call.bounds_q, call.bounds_k)
    positions = call.position_ids
    rows, queries = call.q.shape[0], call.q.shape[2]
    if positions is None or queries == 1 or queries != call.k.shape[2]:
        return None
    if positions.dim() != 2:
        raise AttnimgError(
            f"{call.backend} can't tell from this model's position_ids whether rows are packed",
            why=f"found the shape {tuple(positions.shape)}, needed (batch, tokens)",
            do="set attn_implementation: sdpa",
            code="argument-not-honoured",
            key="attn_implementation",
            exit_code=1,
        )
    begins = positions.diff(dim=-1) != 1
    if not begins.any():
        return None
    begins = torch.nn.functional.pad(begins, (1, 0), value=True).expand(rows, -1).flatten()
    bounds = begins.nonzero().flatten()
    bounds = torch.nn.functional.pad(bounds, (0, 1), value=rows * queries).int()
    return _flattened(call, bounds, bounds)


def attend_by_document(
    call: Call,
    dense: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    packed: Callable[[Documents], Tensor] | None = None,
) -> Tensor:
    """Attend with a kernel that knows one document at a time, or documents in a row.

    Args:
        call: what to compute.
        dense: q (B, H, T, D), k and v to (B, H, T, V); no padding, no packing. None takes rows
            for documents.
        packed: documents to (N, H, V); None sends each document through `dense`.

    Returns:
        (B, T, H, V), zeros on padding.
    """
    documents = documents_of(call)
    if documents is None and dense is not None:
        return dense(call.q, call.k, call.v).transpose(1, 2)
    documents = documents or rows_as_documents(call)
    if packed is not None:
        out = packed(documents)
    else:
        assert dense is not None
        out = one_by_one(documents, dense)
    rows, queries = documents.shape
    if documents.places is not None:
        empty = out.new_zeros(rows * queries, *out.shape[1:])
        out = empty.index_copy(0, documents.places, out)
    return out.reshape(rows, queries, *out.shape[1:])


def rows_as_documents(call: Call) -> Documents:
    """Take each row of a batch without padding and packing for one document."""
    rows, queries, keys = call.q.shape[0], call.q.shape[2], call.k.shape[2]
    steps = torch.arange(rows + 1, device=call.q.device, dtype=torch.int32)
    bare = replace(call, longest_q=queries, longest_k=keys)
    return _flattened(bare, steps * queries, steps * keys)


def one_by_one(documents: Documents, dense: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Send each document through a dense kernel; gives (N, H, V)."""
    lengths_q, lengths_k = (
        bounds.diff().tolist() for bounds in (documents.bounds_q, documents.bounds_k)
    )
    pieces = zip(
        documents.q.split(lengths_q),
        documents.k.split(lengths_k),
        documents.v.split(lengths_k),
        strict=True,
    )
    outs = [
        dense(*(piece.transpose(0, 1)[None] for piece in document))[0].transpose(0, 1)
        for document in pieces
        if len(document[0])
    ]
    return torch.cat(outs)


def _flattened(call: Call, bounds_q: Tensor, bounds_k: Tensor) -> Documents:
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (call.q, call.k, call.v))
    return Documents(
        q=q,
        k=k,
        v=v,
        bounds_q=bounds_q.int(),
        bounds_k=bounds_k.int(),
        longest_q=call.longest_q or int(bounds_q.diff().max()),
        longest_k=call.longest_k or int(bounds_k.diff().max()),
        places=None,
        shape=(call.q.shape[0], call.q.shape[2]),
    )


def _without_padding(call: Call, is_token: Tensor) -> Documents:
    """Take padding out; a row is one document, and the last T keys are those of the queries."""
    rows, queries = call.q.shape[0], call.q.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (call.q, call.k, call.v))
    is_token = is_token[:, -call.k.shape[2] :]
    is_query = is_token[:, -queries:]
    places_q, places_k = (mask.flatten().nonzero().flatten() for mask in (is_query, is_token))
    lengths_q, lengths_k = is_query.sum(-1), is_token.sum(-1)
    return Documents(
        q=q[places_q],
        k=k[places_k],
        v=v[places_k],
        bounds_q=torch.nn.functional.pad(lengths_q.cumsum(0), (1, 0)).int(),
        bounds_k=torch.nn.functional.pad(lengths_k.cumsum(0), (1, 0)).int(),
        longest_q=int(lengths_q.max()),
        longest_k=int(lengths_k.max()),
        places=places_q,
        shape=(rows, queries),
    )
