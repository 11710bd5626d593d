"""Write the hashes of torch's ROCm builds into recipes/torch.toml (`make lock`)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomlkit

from recipes.facts import Image, Recipes, RocmBuild
from recipes.files import write_all
from recipes.solve.lock import split_lock
from recipes.solve.rules import rocm_build

_FILE = "recipes/torch.toml"


def lock_rocm(recipes: Recipes, *, root: Path) -> Iterator[str]:
    """Ask the index of each ROCm build that an image has for its hashes; yield what was found.

    Where the index does not answer, the hashes stay as they are, and the reason is yielded.
    """
    text = (root / _FILE).read_text(encoding="utf-8")
    for image in recipes.images.values():
        if build := rocm_build(image, recipes):
            found = _find_hashes(image, build)
            if isinstance(found, str):
                yield f"the hashes of torch {image.torch} for ROCm stay as they are: {found}"
                continue
            text = set_hashes(text, str(image.torch), found)
            yield f"torch {image.torch} for ROCm has {sum(map(len, found.values()))} hashes"
    write_all(root, {_FILE: text})


def requirements(torch: str, build: RocmBuild) -> tuple[str, str]:
    """Return the pip requirements of a ROCm build: torch itself, and its Triton."""
    return f"torch=={torch}+rocm{build.release}", f"triton-rocm=={build.triton}"


def set_hashes(text: str, torch: str, hashes: dict[str, list[str]]) -> str:
    """Return the text of torch.toml with other hashes of one ROCm build; comments stay."""
    document: Any = tomlkit.parse(text)
    table = tomlkit.inline_table()
    for name, accepted in hashes.items():
        table.append(name, accepted)
    document[torch]["rocm"]["hashes"] = table
    return tomlkit.dumps(document)


def _find_hashes(image: Image, build: RocmBuild) -> dict[str, list[str]] | str:
    """Return requirement -> the hashes of its files; or the reason why the index has none."""
    wanted = requirements(str(image.torch), build)
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config", "-"]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--no-deps"]
    command += ["--index-url", build.index, "--only-binary", ":all:", "--no-emit-index-url"]
    command += ["--python-version", image.python, "--python-platform", "x86_64-manylinux_2_28"]
    process = subprocess.run(
        command, input="\n".join(wanted), capture_output=True, text=True, check=False
    )
    if process.returncode:
        return " ".join(process.stderr.split()) or f"uv exited with {process.returncode}"
    found = {
        block.split(" ")[0]: [
            line.split("sha256:")[1].strip(" \\\n") for line in block.splitlines()[1:]
        ]
        for block in split_lock(process.stdout).values()
    }
    missing = [name for name in wanted if not found.get(name)]
    return f"it has no hashes of {' and '.join(missing)}" if missing else found
