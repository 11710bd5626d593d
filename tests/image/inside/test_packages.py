"""Every package is there, imports, and is the version the image was built with."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest

STACK = [
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "kernels",
    "safetensors",
    "tokenizers",
    "matplotlib",
    "pyarrow.parquet",
    "pandas",
    "attnimg",
]


@pytest.mark.filterwarnings("ignore")  # of the libraries at import: not what is tested here
@pytest.mark.parametrize("name", STACK)
def test_it_imports(name: str) -> None:
    importlib.import_module(name)


def test_versions_are_the_manifest_s(image: dict[str, Any]) -> None:
    differ = {
        name: (version, metadata.version(name))
        for name, version in image["installed"].items()
        if metadata.version(name) != version
    }
    assert not differ


def test_every_kernel_of_the_recipe_is_installed(image: dict[str, Any]) -> None:
    for kernel in image["kernels"]:
        found = metadata.version(kernel["name"])
        assert found.removesuffix("+trim") == kernel["version"], "+trim: a small build of it"


# What of each kernel a run imports first; FlashAttention-2's and -3's load their machine code.
MODULES = {
    "flash-attn": ["flash_attn.flash_attn_interface", "flash_attn_2_cuda"],
    "flash-attn-3": ["flash_attn_interface", "flash_attn_3._C"],
    "flash-attn-4": ["flash_attn.cute.interface"],
    "sageattention": ["sageattention"],
    "xformers": ["xformers.ops"],
    "torchao": ["torchao.prototype.attention"],
}


@pytest.mark.filterwarnings("ignore")  # of the libraries at import: not what is tested here
def test_every_kernel_imports(image: dict[str, Any]) -> None:
    """Without a GPU too: nothing of what they link was pruned."""
    for kernel in image["kernels"]:
        for name in MODULES[kernel["name"]]:
            importlib.import_module(name)


def test_only_flash_attention_4_owns_flash_attn_cute() -> None:
    owners = {
        dist.name.replace("_", "-")
        for dist in metadata.distributions()
        if any(line.startswith("flash_attn/cute/") for line in lines(dist))
    }
    assert owners <= {"flash-attn-4"}


def lines(dist: metadata.Distribution) -> list[str]:
    return (dist.read_text("RECORD") or "").splitlines()


def test_no_requirement_of_a_package_is_broken() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
