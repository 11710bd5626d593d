"""Compute a fingerprint of the software that precompiled kernels depend on.

The image's build runs this file alone, so it does not import attnimg or large libraries.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

# FlashAttention-4's cache key has only the first three. But quack's functions are traced into the
# kernels too, and CuTe DSL's build, for CUDA 12 or 13, decides which driver the kernels need.
# Source: flash-attn-4 4.0.0b36, cache_utils.py (2026-11-21).
PACKAGES = (
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
    "quack-kernels",
    "nvidia-cutlass-dsl-libs-cu13",
)
SOURCE = "flash_attn/cute"
# FlashAttention-4 names a cache entry by a pickle of its key. A key for sm_100 may have an enum,
# which Python 3.11.2 pickles by name and 3.11.7 by value (CPython, Enum.__reduce_ex__, 2026-11-25).
RELEASE = "python release"
ABSENT = "absent"
# The second ptxas is for sm_100 and newer.
_TRITON_LIBRARIES = (
    "_C/libtriton.so",
    "backends/nvidia/bin/ptxas",
    "backends/nvidia/bin/ptxas-blackwell",
)


def fingerprint() -> dict[str, str]:
    """Return what FlashAttention-4's machine code and its name in the cache depend on.

    Returns:
        "python" -> major and minor version; RELEASE -> full version; each of PACKAGES -> its
        version or ABSENT; SOURCE -> a hash of FlashAttention-4's files.
    """
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = {"python": minor, RELEASE: f"{minor}.{sys.version_info.micro}"}
    found |= {name: _version(name) for name in PACKAGES}
    folder = _cute()
    found[SOURCE] = ABSENT if folder is None else source_hash(folder)
    return found


def triton_fingerprint() -> dict[str, str]:
    """Return what SageAttention's Triton kernels and the names of their cache entries depend on.

    Triton hashes its own files, the file libtriton.so, the version text of its ptxas, and the
    source of a kernel (triton 3.8.0, runtime/cache.py and jit.py, read 2026-11-25).

    Returns:
        The items of triton_in_short(), and the hash of each library, for which 0.6 GB are read.
    """
    found = triton_in_short()
    for name, path in _libraries().items():
        found[f"triton/{name}"] = ABSENT
        if path:
            with path.open("rb") as stream:
                found[f"triton/{name}"] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def triton_in_short() -> dict[str, str]:
    """Return a fast form of triton_fingerprint(), with the sizes of libraries, not their hashes."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for package in ("triton", "sageattention"):
        folder = _folder(package)
        found[package] = _version(package)
        found[f"{package}/*.py"] = source_hash(folder) if folder else ABSENT
    for name, path in _libraries().items():
        found[f"bytes of triton/{name}"] = str(path.stat().st_size) if path else ABSENT
    return found


def cache_key(fingerprint: Mapping[str, str]) -> str:
    """Return a short hash of a fingerprint that is valid as a folder name."""
    text = json.dumps(dict(sorted(fingerprint.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_hash(folder: Path) -> str:
    """Return one hash of the names and the content of all Python files of a folder."""
    hashed = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        hashed.update(f"{path.relative_to(folder).as_posix()}:{len(content)}:".encode())
        hashed.update(content)
    return hashed.hexdigest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ABSENT


def _cute() -> Path | None:
    """Return the folder that `import flash_attn.cute` would load, without importing it."""
    package = importlib.util.find_spec("flash_attn")
    for folder in (package.submodule_search_locations or ()) if package else ():
        if (Path(folder) / "cute" / "__init__.py").is_file():
            return Path(folder) / "cute"
    return None


def _libraries() -> dict[str, Path | None]:
    """Return the paths of Triton's compiler and assemblers; None for a missing one."""
    triton = _folder("triton")
    paths = {name: triton / name if triton else None for name in _TRITON_LIBRARIES}
    return {name: path if path and path.is_file() else None for name, path in paths.items()}


def _folder(package: str) -> Path | None:
    """Return the folder of a package, without importing it."""
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found and found.origin else None
