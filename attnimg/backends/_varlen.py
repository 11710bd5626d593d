"""Parse an attention call, find its documents, and pass them to a kernel.

Every argument that a model passes is used or refused, never dropped. Varlen kernels take all
documents of a batch in one row with their boundaries (cu_seqlens), other kernels one at a time.

Letters: B batch, T query tokens, S key tokens, H query heads, G key heads, D head size of q and k,
V head size of v; N and M are the query and key tokens of all documents together.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnimg.backends._loading import kernel_error, unsupported_argument
from attnimg.backends.flash_attention_2 import ARGUMENTS
from attnimg.facts import AttentionFunction

# Arguments that models pass through and that do not change what attention computes.
# Source: call sites of 348 modeling files of transformers 5.22.2 (2026-11-21).
_HARMLESS = frozenset(
    {
        "cache_position", "deterministic", "labels", "logits_to_keep", "num_items_in_batch",
        "output_hidden_states", "output_router_logits", "position_embeddings", "return_dict",
        "seq_idx", "shift_labels", "skip_logits", "use_cache", "use_return_dict",
    }
)  # fmt: skip
DenseKernel = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCall:
    """One attention call, with all arguments that affect its result.

    Attributes:
        backend: the backend's name, for errors.
        q: queries, (B, H, T, D).
        k: keys, (B, G, S, D).
        v: values, (B, G, S, V).
        scale: factor on q @ k.
        causal: whether keys after a query are masked; the last query is aligned with the last key.
        window: how many keys a query attends to, its own included; without `causal` also as many
            to the right. None for all.
        softcap: scores become softcap * tanh(scores / softcap); None for none.
        sinks: one logit per head that is added to the softmax, (H,); None for none.
        dropout: dropout probability of the attention weights.
        padding: False on padding, else True, (B, S); None without padding.
        cu_seqlens_q: where documents begin and end in the flattened queries, int32
            (documents + 1,); None when the rows are not packed.
        cu_seqlens_k: the same in the keys.
        max_seqlen_q: the longest document's queries.
        max_seqlen_k: the longest document's keys.
        position_ids: (B, T); they restart where a packed document begins. None when not given.
    """

    backend: str
    q: Any
    k: Any
    v: Any
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    sinks: Any
    dropout: float
    padding: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    position_ids: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTokens:
    """The tokens of a batch without padding, its documents one after another.

    Attributes:
        q: (N, H, D).
        k: (M, G, D).
        v: (M, G, V).
        cu_seqlens_q: where documents begin and end in q, int32 (documents + 1,).
        cu_seqlens_k: the same in k and v.
        max_seqlen_q: queries of the longest document.
        max_seqlen_k: keys of the longest one.
        indices: the positions of q's tokens in the flattened batch, (N,); None for all.
        shape: (B, T) of the batch.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    indices: Tensor | None
    shape: tuple[int, int]

    @property
    def boundaries(self) -> tuple[Tensor, Tensor, int, int]:
        """Return cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, the order of kernels."""
        return self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q, self.max_seqlen_k


def as_attention_function(
    backend: str, features: Collection[str], compute: Callable[[AttentionCall], Tensor]
) -> AttentionFunction:
    """Return a function of transformers' attention interface; see _transformers.py.

    Args:
        backend: the backend's name, for errors.
        features: which of "window", "softcap", "sinks", "dropout" it supports.
        compute: maps a call to its output, (B, T, H, V).
    """

    def attention(*layer_and_tensors: Any, **arguments: Any) -> tuple[Tensor, None]:
        call = read_call(backend, *layer_and_tensors, features=features, **arguments)
        return compute(call), None

    return attention


