"""Read the settings of torch that a kernel must not change, and find functions that it replaced."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.modules import module

# Replaced by torch itself: torch._dynamo wraps it when it is first imported.
_REPLACED_BY_TORCH = frozenset({"manual_seed"})


def torch_settings() -> dict[str, Any]:
    """Return the settings of torch that a kernel must not change, by name."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "float32 matmul precision": _precision(),
        "reduced precision in float16 sums": (
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        ),
        "reduced precision in bfloat16 sums": (
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
        ),
        "cuDNN benchmark": torch.backends.cudnn.benchmark,
        "libraries in use": (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled),
        "kernels of scaled_dot_product_attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "gradient mode": torch.is_grad_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "threads of autograd": torch._C._is_multithreading_enabled(),
        "hooks of saved tensors": (
            torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        ),
        "modes of torch": (
            torch._C._len_torch_function_stack(),
            torch._C._len_torch_dispatch_stack(),
        ),
        "hooks of all modules": tuple(
            len(hooks)
            for hooks in (
                module._global_forward_pre_hooks,
                module._global_forward_hooks,
                module._global_backward_pre_hooks,
                module._global_backward_hooks,
            )
        ),
        "autocast": tuple(
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
        ),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "flush-denormal": _flushes_denormals(),
    }


def _precision() -> tuple[str, ...]:
    """Return the precision of float32 products: from torch's old settings, or new ones if set."""
    try:
        return (torch.get_float32_matmul_precision(), str(torch.backends.cudnn.allow_tf32))
    # torch raises when the old settings are read and contradict the new ones.
    except RuntimeError:
        parts = (
            torch.backends.cuda.matmul,
            torch.backends.cudnn.conv,
            torch.backends.mkldnn.matmul,
        )
        return tuple(str(getattr(part, "fp32_precision", None)) for part in parts)


def _flushes_denormals() -> bool:
    """Return whether this thread's arithmetic replaces denormal numbers by 0."""
    smallest = torch.full((1,), 1e-310, dtype=torch.float64, device="cpu")
    return bool((smallest * 1.0 == 0).item())


class Functions:
    """The functions of torch, and transformers' attention functions, when the object was created.

    Those of torch are all in torch and torch.nn.functional, tensor methods, and forward of torch.nn
    modules.
    """

    def __init__(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        owners: list[tuple[str, Mapping[str, Any]]] = [
            ("torch", vars(torch)),
            ("torch.nn.functional", vars(torch.nn.functional)),
            ("torch.Tensor", vars(torch.Tensor)),
            ("attention of transformers", ALL_ATTENTION_FUNCTIONS._global_mapping),
        ]
        self._known = [
            (owner, values, name, value)
            for owner, values in owners
            for name, value in values.items()
            if inspect.isroutine(value)
            and not name.startswith("_")
            and name not in _REPLACED_BY_TORCH
        ]
        self._known += [
            (f"torch.nn.{name}", vars(kind), "forward", vars(kind)["forward"])
            for name, kind in vars(torch.nn).items()
            if inspect.isclass(kind) and "forward" in vars(kind)
        ]

    def replaced(self) -> list[str]:
        """Return the names of the functions that were replaced since then."""
        return [
            f"{owner}: {name} was replaced"
            for owner, values, name, value in self._known
            if values.get(name) is not value
        ]
