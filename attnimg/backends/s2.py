"""Define LongLoRA's shifted sparse attention (S2-Attn): causal attention within groups of a row.

It is not full attention, so `auto` never chooses it. LLaMA only, no packing.

A row has four groups. For the second half of the heads the groups are shifted by half a group. The
last shifted group would contain the row's last tokens followed by its first ones, which would
attend to the future. LongLoRA's FlashAttention path therefore splits it into the row's first and
last half group, and so does this file; LongLoRA's path without FlashAttention does not split it.
Each group is then causal attention on its own, and one document for a varlen kernel.
Source: arXiv 2309.12307 and its authors' llama_attn_replace.py: group_size_ratio, `shift` in
forward_noflashattn, cu_q_lens in forward_flashattn
(github.com/dvlab-research/LongLoRA, 03ac8a5, read 2026-11-21).

The letters of shapes are explained in _varlen.py; P is T rounded up to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import TYPE_CHECKING

from attnimg.backends.flash_attention_2 import BACKEND as FLASH_2
from attnimg.backends.varlen_attn import load_varlen_attn
from attnimg.errors import AttnimgError
from attnimg.facts import AttentionFunction, Backend, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from attnimg.backends._varlen import AttentionCall

# Groups in a row: group_size_ratio = 1/4.
GROUPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupKernel:
    """A kernel that computes attention within documents.

    Attributes:
        function: a function of transformers' attention interface.
        on_cpu: whether it runs on a CPU, in any dtype; else on a GPU, in half precision.
        has_dropout: whether it supports dropout.
    """

    function: AttentionFunction
    on_cpu: bool
    has_dropout: bool

    def supports(self, call: AttentionCall) -> bool:
        """Return whether the kernel supports a call's device, dtype, shape and dropout."""
        import torch

        q, v = call.q, call.v
        if call.dropout and not self.has_dropout:
            return False
        if self.on_cpu or q.device.type == "cpu":
            return self.on_cpu and q.device.type == "cpu"
        # torch's varlen_attn is built from FlashAttention-2 and has the same limits.
        needs = FLASH_2.needs
        sizes = needs.head_dims[0]
        return (
            q.device.type == "cuda"
            and str(q.dtype).removeprefix("torch.") in needs.dtypes
            and q.shape[-1] == v.shape[-1] <= sizes.qk[1]
            and q.shape[-1] % sizes.multiple == 0
            and torch.cuda.get_device_capability(q.device) >= needs.capability_min
        )

    def within_documents(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]
    ) -> Tensor:
        """Return causal attention within segments of each row, (B, heads, P, V).

        Args:
            call: the call with the scale and the dropout.
            q: (B, heads, P, D).
            k: (B, heads, P, D).
            v: (B, heads, P, V).
            lengths: the lengths of a row's segments; their sum is P.
        """
        import torch

        ends = list(accumulate(lengths * q.shape[0], initial=0))
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=q.device)
        out: Tensor = self.function(
            SimpleNamespace(is_causal=True),
            q,
            k,
            v,
            None,
            scaling=call.scale,
            dropout=call.dropout,
            cu_seq_lens_q=cu_seqlens,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
        )[0]
        return out.transpose(1, 2)


def group_kernels() -> tuple[GroupKernel, ...]:
    """Load FlashAttention-2, from its package or LOCAL_KERNELS, and torch's varlen_attn.

    A missing kernel is left out; one that fails to load is left out with a warning.
    """
    import logging

    import torch

    from attnimg.backends._transformers import flash_kernel

    on_gpu = torch.cuda.is_available()
    loaders: dict[str, Callable[[], AttentionFunction]] = {
        "flash-attn": partial(flash_kernel, FLASH_2, trusted=False)
    }
    if on_gpu:  # torch has no CPU kernel
        loaders["varlen_attn"] = load_varlen_attn
    found = []
    for name, load in loaders.items():
        try:
            function = load()
        except AttnimgError as error:
            if error.code != "not-installed":
                text = "attnimg: s2 does not use %s: %s"
                logging.getLogger(__name__).warning(text, name, error.why)
            continue
        # Without a GPU it is a kernel from LOCAL_KERNELS: the package does not load there.
        dropout = name == "flash-attn"
        found.append(GroupKernel(function=function, on_cpu=not on_gpu, has_dropout=dropout))
    return tuple(found)


