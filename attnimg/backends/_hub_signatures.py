"""Pin hub kernels to kernels.lock, and check who signed one before its code runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError

# Where `kernels lock` writes it: the folder of the project.
LOCK = Path("kernels.lock")
# Results of kernels' verify_variant that tell of no signature, or of one over no files: nothing
# speaks against the kernel, and nothing for it.
# Source: kernels 0.17.2, verify.py, VerificationResult (2026-11-21).
_UNSIGNED = {
    "SignatureBundleMissing": "it is not signed",
    "DigestMissing": "its signed metadata has no digest of its files",
}
_SAY = logging.getLogger(__name__)


def locked_revision(repo: str) -> str | None:
    """Give the commit that kernels.lock has for org/name; None when it is not locked.

    Raises:
        ValueError: the lock file names the kernel and can't be read.
    """
    if not LOCK.is_file() or f'"{repo}"' not in LOCK.read_text(encoding="utf-8"):
        return None
    from kernels.locking import get_locked_kernel_revision

    locks, kernel = get_locked_kernel_revision(repo, LOCK)
    return str(locks[kernel].commit)


def check_signature(
    repo: str, *, revision: str | None, version: int | str | None, trusted: bool
) -> None:
    """Download a kernel of the hub, without running it, and check its signature and its files.

    A kernel that can't be checked is used, and said to be unchecked. Kernels that it depends on
    are not looked at.

    Args:
        repo: org/name.
        revision: a branch, tag or commit; None for a version.
        version: the kernel's major version; None for a revision.
        trusted: whether the user set trust_remote_code.

    Raises:
        AttnimgError: the signature does not hold, or the files are not those signed.
        ValueError: the publisher is not trusted.
        FileNotFoundError: there is no such kernel.
    """
    import kernels
    from huggingface_hub import constants

    offline = bool(constants.HF_HUB_OFFLINE)
    folder = kernels.install_kernel(
        repo,
        revision=revision,
        version=version,
        local_files_only=offline,
        trust_remote_code=trusted,
    )
    unchecked = _unchecked(repo, folder, offline=offline)
    if unchecked:
        _SAY.warning("attnimg: the signature of %s was not checked: %s", repo, unchecked)


def _unchecked(repo: str, folder: Path, *, offline: bool) -> str | None:
    """Check a kernel's folder; say why it can't be, or None when its signature holds."""
    try:
        from kernels.verify import verify_variant
    except ImportError as error:
        return f"the installed kernels can't ({error})"
    if offline:
        # The verifier gets the keys it trusts from sigstore's servers.
        return "HF_HUB_OFFLINE is set, and checking needs the network"
    try:
        result = verify_variant(folder)
    # sigstore raises errors of its own, of TUF and of requests when it can't reach its servers.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found = type(result).__name__
    if found == "Success":
        return None
    if found in _UNSIGNED:
        return _UNSIGNED[found]
    raise AttnimgError(
        f"the signature of {repo} does not hold",
        why=f"found {found}{_details(result)}; needed files that a publisher known to kernels "
        "signed",
        do="delete it from the cache and try again; or name a revision that is signed, "
        "or set attn_implementation: sdpa",
        code="kernel-signature",
        key="attn_implementation",
        exit_code=1,
    )


def _details(result: Any) -> str:
    details = getattr(result, "reason", None) or getattr(result, "violations", None)
    return f" ({details})" if details else ""
