"""The folders that LOCAL_KERNELS serves in place of hub kernels, read without importing them.

Source: load.py and importer.py of kernels 0.17.2 (2026-11-21).
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from attnimg.facts import LocalKernel, Vendor
from attnimg.files import read_regular
from attnimg.machine.kernel_variants import TorchBuild, choose, torch_build

# A kernel's metadata.json has some hundred bytes.
_METADATA_BYTES = 1 << 20
_VENDORS: dict[str, Vendor] = {"cpu": "cpu", "cuda": "nvidia", "rocm": "amd"}


def read_local_kernels(spec: str, *, torch: str | None) -> tuple[LocalKernel, ...]:
    """Read LOCAL_KERNELS="org/name=/path:org2/name2=/path2".

    Args:
        spec: the variable's value.
        torch: torch's version; build variants are made for one of them.

    Raises:
        AttnimgError: an entry is malformed, or its folder serves nothing here.
    """
    paths: dict[str, str] = {}
    for entry in spec.split(":"):
        repo, equals, path = entry.partition("=")
        if not equals:
            raise _refusal(entry, why="found no '='; needed org/name=/path, entries joined by ':'")
        paths[repo] = path
    build = torch_build(torch)
    return tuple(_read(repo, path, build=build) for repo, path in paths.items())


def _read(repo: str, path: str, *, build: TorchBuild) -> LocalKernel:
    entry, folder = f"{repo}={path}", Path(path)
    if not folder.is_dir():
        raise _refusal(entry, why=f"found no folder {path}")
    variant, rejected = choose(folder, build=build)
    if variant is None:
        why = "\n".join(rejected) or "found no build variant; needed one such as build/torch-cpu"
        raise _refusal(entry, why=why)
    described = _read_metadata(entry, variant)
    backend = described["backend"]["type"]
    if backend not in _VENDORS:
        known = ", ".join(_VENDORS)
        raise _refusal(entry, why=f"found a kernel built for {backend!r}; needed one of {known}")
    name = str(described.get("name", "")).replace("-", "_")
    exports, takes = _exports(variant, name=name)
    return LocalKernel(
        repo=repo,
        path=path,
        vendor=_VENDORS[backend],
        version=str(described.get("version", "unknown")),
        exports=exports,
        varlen_takes=takes,
    )


def _read_metadata(entry: str, variant: Path) -> dict[str, Any]:
    path = variant / "metadata.json"
    try:
        described = json.loads(read_regular(path, at_most=_METADATA_BYTES))
        described["backend"]["type"].strip()
    except OSError as error:
        raise _refusal(entry, why=f"found no readable {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        needed = 'needed JSON with "backend": {"type": "cpu"}, "cuda" or "rocm"'
        raise _refusal(entry, why=f"{path} does not say what it is built for; {needed}") from error
    return dict(described)


def _exports(variant: Path, *, name: str) -> tuple[frozenset[str] | None, frozenset[str] | None]:
    """List what a module's source defines or imports, and what its varlen function takes.

    Returns:
        The public names; the arguments of flash_attn_varlen_func. Each None when that can't be
        told from the source.
    """
    path = variant / "__init__.py"
    if not path.is_file():
        path = variant / name / "__init__.py"
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, ValueError, SyntaxError, RecursionError):
        return None, None
    names: set[str] = set()
    takes: frozenset[str] | None = None
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            if node.name == "flash_attn_varlen_func":
                takes = _arguments(node)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.If | ast.Try | ast.With):
            pending.extend(
                part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)
            )
            handlers = node.handlers if isinstance(node, ast.Try) else []
            pending.extend(part for handler in handlers for part in handler.body)
    # `from x import *` and a module-level __getattr__ hide what there is.
    if {"*", "__getattr__"} & names:
        return None, None
    return frozenset(name for name in names if not name.startswith("_")), takes


def _arguments(node: ast.stmt) -> frozenset[str] | None:
    """Name a function's arguments; None where **kwargs or a decorator hide them."""
    if not isinstance(node, ast.FunctionDef) or node.args.kwarg or node.decorator_list:
        return None
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return frozenset(argument.arg for argument in arguments)


def _refusal(entry: str, *, why: str) -> AttnimgError:
    return AttnimgError(
        f"LOCAL_KERNELS entry {entry!r} serves no kernel",
        why=why,
        do="correct the entry, or unset LOCAL_KERNELS",
        code="local-kernel",
    )
