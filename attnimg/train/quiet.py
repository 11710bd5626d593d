"""Keep libraries from talking over the run: their bars, their chatter, their calls home."""

from __future__ import annotations

import logging
import os
import sys
from importlib.util import find_spec


def silence_libraries() -> None:
    """Turn off progress bars, notes and telemetry of the libraries below; errors still come.

    Call it before transformers is imported: the hub client reads its switches at import.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers would report to a Kubeflow server whatever report_to says.
    # Source: transformers 5.22.2, training_args.py, is_kubeflow_available (2026-11-27).
    os.environ["DISABLE_KUBEFLOW_INTEGRATION"] = "TRUE"
    # loss.png is drawn without a window; matplotlib raises on a backend that it does not know.
    os.environ["MPLBACKEND"] = "agg"
    # It would warn that the kernel it was kept from is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    _import_bitsandbytes_alone()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # What they warn of is either refused by name before the run or said by the plan.
    for name in ("accelerate", "torch.distributed", "kernels", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _import_bitsandbytes_alone() -> None:
    """Import bitsandbytes without the hub kernel it would fetch, and run, at import.

    On a CPU with avx512_bf16 it asks the hub for kernels-community/quantization-bitsandbytes, which
    also computes in bfloat16 whatever the run's precision; without it, it uses its own code.
    Source: bitsandbytes 0.50.2, backends/cpu/ops.py, has_avx512bf16 (2026-11-21).
    """
    if find_spec("bitsandbytes") is None or "bitsandbytes" in sys.modules:
        return
    kernels = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # None makes its import fail
    try:
        import bitsandbytes  # noqa: F401  imported for its registrations alone
    finally:
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels
