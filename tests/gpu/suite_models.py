"""Train random Llamas of two shapes on a backend: losses against another's, tokens/s, memory."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import suite_adapters as adapters
import torch
from suite_units import versions

from attnimg import application

# 1b: Llama 3.2 1B with a smaller vocabulary, since random weights need no words.
# Source: config.json of meta-llama/Llama-3.2-1B as copies of it on the hub have it, such as
# https://huggingface.co/h3110Fr13nd/llama-3.2-1b-onnx; the original asks for a login (2026-11-26).
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64,
    },
    "1b": {
        "vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64,
    },
}  # fmt: skip
# Share of the reference's first loss by which a loss may differ: bfloat16 keeps 3 digits, and each
# step spreads what it drops.
TOLERANCE = 0.02
# Batches that are shown again and again, so that a model learns them in a few steps.
BATCHES = 2


def document_lengths(tokens: int, *, seed: int) -> list[int]:
    """Draw document lengths that fill a row: log-normal, median 400 tokens, sigma 1."""
    rng = random.Random(seed)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, max(8, int(rng.lognormvariate(6.0, 1.0)))))
    return lengths


def training(unit: dict[str, Any], stage: Callable[[str], None]) -> dict[str, Any]:
    """Train some steps on packed rows; compare with the losses in unit["reference"], if any.

    unit["reference"] is the name of another backend and its losses, or None.
    """
    backend = adapters.backend(unit["backend"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, unit["dtype"])
    shape = SHAPES[unit["shape"]]
    layers = adapters.layers(
        [shape["head_dim"]],
        heads=shape["num_attention_heads"],
        count=shape["num_hidden_layers"],
    )
    with application.restore_registries():
        stage("loading the model")
        model = _model(
            shape, application.load_and_register(backend, layers=layers), dtype=dtype, device=device
        )
        application.require_applied(model, backend)
        stage("isolation check")
        isolated, why = adapters.isolation(model, unit)
        stage("training")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        losses, seconds = _steps(model, unit)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
    compared_with, reference = unit.get("reference") or (None, None)
    difference = (
        max(abs(a - b) for a, b in zip(losses, reference, strict=True)) if reference else None
    )
    faults = []
    if not isolated:
        faults.append(("packing-not-isolated", why))
    if not losses[-1] < losses[0]:  # also where a loss is NaN
        faults.append(("no-descent", f"loss went from {losses[0]:.4f} to {losses[-1]:.4f}"))
    allowed = TOLERANCE * reference[0] if reference else 0.0
    if difference is not None and not difference <= allowed:
        text = f"by {difference:.3f} from {compared_with}'s, allowed {allowed:.3f}"
        faults.append(("loss-differs", text))
    return {
        "state": "failed" if faults else "passed",
        "code": faults[0][0] if faults else "",
        "text": "; ".join(text for _, text in faults),
        "values": {
            "shape": unit["shape"],
            "dtype": unit["dtype"],
            "steps": len(losses),
            "tokens_per_step": unit["tokens"],
            "losses": [round(loss, 5) for loss in losses],
            "difference": difference,
            "compared_with": compared_with,
            "isolation": why,
            # The first steps compile and allocate.
            "tokens_per_second": round(unit["tokens"] / statistics.median(seconds[3:]), 1),
            "memory_bytes": memory,
            "versions": versions(),
        },
    }


def _model(shape: dict[str, int], implementation: str, *, dtype: Any, device: str) -> Any:
    """Build a Llama with the same random weights every time."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, max_position_embeddings=8192, tie_word_embeddings=True, pad_token_id=0
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation, dtype=dtype
        )
    return model.train()


def _steps(model: Any, unit: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Train; return the loss and the seconds of each step."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=unit["learning_rate"])
    collate = adapters.packed_collator(unit["backend"])
    batches = []
    for seed in range(BATCHES):
        generator = torch.Generator().manual_seed(seed)
        size = (unit["tokens"],)
        ids = torch.randint(3, model.config.vocab_size, size, generator=generator).tolist()
        lengths = document_lengths(unit["tokens"], seed=seed)
        batch = collate([{"input_ids": ids, "labels": ids, "document_lengths": lengths}])
        batches.append({key: x.to(device) if torch.is_tensor(x) else x for key, x in batch.items()})
    losses, seconds = [], []
    for step in range(unit["steps"]):
        begun = time.perf_counter()
        loss = model(**batches[step % BATCHES], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the GPU
        seconds.append(time.perf_counter() - begun)
    return losses, seconds


def write_job(folder: Path, unit: dict[str, Any]) -> Path:
    """Write a random model, its tokenizer and the YAML of a run; return the YAML's path."""
    root = Path(__file__).resolve().parents[2]
    sys.path.append(str(root / "examples" / "demo"))
    from prepare import make_tokenizer

    tokenizer = make_tokenizer()
    shape = SHAPES[unit["shape"]] | {"vocab_size": len(tokenizer)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _model(shape, "sdpa", dtype=getattr(torch, unit["dtype"]), device=device)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = None
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    precision = "bf16: full" if unit["dtype"] == "bfloat16" else "bf16: false"
    config = folder / "run.yaml"
    config.write_text(
        f"base_model: {folder / 'model'}\n"
        f"attn_implementation: {unit['backend']}\nattn_strict: true\n"
        f"datasets:\n  - path: {root / 'examples/data/kjv.jsonl'}\n    type: completion\n"
        f"sequence_len: {unit['sequence_len']}\nsample_packing: true\n"
        f"micro_batch_size: {unit['rows']}\nmax_steps: {unit['steps']}\nlogging_steps: 2\n"
        f"learning_rate: 1e-4\noptimizer: adamw_torch_fused\n{precision}\n"
        f"output_dir: {folder / 'out'}\n",
        encoding="utf-8",
    )
    return config
