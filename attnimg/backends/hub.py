"""Kernels from the Hugging Face hub, org/name[@rev][:fn]: taken only when the config names one.

A kernel nobody here has read is judged by what is known of every hub kernel: nothing. Source of the
GPUs: the kernels' build.toml in huggingface/kernels-community (read 2026-11-21).
"""

import hashlib
from functools import cache, partial

from attnimg.backends.flash_attention_2 import BACKEND as FLASH_2
from attnimg.backends.flash_attention_3 import BACKEND as FLASH_3
from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs, Packing

_KERNELS = (("kernels", "0.17.2", "not-installed"),)
_HALF = FLASH_2.needs.dtypes


@cache
def backend_for(name: str, repo: str) -> Backend:
    """Give the backend of a hub path.

    Args:
        name: the whole path, as the config has it.
        repo: its org/name, which decides the flags.
    """
    native = repo in _FLASH and ":" not in name
    packing: Packing = "native" if repo in _READ else "none"
    return Backend(
        name=name,
        rank=35,
        rank_why="runs only when the config names it",
        rank_source="ours (2026-11-26)",
        summary=f"hub kernel {repo}",
        needs=_READ.get(repo, Needs(packages=_KERNELS)),
        packing=packing,
        uses_flash_lib=repo in _FLASH,
        automatic=False,
        # transformers loads FlashAttention by its path. It takes no :fn (5.22.2: ignored or
        # refused), and nothing without a varlen entry: those are attnimg's own to register.
        applied_as=name
        if native
        else f"attnimg_hub_{hashlib.sha256(name.encode()).hexdigest()[:8]}",
        load_attend=None if native else partial(_load, name),
        hub_repo=repo,
        k_forward=None if repo == _SAGE else 2.0,
        sqnr_db=20.0 if repo == _SAGE else None,
        unread=repo not in _READ,
    )


def _load(name: str, *, trusted: bool = False) -> AttentionFunction:
    from attnimg.backends._hub_kernels import hub_attention

    return hub_attention(name, trusted=trusted)


_SAGE = "kernels-community/sage-attention"
_FLASH = frozenset({"kernels-community/flash-attn2", "kernels-community/flash-attn3"})
_READ = {
    "kernels-community/flash-attn2": Needs(
        vendors=FLASH_2.needs.vendors | {"cpu"},
        capability_min=(8, 0),
        arch_code="arch-too-old",
        arch_text=FLASH_2.needs.arch_text,
        dtypes=_HALF,
        head_dims=FLASH_2.needs.head_dims,
        features=FLASH_2.needs.features,
        packages=_KERNELS,
    ),
    "kernels-community/flash-attn3": Needs(
        vendors=FLASH_3.needs.vendors,
        capabilities=FLASH_3.needs.capabilities,
        arch_text=FLASH_3.needs.arch_text,
        dtypes=_HALF,
        head_dims=FLASH_3.needs.head_dims,
        features=FLASH_3.needs.features,
        packages=_KERNELS,
    ),
    _SAGE: Needs(
        vendors=frozenset({"nvidia"}),
        capabilities=frozenset({(8, 0), (8, 9), (9, 0), (10, 0)}),
        arch_code="sage-arch",
        arch_text="sm_80, sm_89, sm_90 or sm_100",
        dtypes=_HALF,
        head_dims=(HeadDims(qk=(1, 128), v=(1, 128), equal=True),),
        features=frozenset(),
        packages=_KERNELS,
    ),
}
