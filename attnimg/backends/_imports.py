"""Import a kernel's module, or say in three parts why it can't be."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from attnimg.errors import AttnimgError


def import_kernel(module: str, *, backend: str, package: str) -> ModuleType:
    """Import a module that runs kernels.

    Args:
        module: its name.
        backend: who needs it.
        package: the distribution to install.

    Raises:
        AttnimgError: it is absent, or raises anything while it is imported.
    """
    try:
        return import_module(module)
    # Kernels raise anything at import: an undefined symbol is an ImportError or an OSError, a
    # shadowed one an AttributeError. The reason is kept.
    except Exception as error:
        raise broken_kernel(backend, error, do=f"install {package} for this GPU") from error


def broken_kernel(backend: str, error: Exception, *, do: str) -> AttnimgError:
    """Give the error for a kernel that does not load."""
    return AttnimgError(
        f"{backend} does not load",
        why=f"loading it raised {type(error).__name__}: {error}".strip(),
        do=f"{do}, or set attn_implementation: sdpa",
        code="import-error",
        key="attn_implementation",
        exit_code=1,
    )