def read_call(
    backend: str,
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    features: Collection[str],
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    position_ids: Any = None,
    cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
    **others: Any,
) -> AttentionCall:
    """Parse the arguments of one call of transformers' attention interface.

    attention_mask is None, or (B, S), False on padding. `features` are those of "window",
    "softcap", "sinks" and "dropout" that the backend supports. The default of is_causal is the
    layer's, that of scaling is D ** -0.5, and that of cu_seq_lens_k is cu_seq_lens_q. max_length_q
    and max_length_k are ints or tensors of one element; None computes them from cu_seq_lens_q and
    cu_seq_lens_k.

    Raises:
        AttnimgError: an argument changes the result and the backend does not support it.
    """
    longest = max(query.shape[2], key.shape[2])
    window = sliding_window if sliding_window and sliding_window < longest else None
    refused = {
        "window": window,
        "softcap": softcap or None,
        "sinks": s_aux,
        "dropout": dropout or None,
    }
    refused = {name: found for name, found in refused.items() if name not in features}
    refused |= {name: found for name, found in others.items() if name not in _HARMLESS}
    refused["output_attentions"] = others.get("output_attentions") or None
    if attention_mask is not None and attention_mask.dim() != 2:
        refused["attention_mask"] = attention_mask
    for name, found in refused.items():
        if found is not None:
            shape = getattr(found, "shape", None)
            text = repr(found) if shape is None else f"a tensor of shape {tuple(shape)}"
            why = f"found {name}: {text}; without it, the result of {backend} would be wrong"
            raise unsupported_argument(backend, why)
    cu_seqlens_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    return AttentionCall(
        backend=backend,
        q=query,
        k=key,
        v=value,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        window=window,
        softcap=softcap or None,
        sinks=s_aux,
        dropout=dropout,
        padding=None if attention_mask is None else attention_mask.bool(),
        cu_seqlens_q=cu_seq_lens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=_max_seqlen(max_length_q, cu_seq_lens_q),
        max_seqlen_k=_max_seqlen(max_length_k, cu_seqlens_k),
        position_ids=position_ids,
    )


def _max_seqlen(length: Any, cu_seqlens: Any) -> int | None:
    if cu_seqlens is None:
        return None
    return int(cu_seqlens.diff().max() if length is None else length)


def packed_tokens(call: AttentionCall) -> PackedTokens | None:
    """Return the documents of a call; None when each row is one document without padding.

    They are found from the padding, or else from the boundaries that a collator passed, or else
    from position_ids that restart within a row. transformers supports the latter for one row only;
    here each row is checked.
    """
    if call.padding is not None:
        return _remove_padding(call, call.padding)
    if call.cu_seqlens_q is not None:
        return _flatten(call, call.cu_seqlens_q, call.cu_seqlens_k)
    positions = call.position_ids
    rows, queries = call.q.shape[0], call.q.shape[2]
    if positions is None or queries == 1 or queries != call.k.shape[2]:
        return None
    if positions.dim() != 2:
        raise kernel_error(
            f"{call.backend} can't find packed documents in this model's position_ids",
            why=f"found the shape {tuple(positions.shape)}, needed (batch, tokens)",
            code="argument-not-honoured",
        )
    begins = positions.diff(dim=-1) != 1
    if not begins.any():
        return None
    begins = pad(begins, (1, 0), value=True).expand(rows, -1).flatten()
    cu_seqlens = pad(begins.nonzero().flatten(), (0, 1), value=rows * queries)
    return _flatten(call, cu_seqlens, cu_seqlens)


