"""Every package is there, imports, and is the version the image was built with."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib import metadata
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.mark.filterwarnings("ignore")  # of the libraries at import: not what is tested here
def test_liger_imports_where_it_is_installed(image: dict[str, Any]) -> None:
    if "liger-kernel" not in image["installed"]:
        pytest.skip("Liger's kernels are in the CUDA images alone")
    importlib.import_module("liger_kernel.transformers.monkey_patch")


def changed(image: dict[str, Any]) -> dict[str, str]:
    """Return the packages of the image that a child image or a user has replaced."""
    return {
        name: f"{name} {version} -> {metadata.version(name)}"
        for name, version in image["installed"].items()
        if metadata.version(name) != version
    }


# Other packages may differ in a child image: `attnimg doctor` names them. The gate `pins` checks
# them in the image itself.
def test_torch_and_the_kernels_are_the_manifest_s(image: dict[str, Any]) -> None:
    differ = changed(image)
    assert not [text for name, text in differ.items() if name in image["fixed"]]


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


def test_no_requirement_of_a_package_is_broken(image: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    # A child image answers for what it added.
    ours = image["installed"].keys() - changed(image)
    broken = [line for line in done.stdout.splitlines() if line.partition(" ")[0] in ours]
    assert not broken, done.stdout


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(b"curandCreateGenerator", id="libcurand"),
        pytest.param(b"cudnnCausalConv1d", id="libcudnn_ext"),
    ],
)
def test_torch_calls_nothing_that_was_pruned(function: bytes) -> None:
    """Of these only a GPU would notice the absence."""
    for library in (Path(torch.__file__).parent / "lib").glob("libtorch_*.so"):
        with library.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            assert content.find(function) < 0, library


def test_torch_finds_all_functions_that_it_calls() -> None:
    """At once; otherwise each is looked for when it is first called."""
    done = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env={**os.environ, "LD_BIND_NOW": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="cuDNN is in images for CUDA alone")
def test_cudnn_opens_its_parts() -> None:
    """Without a GPU it opens its engines too, to finalize a descriptor, and refuses only then."""
    program = (
        "import ctypes, torch\n"
        "cudnn, descriptor = ctypes.CDLL('libcudnn.so.9'), ctypes.c_void_p()\n"
        "parts = ['Graph', 'Ops', 'Cnn', 'Adv']\n"
        "assert not any(cudnn[f'cudnn{part}VersionCheck']() for part in parts)\n"
        "assert not cudnn.cudnnBackendCreateDescriptor(15, ctypes.byref(descriptor))\n"
        "assert cudnn.cudnnBackendFinalize(descriptor) == 2000\n"  # CUDNN_STATUS_BAD_PARAM
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
