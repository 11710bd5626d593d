"""Load a kernel's module: from an installed package, or from the Hugging Face hub.

A hub kernel is pinned by kernels.lock, and its signature is checked before its code runs.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from attnimg.errors import AttnimgError, KernelError, set_backend
from attnimg.loaded_code import LoadedCode

# `kernels lock` writes it to the current folder.
LOCK_FILE = Path("kernels.lock")
# The error of kernels' get_kernel for a publisher that is not trusted.
_UNTRUSTED = re.compile("not from a trusted publisher")
# Results of kernels' verify_variant for a kernel without a signature, or whose signature covers no
# files: it is neither verified nor refuted.
# Source: kernels 0.17.2, verify.py, VerificationResult (2026-11-21).
_UNSIGNED = {
    "SignatureBundleMissing": "it is not signed",
    "DigestMissing": "its signed metadata has no digest of its files",
}
_LOG = logging.getLogger(__name__)


class HubKernel(NamedTuple):
    """A hub kernel, by its revision or its version, as the library `kernels` takes it.

    Attributes:
        repo: org/name.
        revision: a branch, tag or commit.
        version: its major version.
        folder: the folder of its files; None where it comes from LOCAL_KERNELS.
    """

    repo: str
    revision: str | None
    version: int | str | None
    folder: Path | None


def kernel_error(what: str, *, why: str, code: str, do: str = set_backend("sdpa")) -> KernelError:
    """Return an error about a kernel, with exit code 1."""
    return KernelError(what, why=why, do=do, code=code, exit_code=1)


def load_error(
    backend: str, error: Exception, *, do: str, otherwise: str = set_backend("sdpa")
) -> AttnimgError:
    """Return the error for a kernel that does not load, which a run can do without."""
    return kernel_error(
        f"{backend} does not load",
        why=f"loading it raised {type(error).__name__}: {error}".strip(),
        do=f"{do}, or {otherwise}",
        code="import-error",
    )


def unsupported_argument(backend: str, why: str) -> AttnimgError:
    """Return the error for an argument that a backend does not support."""
    return kernel_error(
        f"{backend} does not support an argument of this model's attention",
        why=why,
        do=f"{set_backend('eager')}, or another backend that `attnimg explain` shows to fit",
        code="argument-not-honoured",
    )


def import_kernel(module: str, *, backend: str, package: str) -> ModuleType:
    """Import a module that runs kernels.

    Args:
        module: its name.
        backend: the backend that needs it.
        package: the distribution to install.

    Raises:
        AttnimgError: it is not installed, or its import raises any exception.
    """
    try:
        return import_module(module)
    # The import of a kernel may raise any exception: ImportError or OSError for an undefined
    # symbol, AttributeError for a shadowed module. The message is kept.
    except Exception as error:
        raise load_error(backend, error, do=f"install {package} for this GPU") from error


def load_hub_kernel(name: str, *, trusted: bool) -> ModuleType:
    """Load org/name[@rev][:fn], from LOCAL_KERNELS, kernels.lock, the cache or the hub.

    Args:
        name: the path as the user wrote it; its :fn is ignored.
        trusted: whether the user set trust_remote_code.

    Raises:
        AttnimgError: the kernel is missing, untrusted or broken, or its signature is invalid.
    """
    path = name.partition(":")[0]
    with hub_errors(path, trusted=trusted):
        import kernels

        repo, revision, version, _ = check_hub_kernel(path, trusted=trusted)
        module: ModuleType
        if revision is not None and "@" not in path:
            # The lock file also has the revisions of the kernels that this one depends on.
            module = kernels.get_locked_kernel(repo, lockfile=LOCK_FILE, trust_remote_code=trusted)
        else:
            module = kernels.get_kernel(
                repo, revision=revision, version=version, trust_remote_code=trusted
            )
    return module


@contextmanager
def hub_errors(path: str, *, trusted: bool, otherwise: str = set_backend("sdpa")) -> Iterator[None]:
    """Convert any exception of the block, which loads org/name[@rev], to an AttnimgError.

    Args:
        path: org/name[@rev].
        trusted: whether the user set trust_remote_code.
        otherwise: the edit of the config with which the run does not need the kernel.
    """
    repo = path.partition("@")[0]
    try:
        yield
    except AttnimgError:
        raise
    # The kernel's code and the hub's client may raise any exception; the library kernels raises
    # ValueError and FileNotFoundError. The message is kept.
    except Exception as error:
        if isinstance(error, ValueError) and _UNTRUSTED.search(str(error)) and not trusted:
            raise AttnimgError(
                f"{repo} is not from a publisher that the library kernels trusts",
                why="found trust_remote_code: false, needed true, since the kernel's code would "
                f"run on this machine\n{error}",
                do="read the kernel; then set trust_remote_code: true",
                code="untrusted-kernel",
                key="trust_remote_code",
            ) from error
        do = f"serve its folder by LOCAL_KERNELS={repo}=/path"
        raise load_error(path, error, do=do, otherwise=otherwise) from error


@contextmanager
def only_own_code(name: str, *, otherwise: str = set_backend("sdpa")) -> Iterator[None]:
    """Refuse a kernel that replaced code of other packages in the block, which loads it.

    A proof refuses it too, but in a process that has not loaded all modules of a run.

    Args:
        name: what the block loads.
        otherwise: as for hub_errors.

    Raises:
        AttnimgError: code process-state.
    """
    loaded = LoadedCode()
    yield
    if found := loaded.replaced():
        raise kernel_error(
            f"{name} changes the process that it runs in",
            why="\n".join(("when it was loaded:", *found[:5])),
            do=otherwise,
            code="process-state",
        )


def check_hub_kernel(
    path: str,
    *,
    trusted: bool,
    version: int | None = None,
    otherwise: str = set_backend("sdpa"),
) -> HubKernel:
    """Download a kernel, without running it, and check its signature and its files.

    A kernel that can't be checked is used, with a warning. Its dependencies are not checked, nor is
    a kernel from LOCAL_KERNELS.

    Args:
        path: org/name[@rev]; the default revision is that of kernels.lock, or else the major
            version that transformers pins.
        trusted: whether the user set trust_remote_code.
        version: that major version; None for transformers' version of an attention kernel.
        otherwise: as for hub_errors.

    Raises:
        AttnimgError: the signature is invalid, or the files are not the signed ones, or
            kernels.lock can't be read.
        ValueError: the publisher is not trusted.
        FileNotFoundError: there is no such kernel.
    """
    from transformers.integrations.hub_kernels import get_attn_kernel_version

    repo, _, wanted = path.partition("@")
    local = repo in local_kernel_repos()
    revision = wanted or (None if local else locked_revision(repo))
    default = get_attn_kernel_version(repo) if version is None else version
    pinned = default if revision is None else None
    if local:
        return HubKernel(repo, revision, pinned, None)
    import kernels
    from huggingface_hub import constants

    offline = bool(constants.HF_HUB_OFFLINE)
    folder = kernels.install_kernel(
        repo,
        revision=revision,
        version=pinned,
        local_files_only=offline,
        trust_remote_code=trusted,
    )
    if unchecked := _check_signature(repo, folder, offline=offline, otherwise=otherwise):
        _LOG.warning("attnimg: the signature of %s was not checked: %s", repo, unchecked)
    return HubKernel(repo, revision, pinned, Path(str(folder)))


def hub_folder(name: str, *, trusted: bool) -> Path:
    """Return the folder of a hub kernel's files; download them where that is allowed.

    The kernel's code is not run.

    Args:
        name: org/name[@rev][:fn] of a kernel that is not in LOCAL_KERNELS.
        trusted: whether the user set trust_remote_code.

    Raises:
        OSError: the kernel is not on this machine, and can't be downloaded or may not be.
    """
    path = name.partition(":")[0]
    try:
        folder = check_hub_kernel(path, trusted=trusted).folder
    # Loading the kernel later raises and reports the same error.
    except Exception as error:
        raise OSError(f"{path} is not available: {error}") from error
    assert folder is not None
    return folder


def local_kernel_repos() -> frozenset[str]:
    """Return the names of the hub kernels in LOCAL_KERNELS."""
    entries = os.environ.get("LOCAL_KERNELS", "").split(":")
    return frozenset(entry.partition("=")[0] for entry in entries)


def locked_revision(repo: str) -> str | None:
    """Return the commit of org/name in kernels.lock; None when it is not locked.

    Raises:
        AttnimgError: the lock file names the kernel and can't be read.
    """
    if not LOCK_FILE.is_file() or f'"{repo}"' not in LOCK_FILE.read_text(encoding="utf-8"):
        return None
    from kernels.locking import get_locked_kernel_revision

    try:
        locks, kernel = get_locked_kernel_revision(repo, LOCK_FILE)
    except ValueError as error:  # not a lock file of the library kernels
        do = "run `kernels lock`, which writes kernels.lock again"
        raise load_error(repo, error, do=do) from error
    return str(locks[kernel].commit)


def _check_signature(repo: str, folder: Path, *, offline: bool, otherwise: str) -> str | None:
    """Check a kernel's signature; return None if it is valid, or why it can't be checked."""
    try:
        from kernels.verify import verify_variant
    except ImportError as error:
        return f"the installed version of kernels can't check it ({error})"
    if offline:
        # The verifier downloads the trusted keys from sigstore's servers.
        return "HF_HUB_OFFLINE is set, and the check needs the network"
    try:
        result: Any = verify_variant(folder)
    # sigstore raises its own, TUF's and requests' exceptions when it can't reach its servers.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found = type(result).__name__
    if found == "Success":
        return None
    if found in _UNSIGNED:
        return _UNSIGNED[found]
    details = getattr(result, "reason", None) or getattr(result, "violations", None)
    raise kernel_error(
        f"the signature of {repo} is invalid",
        why=f"found {found}{f' ({details})' if details else ''}; "
        "needed files that a publisher known to kernels signed",
        do="delete it from the cache and try again; or name a revision that is signed, "
        f"or {otherwise}",
        code="kernel-signature",
    )
