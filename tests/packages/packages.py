"""Read kernels' packages without installing them: their files, and functions by signature."""

from __future__ import annotations

import ast
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read(distribution: str, path: str) -> str:
    """Read a file of a downloaded wheel or sdist; `path` is its end.

    Raises:
        FileNotFoundError: no such package in the folder WHEELS, or no such file in it.
    """
    folder = Path(os.environ["WHEELS"])
    for archive in sorted(folder.glob(f"{distribution}-*")):
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                for name in wheel.namelist():
                    if name == path:
                        return wheel.read(name).decode()
        else:
            with tarfile.open(archive) as sdist:
                for member in sdist:
                    if member.name.partition("/")[2] == path:
                        file = sdist.extractfile(member)
                        assert file is not None
                        return file.read().decode()
    raise FileNotFoundError(f"{distribution}: {path}")


def unpack(distribution: str, package: str, folder: Path) -> None:
    """Extract the Python files of a downloaded sdist's package into a folder."""
    (archive,) = Path(os.environ["WHEELS"]).glob(f"{distribution}-*.tar.gz")
    with tarfile.open(archive) as sdist:
        for member in sdist:
            member.name = member.name.partition("/")[2]
            if member.name.startswith(f"{package}/") and member.name.endswith(".py"):
                sdist.extract(member, folder, filter="data")


def stand_in(source: str, name: str, answer: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """Make a function with the signature that `name` has in a source, and another body.

    Args:
        source: text of a module.
        name: a function of it.
        answer: gets the arguments by parameter, and returns the result.
    """
    found = function(source, name)
    arguments = found.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    nothing = ast.Constant(None)
    arguments.defaults = [nothing for _ in arguments.defaults]
    arguments.kw_defaults = [None if x is None else nothing for x in arguments.kw_defaults]
    found.returns, found.decorator_list = None, []
    found.body = ast.parse("return _answer(locals())").body
    module = ast.fix_missing_locations(ast.Module(body=[found], type_ignores=[]))
    names: dict[str, Any] = {"_answer": answer}
    exec(compile(module, name, "exec"), names)
    made: Callable[..., Any] = names[name]
    return made


def function(source: str, name: str) -> ast.FunctionDef:
    """Find a function of a module's source."""
    return next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )


def constants(source: str, class_name: str) -> dict[str, str]:
    """Return the values that a class in a source assigns to its names, as text."""
    body = next(
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == class_name
    )
    found: dict[str, str] = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, ast.unparse(node.value))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found.setdefault(node.target.id, ast.unparse(node.value))
    return found
