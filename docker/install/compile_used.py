"""Compile to bytecode the modules that a run imports, and no others.

Without bytecode every start of a container would compile thousands of modules again, since users
can't write to /opt/venv; with bytecode of all modules the image grows by a third. Run it in the
layer that installs the packages.
"""

from __future__ import annotations

import compileall
import importlib
import os
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
        os.environ |= {"HOME": caches, "MPLCONFIGDIR": caches}
        for name in USED:
            importlib.import_module(name)
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    sources = sorted(Path(file) for file in files if file and file.endswith(".py"))
    for source in sources:
        compileall.compile_file(source, quiet=2)
    print(f"bytecode: compiled {len(sources)} modules")


if __name__ == "__main__":
    main()
