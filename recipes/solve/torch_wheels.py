"""Write the unresolved hashes of torch's CPU builds to recipes/torch.toml (`make lock`).

pip is asked for the wheel in PyTorch's index for CPUs, which torch.toml names, or in TORCH_INDEX
alone, another index or a folder. A hash that is known is never replaced: whoever adds another one
trusts its source.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomlkit

from recipes.facts import ImagePlan, Unresolved, on_all_platforms
from recipes.files import write_all
from recipes.solve.rules import MACHINES

_FILE = "recipes/torch.toml"


def lock_torch_wheels(
    plans: tuple[ImagePlan, ...], *, root: Path, env: Mapping[str, str]
) -> Iterator[str]:
    """Resolve the hash of each CPU build that an image needs, and write it; yield what was found.

    Args:
        plans: of all images.
        root: the checkout.
        env: TORCH_INDEX replaces the index.
    """
    wanted = {
        name: plan
        for plan in on_all_platforms(plans)
        for name, hashes in (plan.cpu_torch.wheels if plan.cpu_torch else {}).items()
        if isinstance(hashes, Unresolved)
    }
    text = (root / _FILE).read_text(encoding="utf-8")
    for name, plan in wanted.items():
        assert plan.cpu_torch is not None
        sha256, why = _find_hash(name, plan, env.get("TORCH_INDEX") or plan.cpu_torch.index)
        if not sha256:
            yield f"{name} stays unresolved: {why}"
            continue
        text = set_hash(text, str(plan.image.torch), name, sha256)
        yield f"{name} has sha256 {sha256}"
    write_all(root, {_FILE: text})


def set_hash(text: str, version: str, name: str, sha256: str) -> str:
    """Return the text of torch.toml with the hash of one CPU wheel; comments stay."""
    document: Any = tomlkit.parse(text)
    document[version]["cpu"]["wheels"][name] = [sha256]
    return tomlkit.dumps(document)


def _find_hash(name: str, plan: ImagePlan, index: str) -> tuple[str, str]:
    """Return the sha256 of a wheel in an index or a folder, or "" and why it was not found."""
    where = [f"--index-url={index}"]
    if Path(index).is_dir():
        where = ["--no-index", f"--find-links={index}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        command += ["--dry-run", "--no-deps", "--ignore-installed", f"--target={folder}"]
        command += ["--only-binary=:all:", "--implementation=cp", "--report=-"]
        command += [f"--platform=manylinux_2_28_{MACHINES[plan.platform]}"]
        command += [f"--python-version={plan.image.python}", *where]
        command += [f"torch=={plan.image.torch}+cpu"]
        # pip's own configuration has folders and indexes too: only this place may answer.
        settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
        env = {**os.environ, **settings}
        process = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"pip exited with {process.returncode}"]
        return "", f"pip found none in {index}, or did not reach it: {lines[-1]}"
    (found,) = json.loads(process.stdout)["install"]
    info = found["download_info"]
    file = info["url"].rpartition("/")[2].replace("%2B", "+")
    if file != name:
        return "", f"found {file} in {index}"
    return str(info["archive_info"]["hashes"]["sha256"]), ""
