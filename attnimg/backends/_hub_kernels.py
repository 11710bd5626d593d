"""Load a kernel of the Hugging Face hub that the user named, and see what it exports."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from attnimg.backends._flash import FlashKernel
from attnimg.backends._hub_signatures import LOCK, check_signature, locked_revision
from attnimg.backends._imports import broken_kernel
from attnimg.backends._sage import SageKernel
from attnimg.errors import AttnimgError
from attnimg.facts import AttentionFunction

_FLASH = ("flash_attn_func", "flash_attn_varlen_func")
# What kernels' get_kernel says of a publisher that the hub does not vouch for.
_UNTRUSTED = re.compile("not from a trusted publisher")


def load_hub_kernel(name: str, *, trusted: bool) -> ModuleType:
    """Load org/name[@rev][:fn], from LOCAL_KERNELS, kernels.lock, the cache or the hub.

    Args:
        name: the path as the user wrote it; its :fn is not looked at.
        trusted: whether the user set trust_remote_code.

    Raises:
        AttnimgError: the kernel is absent, untrusted, wrongly signed or broken.
    """
    path = name.partition(":")[0]
    repo, _, revision = path.partition("@")
    try:
        return _module(repo, revision=revision or None, trusted=trusted)
    except AttnimgError:
        raise
    # A kernel's own code runs here and raises anything; kernels itself raises ValueError and
    # FileNotFoundError. The reason is kept.
    except Exception as error:
        raise hub_error(path, error, trusted=trusted) from error


def hub_error(path: str, error: Exception, *, trusted: bool) -> AttnimgError:
    """Return the error for org/name[@rev] that did not load, or that needs to be trusted first."""
    repo = path.partition("@")[0]
    if isinstance(error, ValueError) and _UNTRUSTED.search(str(error)) and not trusted:
        return AttnimgError(
            f"{repo} is no kernel of a publisher that the hub vouches for",
            why=f"found trust_remote_code: false, needed true: its code runs here\n{error}",
            do="read the kernel; then set trust_remote_code: true",
            code="untrusted-kernel",
            key="trust_remote_code",
        )
    return broken_kernel(path, error, do="serve its folder by LOCAL_KERNELS")


def _module(repo: str, *, revision: str | None, trusted: bool) -> ModuleType:
    import kernels

    pinned = check_hub_kernel(repo, revision=revision, trusted=trusted)
    if revision is None and pinned["revision"] is not None:
        # The lock has the revisions of the kernels that this one depends on, too.
        locked: ModuleType = kernels.get_locked_kernel(
            repo, lockfile=LOCK, trust_remote_code=trusted
        )
        return locked
    found: ModuleType = kernels.get_kernel(repo, **pinned, trust_remote_code=trusted)
    return found


def check_hub_kernel(repo: str, *, revision: str | None, trusted: bool) -> dict[str, Any]:
    """Check the signature of a kernel, unless LOCAL_KERNELS serves it, before its code runs.

    Args:
        repo: org/name.
        revision: what the user wrote after the @; None takes kernels.lock's, or else the major
            version that transformers pins.
        trusted: whether the user set trust_remote_code.

    Returns:
        revision and version, of which kernels wants exactly one.

    Raises:
        AttnimgError: its signature does not hold; and what check_signature raises.
    """
    from transformers.integrations.hub_kernels import get_attn_kernel_version

    local = repo in served_locally()
    if revision is None and not local:
        revision = locked_revision(repo)
    version = get_attn_kernel_version(repo) if revision is None else None
    if not local:
        check_signature(repo, revision=revision, version=version, trusted=trusted)
    return {"revision": revision, "version": version}


def hub_folder(name: str, *, trusted: bool) -> Path:
    """Return the folder of a hub kernel's files; download them where that is allowed.

    The kernel's code is not run.

    Args:
        name: org/name[@rev][:fn].
        trusted: whether the user set trust_remote_code.

    Raises:
        OSError: the kernel is not on this machine, and can't or must not be downloaded.
    """
    import kernels
    from huggingface_hub import constants

    repo, _, revision = name.partition(":")[0].partition("@")
    try:
        pinned = check_hub_kernel(repo, revision=revision or None, trusted=trusted)
        folder = kernels.install_kernel(
            repo,
            **pinned,
            local_files_only=bool(constants.HF_HUB_OFFLINE),
            trust_remote_code=trusted,
        )
    # Loading the kernel raises the same error, which is reported there.
    except Exception as error:
        raise OSError(f"{repo} is not available: {error}") from error
    return Path(str(folder))


def served_locally() -> frozenset[str]:
    """Name the hub kernels that LOCAL_KERNELS serves from folders."""
    entries = os.environ.get("LOCAL_KERNELS", "").split(":")
    return frozenset(entry.partition("=")[0] for entry in entries)


def hub_attention(name: str, *, trusted: bool) -> AttentionFunction:
    """Load a hub kernel and return its attention, in whichever style it exports one.

    FlashAttention's two entry points are looked for first, then SageAttention's; with :fn that
    function alone is taken, and judged by its arguments.

    Args:
        name: org/name[@rev][:fn].
        trusted: whether the user set trust_remote_code.

    Raises:
        AttnimgError: the kernel does not load, or exports no attention that is known here.
    """
    module = load_hub_kernel(name, trusted=trusted)
    wanted = name.partition(":")[2]
    if wanted:
        return _of_function(module, wanted, path=name)
    dense, varlen = (getattr(module, entry, None) for entry in _FLASH)
    if callable(dense) or callable(varlen):
        return FlashKernel(backend=name, dense=dense, varlen=varlen).attend
    if callable(sage := getattr(module, "sageattn", None)):
        varlen = getattr(module, "sageattn_varlen", None)
        return SageKernel(backend=name, dense=sage, varlen=varlen).attend
    raise _no_attention(name, module, needed="flash_attn_varlen_func, flash_attn_func or sageattn")


def _of_function(module: ModuleType, wanted: str, *, path: str) -> AttentionFunction:
    """Return the attention of one function, by the arguments it takes."""
    function = getattr(module, wanted, None)
    if not callable(function):
        raise _no_attention(path, module, needed=wanted)
    takes = list(inspect.signature(function).parameters)
    if takes[:1] == ["module"]:  # transformers' own interface
        attend: AttentionFunction = function
        return attend
    if "cu_seqlens_q" in takes and "softmax_scale" in takes:
        dense = getattr(module, _FLASH[0], None) if wanted == _FLASH[1] else None
        return FlashKernel(backend=path, dense=dense, varlen=function).attend
    if "softmax_scale" in takes:
        varlen = getattr(module, _FLASH[1], None) if wanted == _FLASH[0] else None
        return FlashKernel(backend=path, dense=function, varlen=varlen).attend
    if "tensor_layout" in takes:
        varlen = getattr(module, "sageattn_varlen", None) if wanted == "sageattn" else None
        return SageKernel(backend=path, dense=function, varlen=varlen).attend
    styles = "softmax_scale (FlashAttention), tensor_layout (SageAttention) or module first"
    raise AttnimgError(
        f"{path} is no attention that attnimg can call",
        why=f"found the arguments {', '.join(takes)}; needed {styles}",
        do="name another function of the kernel, or set attn_implementation: sdpa",
        code="not-a-kernel",
        key="attn_implementation",
        exit_code=1,
    )


def _no_attention(path: str, module: ModuleType, *, needed: str) -> AttnimgError:
    exports = sorted(key for key, value in vars(module).items() if _is_public(key, value))
    return AttnimgError(
        f"{path} exports no such attention",
        why=f"found {', '.join(exports) or 'nothing'}; needed {needed}",
        do="name a function after a colon, org/name:function, or set attn_implementation: sdpa",
        code="not-a-kernel",
        key="attn_implementation",
        exit_code=1,
    )


def _is_public(key: str, value: object) -> bool:
    return not key.startswith("_") and callable(value)
