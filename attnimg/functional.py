"""Compute attention of q, k and v in plain PyTorch, with the best backend that fits them.

Letters: B batch, T query tokens, S key tokens, H query heads, G key heads, D head size of q and k,
V head size of v.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from functools import cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_args

from attnimg import pipeline
from attnimg.api.advice import public
from attnimg.api.arguments import backend_name
from attnimg.api.choice import LoggedReport
from attnimg.backends._transformers import applied_form, attention_function, is_called_directly
from attnimg.config.attention import VARIABLE
from attnimg.errors import AttnimgError, counted
from attnimg.facts import Arch, AttentionFunction, DType, MaskKind
from attnimg.machine.kernel_cache import use_shipped_kernels
from attnimg.run_facts import LayerGroup, Model, Problem
from attnimg.selection import known_bad
from attnimg.task import Task, installed_machine

if TYPE_CHECKING:
    from torch import Tensor


@public()
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
        cu_seqlens_k: the same for k and v; None for equal documents.
        max_seqlen: queries of the longest document; None computes it, which waits for the GPU.
        max_seqlen_k: keys of the longest document; None for `max_seqlen`, or computed.
        window: how many keys a query attends to, its own included, at least 1; None for all.
        softcap: cap of the scores: softcap * tanh(scores / softcap); None for none.
        sinks: one logit a head that takes part in the softmax without a value, (H,); None for none.
        scale: factor on q @ k, positive; None for D ** -0.5.
        dropout: probability with which attention weights are dropped, less than 1.
        backend: "auto", or the name of a backend, as in a config's attn_implementation. The
            environment variable ATTNIMG_BACKEND replaces "auto".
        verify: whether the backend must pass its proof on this machine.

    Returns:
        The output, (B, T, H, V) or (T, H, V), in the dtype of q, also under torch.autocast. It is
        zero for queries without keys.

    Raises:
        KernelError: no allowed backend fits these tensors and passes its proof.
        AttnimgError: the shapes or dtypes do not match, or a number is out of range.

    Example:
        >>> import attnimg, torch
        >>> q, k = torch.randn(1, 16, 8, 64), torch.randn(1, 16, 2, 64)
        >>> attnimg.attention(q, k, torch.randn(1, 16, 2, 64), window=4, verify=False).shape
        torch.Size([1, 16, 8, 64])
    """
    _require_matching(q, k, v, sinks)
    _require_boundaries(q, k, (cu_seqlens, cu_seqlens_k), (max_seqlen, max_seqlen_k))
    _require_in_range(window=window, softcap=softcap, scale=scale, dropout=dropout)
    if packed := q.dim() == 3:
        q, k, v = q[None], k[None], v[None]
    layer = LayerGroup(
        count=1,
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim_qk=q.shape[3],
        head_dim_v=v.shape[3],
        window=window if window is not None and window < max(q.shape[1], k.shape[1]) else None,
        softcap=softcap or None,
        sinks=sinks is not None,
    )
    function = _function(
        layer,
        str(q.dtype).removeprefix("torch."),
        q.device.type,
        packing=cu_seqlens is not None,
        dropout=dropout,
        # Proofs cover the backward pass, which flex_attention lacks on a CPU.
        training=verify or any(x is not None and x.requires_grad for x in (q, k, v, sinks)),
        requested=backend_name(backend),
        verify=verify,
        variable=os.environ.get(VARIABLE),
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
    variable: str | None,  # noqa: ARG001  a key of the cache: the choice depends on it
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
    import torch

    causal = arguments["is_causal"]
    layer = SimpleNamespace(is_causal=causal, training=True, layer_idx=0)
    found = None
    if mask is not None:
        visible_TS = _visible(q_BHTD, k_BGSD, arguments)
        found = _flex_mask(visible_TS) if mask == "flex" else _eager_mask(visible_TS, q_BHTD.dtype)
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        arguments = {name: value for name, value in arguments.items() if name not in names}
    # The backend was chosen and verified for the dtype of q.
    with torch.autocast(q_BHTD.device.type, enabled=False):
        out, _ = function(layer, q_BHTD, k_BGSD, v_BGSV, found, **arguments)
    output: Tensor = out
    if mask == "eager":
        # The softmax of a row whose scores are all masked is uniform, over all documents.
        output = output.masked_fill(~visible_TS.any(-1)[:, None, None], 0)
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


def _require_matching(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """Raise unless the shapes, dtypes and devices of the inputs match one another."""
    tensors = (q, k, v) if sinks is None else (q, k, v, sinks)
    _require_tensors(*tensors)
    shapes = f"found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() not in (3, 4) or not q.dim() == k.dim() == v.dim():
        raise _mismatch("q, k and v are not all (B, T, H, D) or all (T, H, D)", shapes)
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1] or q.shape[:-3] != k.shape[:-3]:
        raise _mismatch(
            "the shapes of q, k and v do not match",
            f"{shapes}; needed q (B, T, H, D), k (B, S, G, D), v (B, S, G, V)",
        )
    if 0 in (*q.shape[-2:], *v.shape[-2:]):
        raise _mismatch("q, k and v have no heads, or a head_dim of 0", shapes)
    if q.shape[-2] % k.shape[-2]:
        raise _mismatch("the query heads are not a multiple of the key heads", shapes)
    if not q.dtype == k.dtype == v.dtype or str(q.dtype).removeprefix("torch.") not in get_args(
        DType
    ):
        raise _mismatch(
            "the dtypes of q, k and v are not all float32, float16 or bfloat16",
            f"found {q.dtype}, {k.dtype}, {v.dtype}",
        )
    if sinks is not None and (sinks.shape != q.shape[-2:-1] or not sinks.is_floating_point()):
        raise _mismatch(
            "sinks is not one logit a head, (H,)",
            f"found {sinks.dtype} {tuple(sinks.shape)} for {q.shape[-2]} heads",
        )
    devices = {str(tensor.device): tensor.device.type for tensor in tensors}
    if len(devices) > 1 or not {"cpu", "cuda"}.issuperset(devices.values()):
        raise _mismatch("the tensors are not all on one GPU or the CPU", f"found {[*devices]}")


def _require_tensors(*found: object) -> None:
    import torch

    for one in found:
        if not isinstance(one, torch.Tensor):
            raise _mismatch("an argument is not a tensor", f"found {type(one).__name__}")


def _require_boundaries(
    q: Tensor,
    k: Tensor,
    cu_seqlens: tuple[Tensor | None, Tensor | None],
    max_seqlen: tuple[int | None, int | None],
) -> None:
    """Raise unless the boundaries of documents match q and k, each a pair for the two.

    Their values are checked on a CPU alone: on a GPU, each call would wait for it.
    """
    import torch

    ends_q, ends_k = cu_seqlens
    if ends_q is None:
        if ends_k is not None:
            raise _mismatch("cu_seqlens_k needs cu_seqlens", "found cu_seqlens_k alone")
        return
    if q.dim() == 4:
        raise _mismatch(
            "cu_seqlens is only for packed tensors (T, H, D)", f"found q {tuple(q.shape)}"
        )
    longest_q, longest_k = max_seqlen
    found = [("cu_seqlens", ends_q, q, longest_q)]
    if ends_k is not None:
        found.append(("cu_seqlens_k", ends_k, k, longest_k))
    elif len(q) != len(k):
        raise _mismatch(
            "q and k have different numbers of tokens, and cu_seqlens_k is missing",
            f"found {len(q)} and {len(k)} tokens",
        )
    for name, ends, tokens, longest in found:
        _require_tensors(ends)
        if ends.dim() != 1 or ends.dtype != torch.int32 or len(ends) < 2:
            raise _mismatch(
                f"{name} is not int32 (documents + 1,)", f"found {ends.dtype} {tuple(ends.shape)}"
            )
        if ends.device != q.device:
            raise _mismatch(
                f"{name} is not on the device of q", f"found {ends.device}, needed {q.device}"
            )
        if len(ends) != len(ends_q):
            raise _mismatch(
                "cu_seqlens and cu_seqlens_k have different numbers of documents",
                f"found {len(ends_q) - 1} and {len(ends) - 1}",
            )
        if ends.is_cuda:
            continue
        if (ends[0], ends[-1]) != (0, len(tokens)):
            raise _mismatch(
                f"{name} does not go from 0 to the number of tokens",
                f"found {ends[0]} to {ends[-1]} for {counted(len(tokens), 'token')}",
            )
        lengths = ends.diff()
        if lengths.min() < 0:
            raise _mismatch(f"{name} decreases", f"found a document of {lengths.min()} tokens")
        if longest is not None and lengths.max() > longest:
            raise _mismatch(
                f"{name.replace('cu_seqlens', 'max_seqlen')} is less than the longest document",
                f"found {longest}, needed {lengths.max()}",
            )


def _require_in_range(
    *, window: int | None, softcap: float | None, scale: float | None, dropout: float
) -> None:
    """Raise for a number with which backends would compute different things."""
    checks = {
        "window is not a positive integer": (
            window,
            window is None or (isinstance(window, int) and window >= 1),
        ),
        "softcap is not positive and finite": (softcap, not softcap or 0 < softcap < math.inf),
        "scale is not positive and finite": (scale, scale is None or 0 < scale < math.inf),
        "dropout is not in [0, 1)": (dropout, 0 <= dropout < 1),
    }
    for what, (found, right) in checks.items():
        if not right:
            raise _mismatch(what, f"found {found!r}")


def _mismatch(what: str, why: str) -> AttnimgError:
    return AttnimgError(
        what, why=why, do="pass what `help(attnimg.attention)` describes", code="bad-value"
    )
