"""Define backends for hub kernels, org/name[@rev][:fn], which run only when the config names them.

Nothing is assumed about an unreviewed kernel; the functions that it exports decide how it is
called. Source of the GPUs: the kernels' build.toml in huggingface/kernels-community
(read 2026-11-21).
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import replace
from functools import cache, partial

from attnimg.backends._loading import kernel_error, load_hub_kernel
from attnimg.backends.flash_attention_2 import BACKEND as FLASH_2
from attnimg.backends.flash_attention_2 import DENSE, VARLEN
from attnimg.backends.flash_attention_3 import BACKEND as FLASH_3
from attnimg.backends.sage import DENSE as SAGE
from attnimg.backends.sage import VARLEN as SAGE_VARLEN
from attnimg.backends.sage import sage_attention
from attnimg.errors import set_backend
from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs, Packing

_KERNELS = (("kernels", "0.17.2", "not-installed"),)
_SAGE_REPO = "kernels-community/sage-attention"
_FLASH = frozenset({"kernels-community/flash-attn2", "kernels-community/flash-attn3"})
_REVIEWED = {
    "kernels-community/flash-attn2": replace(
        FLASH_2.needs,
        vendors=FLASH_2.needs.vendors | {"cpu"},
        backward=FLASH_2.needs.vendors | {"cpu"},
        gfx=frozenset(),
        features_missing={},
        exclusive=frozenset(),
        packages=_KERNELS,
    ),
    "kernels-community/flash-attn3": replace(FLASH_3.needs, packages=_KERNELS),
    _SAGE_REPO: Needs(
        vendors=frozenset({"nvidia"}),
        capabilities=frozenset({(8, 0), (8, 9), (9, 0), (10, 0)}),
        arch_code="sage-arch",
        arch_text="sm_80, sm_89, sm_90 or sm_100",
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=(HeadDims(qk=(1, 128), v=(1, 128), equal=True),),
        features=frozenset(),
        packages=_KERNELS,
    ),
}


@cache
def backend_for(name: str, repo: str) -> Backend:
    """Return the backend of a hub path.

    Args:
        name: the whole path, as in the config.
        repo: its org/name, which determines its requirements and flags.
    """
    native = repo in _FLASH and ":" not in name
    packing: Packing = "native" if repo in _REVIEWED else "none"
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return Backend(
        name=name,
        rank=35,
        rank_why="runs only when the config names it",
        rank_source="ours (2026-11-26)",
        summary=f"hub kernel {repo}",
        needs=_REVIEWED.get(repo, Needs(packages=_KERNELS)),
        packing=packing,
        uses_flash_lib=repo in _FLASH,
        automatic=False,
        # transformers loads FlashAttention kernels by their path. It does not support :fn (5.22.2:
        # ignored or refused) or kernels without a varlen function: attnimg registers those.
        applied_as=name if native else f"attnimg_hub_{digest}",
        load_function=None if native else partial(hub_attention, name),
        hub_repo=repo,
        k_forward=None if repo == _SAGE_REPO else 2.0,
        sqnr_db=20.0 if repo == _SAGE_REPO else None,
        unreviewed=repo not in _REVIEWED,
    )


def hub_attention(name: str, *, trusted: bool = False) -> AttentionFunction:
    """Load a hub kernel and return an attention function that calls one of its exported functions.

    FlashAttention's two entry points are looked for first, then SageAttention's. The arguments of a
    function that :fn names, and that is none of these, decide how it is called.

    Args:
        name: org/name[@rev][:fn].
        trusted: whether the user set trust_remote_code.

    Raises:
        AttnimgError: the kernel does not load, or exports no known attention function.
    """
    from attnimg.backends._varlen import FlashKernel

    module = load_hub_kernel(name, trusted=trusted)
    known = {entry: getattr(module, entry, None) for entry in (VARLEN, DENSE, SAGE)}
    exported = [entry for entry, function in known.items() if callable(function)]
    entry = name.partition(":")[2] or next(iter(exported), "")
    function = getattr(module, entry, None)
    if not callable(function):
        exports = ", ".join(
            sorted(n for n, v in vars(module).items() if n[0] != "_" and callable(v))
        )
        raise kernel_error(
            f"{name} exports no such attention function",
            why=f"found {exports or 'nothing'}; needed {entry or f'{VARLEN}, {DENSE} or {SAGE}'}",
            do=f"name a function after a colon, org/name:function, or {set_backend('sdpa')}",
            code="not-a-kernel",
        )
    if entry in (VARLEN, DENSE):
        return FlashKernel(backend=name, dense=known[DENSE], varlen=known[VARLEN])
    if entry == SAGE:
        varlen = getattr(module, SAGE_VARLEN, None)
        return sage_attention(name, dense=function, varlen=varlen)
    parameters = list(inspect.signature(function).parameters)
    if parameters[:1] == ["module"]:  # transformers' attention interface
        interface: AttentionFunction = function
        return interface
    if "cu_seqlens_q" in parameters and "softmax_scale" in parameters:
        return FlashKernel(backend=name, dense=None, varlen=function)
    if "softmax_scale" in parameters:
        return FlashKernel(backend=name, dense=function, varlen=None)
    if "tensor_layout" in parameters:
        return sage_attention(name, dense=function, varlen=None)
    styles = "softmax_scale (FlashAttention), tensor_layout (SageAttention) or module first"
    raise kernel_error(
        f"attnimg can't call {name}",
        why=f"found the arguments {', '.join(parameters)}; needed {styles}",
        do=f"name another function of the kernel, or {set_backend('sdpa')}",
        code="not-a-kernel",
    )
