"""Find installed distributions, by importlib.metadata, which knows no declarations.

The virtual environment of a user in an image (docker/added/image_venv.py) declares each package of
the image: a dist-info folder without the package's files, so that installers find it. The package
itself is in another folder, or was installed beside the declaration, in another version.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

# INSTALLER of a declaration. Source: docker/added/image_venv.py.
DECLARED = "attnimg"


def distributions() -> Iterator[metadata.Distribution]:
    """Yield the installed distributions in the order of sys.path, without declarations."""
    return (found for found in metadata.distributions() if not _is_declaration(found))


def distribution(name: str) -> metadata.Distribution:
    """Return the installed distribution that is imported.

    Raises:
        importlib.metadata.PackageNotFoundError: it is not installed.
    """
    for found in metadata.distributions(name=name):
        if not _is_declaration(found):
            return found
    raise metadata.PackageNotFoundError(name)


def version(name: str) -> str:
    """Return the version of the installed distribution that is imported.

    Raises:
        importlib.metadata.PackageNotFoundError: it is not installed.
    """
    return distribution(name).version


def _is_declaration(found: metadata.Distribution) -> bool:
    return (found.read_text("INSTALLER") or "").strip() == DECLARED