def attention_by_document(
    call: AttentionCall,
    dense: DenseKernel | None,
    packed: Callable[[PackedTokens], Tensor] | None = None,
) -> Tensor:
    """Return the output of a dense or varlen kernel for a call that may have padding or packing.

    Args:
        call: the attention call.
        dense: maps q (B, H, T, D), k and v to (B, H, T, V), without padding or packing. None:
            rows are passed to `packed` as documents.
        packed: maps documents to (N, H, V); None: `dense` computes each document.

    Returns:
        (B, T, H, V), zeros on padding.
    """
    tokens = packed_tokens(call)
    if tokens is None:
        if dense is not None:
            return dense(call.q, call.k, call.v).transpose(1, 2)
        rows, queries, keys = call.q.shape[0], call.q.shape[2], call.k.shape[2]
        row = torch.arange(rows + 1, device=call.q.device, dtype=torch.int32)
        call = replace(call, max_seqlen_q=queries, max_seqlen_k=keys)
        tokens = _flatten(call, row * queries, row * keys)
    if packed is not None:
        out = packed(tokens)
    else:
        assert dense is not None
        out = attend_each_document(tokens, dense)
    rows, queries = tokens.shape
    if tokens.indices is not None:
        empty = out.new_zeros(rows * queries, *out.shape[1:])
        out = empty.index_copy(0, tokens.indices, out)
    return out.reshape(rows, queries, *out.shape[1:])


def attend_each_document(tokens: PackedTokens, dense: DenseKernel) -> Tensor:
    """Return (N, H, V), computed by one call of a dense kernel per document."""
    lengths_q, lengths_k = (x.diff().tolist() for x in (tokens.cu_seqlens_q, tokens.cu_seqlens_k))
    pieces = zip(
        tokens.q.split(lengths_q),
        tokens.k.split(lengths_k),
        tokens.v.split(lengths_k),
        strict=True,
    )
    # Kernels need not take documents without queries; without any query there is nothing to skip.
    outs = [
        dense(*(piece.transpose(0, 1)[None] for piece in document))[0].transpose(0, 1)
        for document in pieces
        if len(document[0]) or not len(tokens.q)
    ]
    return torch.cat(outs)


def _flatten(call: AttentionCall, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> PackedTokens:
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (call.q, call.k, call.v))
    return PackedTokens(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q.int(),
        cu_seqlens_k=cu_seqlens_k.int(),
        max_seqlen_q=call.max_seqlen_q or int(cu_seqlens_q.diff().max()),
        max_seqlen_k=call.max_seqlen_k or int(cu_seqlens_k.diff().max()),
        indices=None,
        shape=(call.q.shape[0], call.q.shape[2]),
    )


def _remove_padding(call: AttentionCall, is_token: Tensor) -> PackedTokens:
    """Return the rows without their padding; queries are aligned with the last T keys."""
    is_token = is_token[:, -call.k.shape[2] :]
    is_query = is_token[:, -call.q.shape[2] :]
    cu_seqlens_q, cu_seqlens_k = (
        pad(mask.sum(-1).cumsum(0), (1, 0)).int() for mask in (is_query, is_token)
    )
    call = replace(call, max_seqlen_q=None, max_seqlen_k=None)
    whole = _flatten(call, cu_seqlens_q, cu_seqlens_k)
    indices_q, indices_k = (mask.flatten().nonzero().flatten() for mask in (is_query, is_token))
    return replace(
        whole,
        q=whole.q[indices_q],
        k=whole.k[indices_k],
        v=whole.v[indices_k],
        indices=indices_q,
    )