def _load() -> AttentionFunction:
    return shifted_attention(group_kernels())


def shifted_attention(kernels: tuple[GroupKernel, ...]) -> AttentionFunction:
    """Return shifted sparse attention.

    The first of `kernels` that supports the call computes the groups; if none does,
    scaled_dot_product_attention computes them.

    A row whose length is not a multiple of 8 is padded at its end. Attention is causal, so padding
    on the right does not change the tokens before it. Rows that are packed, padded on the left, or
    part of a longer context are refused.
    """
    from torch.nn.functional import pad

    from attnimg.backends._varlen import as_attention_function, repeat_kv

    def compute(call: AttentionCall) -> Tensor:
        _require_groupable(call)
        tokens = call.q.shape[2]
        filled = -tokens % (2 * GROUPS)
        kv = repeat_kv(call.q, call.k, call.v)
        q, k, v = (pad(x, (0, 0, 0, filled)) for x in (call.q, *kv))
        half = q.shape[1] // 2
        kernel = next((kernel for kernel in kernels if kernel.supports(call)), None)
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        for heads, shifted in ((slice(half), False), (slice(half, None), True)):
            parts = (x[:, heads] for x in (q, k, v))
            out[:, heads] = _attend_in_groups(call, *parts, shifted=shifted, kernel=kernel)
        return out[:, :, :tokens].transpose(1, 2).contiguous()

    return as_attention_function("s2", ("dropout",), compute)


def _attend_in_groups(
    call: AttentionCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shifted: bool,
    kernel: GroupKernel | None,
) -> Tensor:
    """Return attention within groups, (B, heads, P, V); q, k, v (B, heads, P, D)."""
    from torch import cat

    from attnimg.backends._exact import exact

    if not q.shape[1]:  # with one head, the first half is empty
        return v
    size = q.shape[2] // GROUPS
    half = size // 2
    # When shifted, the row begins and ends with half a group.
    lengths = [half, *[size] * (GROUPS - 1), half] if shifted else [size] * GROUPS
    if kernel is not None:
        return kernel.within_documents(call, q, k, v, lengths)
    segments = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    outs = [exact(*x, scale=call.scale, causal=True, dropout=call.dropout) for x in segments]
    return cat(outs, dim=2)


def _require_groupable(call: AttentionCall) -> None:
    """Raise if a call's rows can't be divided into groups."""
    tokens, keys = call.q.shape[2], call.k.shape[2]
    if tokens != keys:
        raise _batch_error(f"{tokens} queries on {keys} keys: a cache", "as many keys as queries")
    if not call.causal:
        raise _batch_error("attention to both sides", "a causal model")
    packed = call.cu_seqlens_q is not None and len(call.cu_seqlens_q) - 1 > call.q.shape[0]
    positions = call.position_ids
    if call.padding is None and positions is not None and positions.dim() == 2:
        packed = packed or bool((positions.diff(dim=-1) != 1).any())
    if packed:
        raise _batch_error("packed documents", "one document a row", code="s2-with-packing")
    if call.padding is not None and bool((call.padding.diff(dim=-1) & call.padding[:, 1:]).any()):
        raise _batch_error("padding on the left", "padding on the right, or none")


def _batch_error(found: str, needed: str, *, code: str = "s2-batch") -> AttnimgError:
    from attnimg.backends._loading import kernel_error

    why = f"found {found}, needed {needed}"
    return kernel_error("s2 can't group this batch", why=why, code=code)


BACKEND = Backend(
    name="s2",
    rank=80,
    rank_why="computes a different function than full attention",
    rank_source="arXiv 2309.12307 (2026-11-21)",
    summary="shifted sparse attention",
    packing="none",
    uses_flash_lib=True,
    automatic=False,
    applied_as="attnimg_s2",
    load_function=_load,
    # It is compared with its own reference: shifted_keys in verification/reference.py.
    pattern="shifted",
    needs=Needs(
        features=frozenset(),
        model_types=frozenset({"llama"}),
        model_code="s2-not-llama",
    ),
)
