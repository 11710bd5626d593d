"""Look up every kernel of a set as a machine with the GPU would, and print what was found.

    python simulated_gpu.py SET.json DEVICE

Only the driver's answers are made up: tensors are real, though on the CPU, and attention is called
as attnimg and transformers do, with autograd; no variable says what to compile for; shapes and the
GPU's size are others than the build's. Nothing can be compiled: the first kernel that is not found
ends the run. Each kernel's host code is run: it looks at its tensors, and refuses the first one for
not being on a GPU. Prints JSON: entry -> whether it was loaded and did that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3] / "docker"))

import torch
from precompiled.fa4.kernel_set import Call, calls_of

SET, DEVICE = Path(sys.argv[1]), sys.argv[2]
DIGITS = DEVICE.removeprefix("sm_")
# None is the build's, with 257 documents other kernels are chosen. Nor is the window.
SHAPES = ((1, 2048, 2), (3, 640, 2))
WINDOW = 100
CAPABILITY = (int(DIGITS[:-1]), int(DIGITS[-1]))


def main() -> None:
    asked = json.loads(SET.read_text())
    properties = SimpleNamespace(
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=asked["targets"][DEVICE]["multiprocessors"] + 4,
    )
    torch.Tensor.is_cuda = property(lambda tensor: True)
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    torch.cuda.get_device_properties = lambda device=None: properties
    found = watched()

    for call in calls_of(asked, DEVICE):
        for batch, tokens, kv_heads in (*SHAPES, (8, fewest_tokens(call), 1)):
            attend(call, batch=batch, tokens=tokens, kv_heads=kv_heads)
    sys.stdout.write(json.dumps(found))


def fewest_tokens(call: Call) -> int:
    """Return the fewest for which no GPU chooses another kernel than for many.

    That is a tile of queries and one. With as many query heads as key/value heads a tile is of 192
    on sm_90 for the smaller head_dims, and two of 128 on sm_100; otherwise a backward pass of 128
    or fewer decides (flash-attn-4 4.0.0b36, 2026-11-25: one token less misses).
    """
    return 257 if call.heads_per_kv == 1 else 129


def attend(call: Call, *, batch: int, tokens: int, kv_heads: int) -> None:
    """Make one call as a training step does, with backward where a gradient is needed."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    dtype = getattr(torch, call.dtype)
    rows = (batch * tokens,) if call.varlen else (batch, tokens)
    heads = kv_heads * call.heads_per_kv
    q, k, v = (
        torch.zeros(*rows, count, size, dtype=dtype, requires_grad=call.gradient)
        for count, size in (
            (heads, call.head_dim),
            (kv_heads, call.head_dim),
            (kv_heads, call.head_dim_v),
        )
    )
    options: dict[str, Any] = {"causal": True, "softmax_scale": call.head_dim**-0.5}
    options |= {"softcap": call.softcap} if call.softcap else {}
    options |= {"window_size": (WINDOW - 1, WINDOW - 1)} if call.window else {}
    if call.sinks:
        options["learnable_sink"] = torch.zeros(heads, dtype=dtype, requires_grad=call.gradient)
    if call.varlen:
        ends = torch.arange(batch + 1, dtype=torch.int32) * tokens
        options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        options |= {"max_seqlen_q": tokens, "max_seqlen_k": tokens}
    out = (flash_attn_varlen_func if call.varlen else flash_attn_func)(q, k, v, **options)
    out = out[0] if isinstance(out, tuple) else out
    if call.gradient:
        out.backward(torch.zeros_like(out))


def watched() -> dict[str, bool]:
    """Note each look-up on disk and how its kernel answers; refuse to compile."""
    from flash_attn.cute import interface
    from flash_attn.cute.cache_utils import JITPersistentCache

    found: dict[str, bool] = {}
    load = JITPersistentCache._try_load_from_storage

    def noted(cache: Any, key: Any) -> bool:
        name = f"{cache.cache_path.name}/{cache._key_to_hash(key)}.o"
        if not load(cache, key):
            sys.exit(f"simulated_gpu: {name} is not there")
        found.setdefault(name, False)
        return True

    def refusing(cache: Any, key: Any) -> Any:
        name, kernel = f"{cache.cache_path.name}/{cache._key_to_hash(key)}.o", cache.cache[key]

        def launch(*arguments: Any) -> None:
            try:
                kernel(*arguments)
            except ValueError as error:
                found[name] = str(error).endswith("expected device_type=cuda")

        return launch

    def no_compiler(*arguments: Any, **options: Any) -> None:
        sys.exit("simulated_gpu: it would compile")

    JITPersistentCache._try_load_from_storage = noted
    JITPersistentCache.__getitem__ = refusing
    interface.cute.compile = no_compiler
    return found


if __name__ == "__main__":
    main()