def repeat_kv(q: Tensor, k: Tensor, v: Tensor, *, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return k and v repeated to as many heads as q, for kernels without GQA."""
    group = q.shape[dim] // k.shape[dim]
    if group == 1:
        return k, v
    return k.repeat_interleave(group, dim=dim), v.repeat_interleave(group, dim=dim)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel's entry point that runs without torch.autocast, as its backward pass does.

    q, k and v are cast to the precision of the run before the call. In a kernel that is written
    with torch operations, autocast would cast float32 intermediates in the forward pass only, and
    its gradients would not match its output. Compiled kernels are not affected.
    """

    @wraps(function)
    def wrapper(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *args, **kwargs)

    wrapper.runs_without_autocast = True  # type: ignore[attr-defined]  # read by _transformers.py
    return wrapper


@dataclass(frozen=True, kw_only=True, slots=True)
class FlashKernel:
    """FlashAttention's two entry points, called with the arguments of their version.

    Attributes:
        backend: the backend's name, for errors.
        dense: flash_attn_func; None when the kernel has none.
        varlen: flash_attn_varlen_func; None likewise.
        unpadded_v: whether v may have another head_dim than q and k.
    """

    backend: str
    dense: Callable[..., Any] | None
    varlen: Callable[..., Any] | None
    unpadded_v: bool = False

    def __call__(self, *layer_and_tensors: Any, **arguments: Any) -> tuple[Tensor, None]:
        """Compute a call of transformers' attention interface.

        Raises:
            AttnimgError: the model passes something that the kernel has no argument for.
        """
        function = self.varlen or self.dense
        assert function is not None
        parameters = _arguments_of(function)
        features = {
            ours for ours, theirs in ARGUMENTS.items() if any(name in parameters for name in theirs)
        }
        call = read_call(self.backend, *layer_and_tensors, features=features, **arguments)
        options = _options(call, parameters)
        return attention_by_document(
            call,
            (lambda q, k, v: self._dense(q, k, v, options)) if self.dense else None,
            lambda tokens: self._packed(tokens, options),
        ), None

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """Return (B, H, T, V) for q (B, H, T, D)."""
        assert self.dense is not None
        q_BTHD, k_BSGD, v_BSGV = (x.transpose(1, 2) for x in (q, k, self._padded(v, q)))
        out = without_autocast(self.dense)(q_BTHD, k_BSGD, v_BSGV, **options)
        return _output(out, size=v.shape[-1]).transpose(1, 2)

    def _packed(self, tokens: PackedTokens, options: dict[str, Any]) -> Tensor:
        """Return (N, H, V)."""
        if self.varlen is None:
            raise kernel_error(
                f"{self.backend} can't do packed or padded rows",
                why="it exports no flash_attn_varlen_func: packed documents would mix",
                do="set sample_packing: false and micro_batch_size: 1, or another backend",
                code="packing-not-isolated",
            )
        out = without_autocast(self.varlen)(
            tokens.q,
            tokens.k,
            self._padded(tokens.v, tokens.q),
            # flash-attn 4 has another argument in fourth place.
            cu_seqlens_q=tokens.cu_seqlens_q,
            cu_seqlens_k=tokens.cu_seqlens_k,
            max_seqlen_q=tokens.max_seqlen_q,
            max_seqlen_k=tokens.max_seqlen_k,
            **options,
        )
        return _output(out, size=tokens.v.shape[-1])

    def _padded(self, v: Tensor, q: Tensor) -> Tensor:
        missing = q.shape[-1] - v.shape[-1]
        if missing < 0:
            raise unsupported_argument(
                self.backend,
                f"found head_dim {v.shape[-1]} of v and {q.shape[-1]} of q; the kernel takes a "
                "head_dim of v up to that of q",
            )
        return v if self.unpadded_v or not missing else pad(v, (0, missing))


@cache
def _arguments_of(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _options(call: AttentionCall, parameters: frozenset[str]) -> dict[str, Any]:
    """Return the keyword arguments of a call, under the kernel's names for them."""
    options: dict[str, Any] = {"softmax_scale": call.scale, "causal": call.causal}
    if call.window is not None:
        # The window excludes the query's own key: (3, 3) is four keys up to the query, and `causal`
        # masks the rest.
        options["window_size"] = (call.window - 1, call.window - 1)
    if call.softcap:
        options["softcap"] = call.softcap
    if call.dropout:
        options["dropout_p"] = call.dropout
    if call.sinks is not None:
        name = next(name for name in ARGUMENTS["sinks"] if name in parameters)
        options[name] = call.sinks.to(call.q.dtype)
    if "deterministic" in parameters and os.environ.get("FLASH_ATTENTION_DETERMINISTIC") == "1":
        options["deterministic"] = True
    return options


def _output(found: Any, *, size: int) -> Tensor:
    """Return the output without v's padding; some kernels also return the log-sum-exp."""
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out[..., :size]
