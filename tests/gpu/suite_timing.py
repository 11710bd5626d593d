"""Time a backend's attention, forward and backward, and compare it with the GPU's peak.

A call is timed as a model makes it: attnimg's function on (B, H, T, D) tensors, conversions of
layout included. Operations are counted for what a causal model needs, whatever the kernel computes:
for each document of L tokens and each query head, L * L / 2 pairs of a query and a key, each with
2 * D operations for the score and 2 * D for the output; the backward pass has five such products
where the forward pass has two, so 2.5 times as many.
Source: Dao-AILab/flash-attention at 0251105, benchmarks/benchmark_flash_attention.py, flops(), read
2026-11-26.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import suite_adapters as adapters
import torch
from suite_models import document_lengths
from suite_units import versions

from attnimg.backends._transformers import attention_function

# Dense bfloat16 TFLOP/s of the tensor cores: 132 multiprocessors * 4096 operations a cycle * 1830
# MHz, the same for both. The clock may be higher, 1980 MHz on the H200 of docs/gpu-runs.md.
# Source: https://glennklockwood.com/garden/processors/h100, 989.4 (2026-11-26); NVIDIA's own data
# sheets were not read.
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4}
WARM_UP, TIMED = 3, 10


def timing(unit: dict[str, Any], stage: Callable[[str], None]) -> dict[str, Any]:
    """Time forward, and forward with backward; the medians of several calls."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = adapters.backend(unit["backend"])
    tokens, length = unit["tokens"], unit["length"]
    rows = tokens // length
    documents = [
        document_lengths(length, seed=row) if unit["packing"] else [length] for row in range(rows)
    ]
    padding_free = unit["packing"] and adapters.is_padding_free(backend)
    shape = (1, tokens) if padding_free else (rows, length)
    heads = unit["width"] // unit["head_dim"]
    kv_heads = max(1, heads // adapters.GROUP)
    generator = torch.Generator(device=device).manual_seed(0)
    # In memory (B, T, H, D), as after a model's projections and rotary embeddings.
    tensors = [
        torch.randn(
            (*shape, n, unit["head_dim"]), generator=generator, device=device,
            dtype=getattr(torch, unit["dtype"]),
        )
        for n in (heads, kv_heads, kv_heads, heads)
    ]  # fmt: skip
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in tensors[:3])
    d_out = tensors[3]
    mask, arguments = _documents(backend, documents, shape, device)
    function = attention_function(backend)
    layer = SimpleNamespace(is_causal=True, training=True)

    def forward() -> torch.Tensor:
        out: torch.Tensor = function(
            layer, q, k, v, mask, scaling=unit["head_dim"] ** -0.5, **arguments
        )[0]
        return out

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), d_out)

    stage("warm-up")
    repeats = 1 if device == "cpu" else TIMED
    forward_s = _median(forward, device=device, repeats=repeats)
    stage("timing")
    both_s = _median(both, device=device, repeats=repeats)
    pairs = sum(n * n / 2 for row in documents for n in row)
    forward_flop = 4 * pairs * unit["head_dim"] * heads
    achieved = 3.5 * forward_flop / both_s / 1e12
    name = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    peak = PEAK_TFLOPS.get(name)
    return {
        "state": "measured",
        "values": {
            **{key: unit[key] for key in ("head_dim", "length", "packing", "dtype", "tokens")},
            "heads": heads,
            "kv_heads": kv_heads,
            "documents": sum(map(len, documents)),
            "forward_ms": round(1000 * forward_s, 4),
            "both_ms": round(1000 * both_s, 4),
            "forward_tflops": round(forward_flop / forward_s / 1e12, 2),
            "both_tflops": round(achieved, 2),
            "peak_tflops": peak,
            "share_of_peak": round(achieved / peak, 4) if peak else None,
            "versions": versions(),
        },
    }


def _documents(
    backend: Any, documents: list[list[int]], shape: tuple[int, int], device: str
) -> tuple[Any, dict[str, Any]]:
    """Return the mask and the arguments by which a backend learns of the documents."""
    lengths = [n for row in documents for n in row]
    packed = len(lengths) > len(documents)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths]).reshape(shape)
    arguments: dict[str, Any] = {"position_ids": positions}
    if backend.mask == "flash":
        if packed:
            bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
            for side in "qk":
                arguments |= {f"cu_seq_lens_{side}": bounds, f"max_length_{side}": max(lengths)}
        return None, arguments
    ids = torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
    ).reshape(shape)
    if backend.mask == "flex":
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(batch: Any, _head: Any, query: Any, key: Any) -> Any:
            return (query >= key) & (ids[batch, query] == ids[batch, key])

        n = shape[1]
        return create_block_mask(visible, shape[0], None, n, n, device=device), arguments
    if backend.mask == "eager":
        return _additive(ids), arguments
    # Without a mask, sdpa goes by is_causal.
    return (_visible(ids) if packed else None), arguments


def _visible(ids: torch.Tensor) -> torch.Tensor:
    """Return where queries may look, (B, 1, T, T), from the document of each token, (B, T)."""
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    return (ids[:, None, :, None] == ids[:, None, None, :]) & causal


def _additive(ids: torch.Tensor) -> torch.Tensor:
    """Return the mask that eager attention adds to its scores."""
    visible = _visible(ids)
    lowest = torch.finfo(torch.bfloat16).min
    return torch.zeros_like(visible, dtype=torch.bfloat16).masked_fill(~visible, lowest)


def _median(call: Callable[[], object], *, device: str, repeats: int) -> float:
    """Return the median of the seconds that calls take, by CUDA events where there is a GPU."""
    for _ in range(WARM_UP if device == "cuda" else 1):
        call()
    if device == "cpu":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1000
