"""Compute attention of q, k and v in plain PyTorch, with the best backend that fits them.

Letters: B batch, T query tokens, S key tokens, H query heads, G key heads, D head size of q and k,
V head size of v.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from functools import cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_args

from attnimg import pipeline
from attnimg.api import LoggedReport, backend_name
from attnimg.backends._transformers import applied_form, attention_function, is_called_directly
from attnimg.errors import AttnimgError
from attnimg.facts import Arch, AttentionFunction, DType, LayerGroup, MaskKind, Model, Problem
from attnimg.machine.kernel_cache import use_shipped_kernels
from attnimg.selection import known_bad
from attnimg.task import Task, installed_machine

if TYPE_CHECKING:
    from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
    verify: bool = True,
) -> Tensor:
    """Compute softmax attention, differentiable in q, k, v and sinks.

    The backend is chosen once for each combination of shapes, features and dtype, and verified on
    this machine before its first call: in a subprocess, a few seconds, cached on disk. Proofs cover
    causal attention.

    Args:
        q: queries, (B, T, H, D); or packed documents, (T, H, D).
        k: keys, (B, S, G, D) or (S, G, D); H is a multiple of G.
        v: values, (B, S, G, V) or (S, G, V).
        causal: whether a query attends only to keys up to its own position. The last query is
            aligned with the last key.
        cu_seqlens: the boundaries of the packed documents in q, int32 (documents + 1,), from 0 to
            T; for (T, H, D) only. None for one document.
        cu_seqlens_k: the same for k and v; None if they are equal to those of q.
        max_seqlen: queries in the longest document; None: computed, which waits for the GPU.
        max_seqlen_k: keys in the longest document; None: `max_seqlen` if cu_seqlens_k is None,
            computed otherwise.
        window: how many keys a query attends to, including its own; None for all.
        softcap: cap of the scores: softcap * tanh(scores / softcap); None for none.
        sinks: one logit per head that enters the softmax without a value, (H,); None for none.
        scale: factor on q @ k; None for D ** -0.5.
        dropout: probability with which attention weights are dropped.
        backend: "auto", or the name of a backend, as in a config's attn_implementation. The
            environment variable ATTNIMG_BACKEND replaces "auto".
        verify: whether the backend must pass its proof on this machine.

    Returns:
        The output, (B, T, H, V) or (T, H, V), in the dtype of q.

    Raises:
        KernelError: no allowed backend fits these tensors and passes its proof.
        AttnimgError: the shapes or dtypes do not match.

    Example:
        >>> import attnimg, torch
        >>> q, k = torch.randn(1, 16, 8, 64), torch.randn(1, 16, 2, 64)
        >>> attnimg.attention(q, k, torch.randn(1, 16, 2, 64), window=4, verify=False).shape
        torch.Size([1, 16, 8, 64])
    """
    _require_matching(q, k, v, cu_seqlens, cu_seqlens_k)
    if packed := q.dim() == 3:
        q, k, v = q[None], k[None], v[None]
    layer = LayerGroup(
        count=1,
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim_qk=q.shape[3],
        head_dim_v=v.shape[3],
        window=window if window is not None and window < k.shape[1] else None,
        softcap=softcap or None,
        sinks=sinks is not None,
    )
    function = _function(
        layer,
        str(q.dtype).removeprefix("torch."),
        q.device.type,
        packing=cu_seqlens is not None,
        dropout=dropout,
        training=any(x.requires_grad for x in (q, k, v)),
        requested=backend_name(backend),
        verify=verify,
    )
    arguments: dict[str, Any] = {"scaling": scale, "dropout": dropout, "is_causal": causal}
    if layer.window:
        arguments["sliding_window"] = layer.window
    if layer.softcap:
        arguments["softcap"] = layer.softcap
    if sinks is not None:
        arguments["s_aux"] = sinks
    if cu_seqlens is not None:
        ends_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        arguments |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": ends_k}
        longest = max_seqlen if cu_seqlens_k is None else max_seqlen_k
        arguments |= {"max_length_q": max_seqlen, "max_length_k": max_seqlen_k or longest}
    out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), arguments)
    return out[0] if packed else out


@cache
def _function(
    layer: LayerGroup,
    dtype: DType,
    device: str,
    *,
    packing: bool,
    dropout: float,
    training: bool,
    requested: str | None,
    verify: bool,
) -> Callable[..., Tensor]:
    """Select a backend for a kind of call, and return its attention function.

    Raises:
        KernelError: no allowed backend fits, or passes its proof.
    """
    machine = installed_machine()
    if device == "cpu":
        machine = replace(machine, arch=Arch(name="cpu", vendor="cpu"), gpu="cpu")
    use_shipped_kernels(machine)
    problem = Problem(
        model=Model(type="attention", layers=(layer,)),
        dtype=dtype,
        packing=packing,
        dropout=dropout,
        compiled=False,
        checkpointing=False,
        sequence_len=None,
        rows=1,
        autocast=False,
        training=training,
        known_bad=known_bad.load(None, today=date.today()),
    )
    task = Task(machine=machine, problem=problem, requested=requested, strict=True)
    plan = pipeline.select(task, LoggedReport())
    if verify:
        plan, _ = pipeline.verify_plan(plan, task, LoggedReport(), direct=True)
    assert plan.chosen is not None
    backend = plan.chosen.backend
    if is_called_directly(backend):
        direct = applied_form(backend, [layer], routed=True)
        return partial(_call, attention_function(direct), None)
    return partial(_call, attention_function(backend), backend.mask)


def _call(
    function: AttentionFunction,
    mask: MaskKind | None,
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSV: Tensor,
    arguments: dict[str, Any],
) -> Tensor:
    """Call a function of transformers' attention interface; return (B, T, H, V)."""
    causal = arguments["is_causal"]
    layer = SimpleNamespace(is_causal=causal, training=True, layer_idx=0)
    found = None
    if mask is not None:
        visible_TS = _visible(q_BHTD, k_BGSD, arguments)
        found = _flex_mask(visible_TS) if mask == "flex" else _eager_mask(visible_TS, q_BHTD.dtype)
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        arguments = {name: value for name, value in arguments.items() if name not in names}
    out, _ = function(layer, q_BHTD, k_BGSD, v_BGSV, found, **arguments)
    output: Tensor = out
    return output


