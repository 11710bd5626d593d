"""Compile to bytecode the modules that a run imports, and no others.

Without bytecode every start of a container would compile thousands of modules again, since users
can't write to /opt/venv; with bytecode of all modules the image grows by a third. Run it in the
layer that installs the packages.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# What `attnimg train` imports, directly or by name at run time.
USED = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.integrations.sdpa_attention",
    "transformers.trainer",
    "accelerate",
    "datasets.packaged_modules.json.json",
    "peft",
    "trl.trainer.sft_trainer",
    "bitsandbytes",
    "kernels",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pydantic",
    "rich.console",
    "yaml",
    "pytest",
)


def main() -> None:
    """Import the modules, then compile every source file that was imported."""
    sys.dont_write_bytecode = True  # it is written once, below
    with tempfile.TemporaryDirectory() as caches:
        # matplotlib caches a list of fonts at its first import; the layer must not have it.
        # bitsandbytes would ask the Hugging Face hub for a kernel.
        os.environ |= {"HOME": caches, "MPLCONFIGDIR": caches, "HF_HUB_OFFLINE": "1"}
        for name in USED:
            importlib.import_module(name)
    modules = {name: module for name, module in sys.modules.items() if name != "__main__"}
    files = {getattr(module, "__file__", None) for module in modules.values()}
    # torch.ops names a file without its folder.
    sources = sorted(f for f in files if f and f.endswith(".py") and Path(f).is_file())
    # In a new process: what this one has interned would be in the bytecode, which is then another
    # one in each build. By time: a hash would be read at each import.
    compiled = subprocess.run(
        [sys.executable, "-m", "compileall", "-q", "-i", "-"],
        input="\n".join(sources), env={**os.environ, "PYTHONHASHSEED": "0"}, text=True, check=False,
    )  # fmt: skip
    # 1: a file that no Python of this release can compile, such as a template.
    if compiled.returncode not in (0, 1):
        sys.exit(compiled.returncode)
    print(f"bytecode: compiled {len(sources)} modules")


if __name__ == "__main__":
    main()
