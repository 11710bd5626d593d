"""Compile to bytecode what a run imports, and only that: the rest of /opt/venv stays source.

Without it every start of a container would compile thousands of modules anew, since nobody may
write to /opt/venv; with all of it the image grows by a third. Run in the layer that installed them.
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
    """Import, then compile every source file that came with it."""
    sys.dont_write_bytecode = True  # the compiled file is to be written once, below
    with tempfile.TemporaryDirectory() as caches:
        # matplotlib lists the fonts when it is first imported; the layer is to have no cache.
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