def _visible(q_BHTD: Tensor, k_BGSD: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Return which keys each query attends to, bool (T, S)."""
    import torch

    queries, keys, device = q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.device
    ends_q = arguments.get("cu_seq_lens_q", torch.tensor([0, queries], device=device)).long()
    ends_k = arguments.get("cu_seq_lens_k", torch.tensor([0, keys], device=device)).long()
    query_T, key_S = torch.arange(queries, device=device), torch.arange(keys, device=device)
    document_T = torch.searchsorted(ends_q, query_T, right=True) - 1
    document_S = torch.searchsorted(ends_k, key_S, right=True) - 1
    # The last query of a document is aligned with its last key.
    place_T = query_T - ends_q[document_T + 1] + ends_k[document_T + 1]
    ahead_TS = key_S - place_T[:, None]
    visible_TS = document_T[:, None] == document_S
    if arguments["is_causal"]:
        visible_TS &= ahead_TS <= 0
    if (window := arguments.get("sliding_window")) is not None:
        visible_TS &= ahead_TS.abs() < window
    return visible_TS


def _eager_mask(visible_TS: Tensor, dtype: Any) -> Tensor:
    import torch

    mask = torch.zeros(visible_TS.shape, dtype=dtype, device=visible_TS.device)
    return mask.masked_fill(~visible_TS, torch.finfo(dtype).min)[None, None]


def _flex_mask(visible_TS: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def look_up(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        return visible_TS[query, key]

    queries, keys = visible_TS.shape
    return create_block_mask(look_up, None, None, queries, keys, device=visible_TS.device)


def _require_matching(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None
) -> None:
    """Raise unless the shapes and dtypes of the inputs match one another."""
    import torch

    shapes = f"found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() not in (3, 4) or not q.dim() == k.dim() == v.dim():
        raise _mismatch("q, k and v are not all (B, T, H, D) or all (T, H, D)", shapes)
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1] or q.shape[:-3] != k.shape[:-3]:
        raise _mismatch(
            "the shapes of q, k and v do not match",
            f"{shapes}; needed q (B, T, H, D), k (B, S, G, D), v (B, S, G, V)",
        )
    if q.shape[-2] % k.shape[-2]:
        raise _mismatch("the query heads are not a multiple of the key heads", shapes)
    if not q.dtype == k.dtype == v.dtype or str(q.dtype).removeprefix("torch.") not in get_args(
        DType
    ):
        raise _mismatch(
            "the dtypes of q, k and v are not all float32, float16 or bfloat16",
            f"found {q.dtype}, {k.dtype}, {v.dtype}",
        )
    if (cu_seqlens is not None or cu_seqlens_k is not None) and q.dim() == 4:
        raise _mismatch("cu_seqlens is only for packed tensors (T, H, D)", shapes)
    if cu_seqlens is None and cu_seqlens_k is not None:
        raise _mismatch("cu_seqlens_k needs cu_seqlens", "found cu_seqlens_k alone")
    named = (("cu_seqlens", cu_seqlens, q), ("cu_seqlens_k", cu_seqlens_k, k))
    for name, ends, packed in named:
        if ends is not None and (ends.dim() != 1 or ends.dtype != torch.int32 or len(ends) < 2):
            raise _mismatch(
                f"{name} is not int32 (documents + 1,)", f"found {ends.dtype} {tuple(ends.shape)}"
            )
        # Not on a GPU, where it would wait for the GPU at each call.
        if ends is not None and not ends.is_cuda and (ends[0], ends[-1]) != (0, len(packed)):
            raise _mismatch(
                f"{name} does not go from 0 to the number of tokens",
                f"found {ends[0]} to {ends[-1]} for {len(packed)} tokens",
            )


def _mismatch(what: str, why: str) -> AttnimgError:
    return AttnimgError(
        what,
        why=why,
        do="pass tensors of the shapes and dtypes in `help(attnimg.attention)`",
        code="bad-value",
    )
