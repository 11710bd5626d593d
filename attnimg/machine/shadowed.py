"""Installed packages whose files another one has overwritten, told without importing either.

flash-attn 2.8.3 ships an old stub of FlashAttention-4 in flash_attn/cute/, where flash-attn-4 has
the real one: 20 files that both claim, and whichever was installed last wins. With the stub in
front, importing FlashAttention-4 raises AttributeError. Seen with pip 26.3 (2026-11-21).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Container
from importlib import metadata

# Who may be overwritten, by whom, and a file that both claim.
_CLAIMED_TWICE = (("flash-attn-4", "flash-attn", "flash_attn/cute/interface.py"),)


def shadowed(installed: Container[str]) -> tuple[str, ...]:
    """Name the packages that are not what they were installed as.

    Args:
        installed: names of installed distributions.
    """
    return tuple(
        package
        for package, other, path in _CLAIMED_TWICE
        if package in installed and other in installed and not _is_own(package, path)
    )


def _is_own(package: str, path: str) -> bool:
    """Tell whether a file is the one that a package's RECORD names; True without a RECORD."""
    for file in metadata.files(package) or ():
        if file.as_posix() != path or file.hash is None:
            continue
        try:
            content = file.read_binary()
        except OSError:  # the other package was uninstalled, and took the file with it
            return False
        digest = hashlib.new(file.hash.mode, content).digest()
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value
    return True
