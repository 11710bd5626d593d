"""Read the settings of torch that a kernel must not change, and torch's functions."""

from __future__ import annotations

import inspect
import math
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils.checkpoint
from torch.nn.modules import module

# Further flags of torch's C++ code, by the names of what reads them.
_FLAGS = (
    "_debug_only_are_vmap_fallback_warnings_enabled", "_get_autograd_fallback_mode",
    "_get_backcompat_broadcast_warn", "_get_backcompat_keepdim_warn",
    "_get_blas_preferred_backend", "_get_cpu_allow_fp16_reduced_precision_reduction",
    "_get_cublas_allow_fp16_accumulation", "_get_cudnn_depthwise_kernel",
    "_get_dtensor_allow_implicit_replication", "_get_graph_executor_optimize",
    "_get_linalg_preferred_backend", "_get_math_sdp_allow_fp16_bf16_reduction",
    "_get_miopen_immediate", "_get_mkldnn_deterministic", "_get_nnpack_enabled",
    "_get_onednn_allow_tf32", "_get_overrideable_sdp_enabled", "_get_qengine",
    "_get_rocm_fa_preferred_backend", "_get_sm_carveout_experimental", "_get_warnAlways",
    "_is_fwd_grad_enabled", "_is_grad_layout_enforcement_enabled", "_is_torch_function_enabled",
    "_is_view_replay_enabled", "_warn_on_accumulate_grad_stream_mismatch",
    "is_anomaly_check_nan_enabled", "is_inference_mode_enabled", "_jit_llga_enabled",
    "_jit_texpr_fuser_enabled",
)  # fmt: skip

# The settings of torch's compilers, without the names of limits and caches: a kernel that compiles
# for many shapes may need larger ones.
_COMPILERS = (
    "torch._dynamo.config", "torch._inductor.config", "torch._functorch.config",
    "torch.fx.experimental._config",
)  # fmt: skip
_LIMITS = re.compile("limit|cache|thread|verbose|log")

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
        "cuDNN and oneDNN": (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled),
        "kernels of scaled_dot_product_attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "gradient mode": torch.is_grad_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "multithreading of autograd": torch._C._is_multithreading_enabled(),
        "hooks of saved tensors": (
            torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        ),
        "__torch_function__ and __torch_dispatch__ modes": (
            torch._C._len_torch_function_stack(),
            torch._C._len_torch_dispatch_stack(),
        ),
        "global module hooks": tuple(
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
        "print options of tensors": vars(torch._tensor_str.PRINT_OPTS).copy(),
        "fill_uninitialized_memory": torch.utils.deterministic.fill_uninitialized_memory,
        "torch.compile": _compiles(),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "sharing strategy of tensors": torch.multiprocessing.get_sharing_strategy(),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "flush-denormal": _flushes_denormals(),
        "torch.load": (
            frozenset(torch.serialization.get_safe_globals()),
            torch.serialization.get_default_mmap_options(),
        ),
        "activation checkpointing": (
            torch.utils.checkpoint.DefaultDeviceType.get_device_type(),
            torch.utils.checkpoint._checkpoint_debug_enabled,
        ),
        "einsum": (torch.backends.opt_einsum.enabled, torch.backends.opt_einsum.strategy),
        "device and stream": _current_stream(),
        "registered kernels of torch's operators": _registered_kernels(),
        **{f"torch._C.{name}": _flag(name) for name in _FLAGS},
    }


def compiler_settings() -> dict[str, Any]:
    """Return the settings of torch's compilers that differ from their defaults, by full name."""
    found = {}
    for module_name in _COMPILERS:
        config = sys.modules.get(module_name)
        for name, entry in getattr(config, "_config", {}).items():
            value = entry.user_override.get()
            # What nobody has set is a plain object. Setting something for a while leaves its value.
            defaults = (entry.env_value_force, entry.env_value_default, entry.default)
            usual = next((x for x in defaults if type(x) is not object), None)
            if type(value) is not object and value != usual and not _LIMITS.search(name):
                found[f"{module_name}.{name}"] = value
    return found


def _flag(name: str) -> str:
    getter = getattr(torch._C, name, None)
    # The name of an enum's value; other versions of torch may not have the flag.
    return str(getter() if callable(getter) else getter)


def _current_stream() -> tuple[int, int] | None:
    if not torch.cuda.is_initialized():
        return None
    return torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream


def _registered_kernels() -> frozenset[str]:
    """Return the kernels of torch's own operators that Python code has registered.

    torch itself registers those for its meta device, when it first needs them; fp8 makes it
    register other flash kernels (backends/fp8.py).
    """
    registered: set[str] = torch.library._impls
    return frozenset(
        key
        for key in registered
        if key.startswith("aten/") and not key.endswith("/Meta") and "flash_attention" not in key
    )


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


def _compiles() -> bool:
    """Return whether torch.compile compiles; torch reads the variable when it is first used."""
    config = sys.modules.get("torch._dynamo.config")
    disabled = os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1"
    return not (disabled if config is None else config.disable)


def _flushes_denormals() -> bool:
    """Return whether this thread's arithmetic replaces denormal numbers by 0."""
    smallest = torch.full((1,), 1e-310, dtype=torch.float64, device="cpu")
    return bool((smallest * 1.0 == 0).item())


def list_functions() -> list[tuple[str, Mapping[str, Any], str, Any]]:
    """Return the functions of torch, and transformers' attention functions.

    Those of torch are all in torch and torch.nn.functional, tensor methods, and forward of torch.nn
    modules; of torch and math also dtypes and constants. Each has its owner's name, the owner's
    values, its own name, and itself.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    owners: list[tuple[str, Mapping[str, Any]]] = [
        ("torch", vars(torch)),
        ("math", vars(math)),
        ("torch.nn.functional", vars(torch.nn.functional)),
        ("torch.Tensor", vars(torch.Tensor)),
        ("attention of transformers", ALL_ATTENTION_FUNCTIONS._global_mapping),
    ]
    functions = [
        (owner, values, name, value)
        for owner, values in owners
        for name, value in values.items()
        if not name.startswith("_")
        and name not in _REPLACED_BY_TORCH
        and (inspect.isroutine(value) or isinstance(value, torch.dtype | float))
    ]
    return functions + [
        (f"torch.nn.{name}", vars(kind), "forward", vars(kind)["forward"])
        for name, kind in vars(torch.nn).items()
        if inspect.isclass(kind) and "forward" in vars(kind)
    ]


def replaced_functions(functions: list[tuple[str, Mapping[str, Any], str, Any]]) -> list[str]:
    """Return the names of the functions that were replaced since they were listed."""
    return [
        f"{owner}: {name} was replaced"
        for owner, values, name, value in functions
        if values.get(name) is not value
    ]
