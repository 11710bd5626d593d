"""Measure the running check: stopped right kernels, found faults, and the time of a check.

Right kernels are torch's and transformers' own, and those of tests/fixtures/noisy_kernels with the
noise of a GPU, on random shapes, masks and values like those of trained models. Wrong kernels are
exact attention with one fault. The cost is the CPU time of steps with a check, compared with the
other steps of the same small packed run, and that of comparing the process (process_ms). Writes
docs/measured/running-check.json.

    python benchmarks/running_check.py [checks]
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from attnimg.facts import DType

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/measured/running-check.json"
sys.path[:0] = [str(ROOT / "tests/fixtures")]

CHECKS = 10_000
# Checks in each task of a worker process.
PART = 250
# Checks of each fault.
WRONG_CHECKS = 50
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
HEAD_DIMS = (16, 32, 64, 128)
GROUPS = (1, 2, 4, 8)
WINDOWS = (None, None, 4, 33)
# Right kernels, and which of softcap and sinks they support.
KERNELS = {
    "sdpa": (),
    "sdpa, masked": (),
    "eager": ("softcap", "sinks"),
    "eager under autocast": ("softcap", "sinks"),
    "fa2": (),
    "fa3": (),
    "fa4": (),
}
# The values of q, k and v: normal, with a few large channels, with a token that gets all attention,
# with nearly equal keys.
VALUES = ("spread", "outlier channels", "attention sink", "flat")
FAULTS = (
    "documents see one another",
    "a window is a key too long",
    "the last token's output is 0",
    "the scale is 5 % too large",
    "out is 3 % too large",
    "dv is 3 % too large",
    "dk of a key head is lost",
    "dq of the first 16 tokens is lost",
    "a gradient is NaN",
)
# Steps of a run whose cost is measured, and the number of steps between its checks.
STEPS, EVERY = 90, 6
DEFAULT_EVERY = 200
# name -> layers, hidden size, query heads, key heads, tokens of a row.
MODELS = {
    "2 layers of 64, rows of 64": (2, 64, 4, 2, 64),
    "2 layers of 64, rows of 512": (2, 64, 4, 2, 512),
    "4 layers of 256, rows of 256": (4, 256, 8, 4, 256),
}


@dataclass(frozen=True, kw_only=True)
class CallSpec:
    """The properties of one call to check.

    Attributes:
        kernel: one of KERNELS.
        dtype: one of DTYPES.
        lengths: tokens of each document.
        heads: query heads.
        kv_heads: key heads.
        head_dim: of q, k and v.
        window: keys that a query sees; None for all.
        softcap: of the scores; None for none.
        sinks: whether a learned sink joins the softmax.
        values: one of VALUES.
        d_out: standard deviation of the gradient of the output.
        seed: of the random values.
    """

    kernel: str
    dtype: DType
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    softcap: float | None
    sinks: bool
    values: str
    d_out: float
    seed: int


def main() -> None:
    """Measure everything, and write the record after each part."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import torch

    torch.set_num_threads(1)
    n_checks = int(sys.argv[1]) if len(sys.argv) > 1 else CHECKS
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()} CPU, torch {torch.__version__}",
        **settings(),
    }
    for name, part in (
        ("cost", cost),
        ("wrong", check_wrong_kernels),
        ("right", partial(check_right_kernels, n_checks)),
    ):
        record[name] = part()
        print(f"{name}: {json.dumps(record[name], indent=2)}", flush=True)
        RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def settings() -> dict[str, Any]:
    """Return the names of what is measured, for the test that the record is up to date."""
    return {
        "grid": {
            "kernels": list(KERNELS),
            "dtype": list(DTYPES),
            "head_dim": list(HEAD_DIMS),
            "heads_to_a_key_head": list(GROUPS),
            "values": list(VALUES),
        },
        "faults": list(FAULTS),
        "models": list(MODELS),
    }


def draw_spec(number: int) -> CallSpec:
    """Draw the properties of one call; a number always gives the same call."""
    pick = random.Random(number)
    kernel = list(KERNELS)[number % len(KERNELS)]
    dtypes = DTYPES[1:] if kernel.startswith("fa") or "autocast" in kernel else DTYPES
    group = pick.choice(GROUPS)
    kv_heads = pick.choice((1, 2)) if group > 1 else pick.choice((1, 2, 4))
    count = pick.choice((1, 1, 2, 3, 8))
    longest = pick.choice((1, 3, 8, 24, 64, 200)) if count < 8 else pick.choice((3, 16))
    extra = pick.choice(("", *KERNELS[kernel])) if KERNELS[kernel] else ""
    dtype = pick.choice(dtypes)
    return CallSpec(
        kernel=kernel,
        dtype=dtype,
        lengths=tuple(pick.randint(1, longest) for _ in range(count)),
        heads=group * kv_heads,
        kv_heads=kv_heads,
        head_dim=pick.choice(HEAD_DIMS),
        window=pick.choice(WINDOWS),
        softcap=pick.choice((5.0, 50.0)) if extra == "softcap" else None,
        sinks=extra == "sinks",
        values=pick.choice(VALUES),
        # From the mean over a million tokens to a loss that is scaled up for float16.
        d_out=10.0 ** (pick.uniform(-4, 1) if dtype == "float16" else pick.uniform(-8, 3)),
        seed=number,
    )


def make_call(spec: CallSpec, function: Any = None) -> Any:
    """Run a call forward and backward; `function` replaces the kernel's own."""
    import torch

    from attnimg.verification.running_check import NAMES, CallKind, CapturedCall, call_again

    generator = torch.Generator().manual_seed(spec.seed)
    n_tokens, dtype = sum(spec.lengths), getattr(torch, spec.dtype)
    shape = (1, n_tokens, spec.heads, spec.head_dim)
    q = torch.randn(shape, generator=generator).transpose(1, 2)
    k, v = (
        torch.randn(1, n_tokens, spec.kv_heads, spec.head_dim, generator=generator)
        for _ in range(2)
    )
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if spec.values == "outlier channels":
        q[..., 3], k[..., 3], v[..., 5] = 6 * q[..., 3], 6 * k[..., 3] + 4, 20 * v[..., 5]
    elif spec.values == "attention sink":
        k[:, :, 0] = 3 * q[:, :: spec.heads // spec.kv_heads].mean(2)
        v[:, :, 0] = 0.01 * v[:, :, 0]
    elif spec.values == "flat":
        k, v = 0.01 * k, v + 3
    d_out = torch.randn(shape, generator=generator) * spec.d_out
    # In the last layer, tokens without loss have a gradient of 0.
    if spec.seed % 3 == 0:
        d_out[:, : n_tokens // 2] = 0
    own, mask, arguments, autocast = _kernel(spec, generator)
    weights = torch.float32 if autocast else dtype
    call = CapturedCall(
        function=function or own,
        module=SimpleNamespace(is_causal=True, training=True),
        layer=0,
        kind=CallKind(spec.heads, spec.kv_heads, spec.head_dim, spec.head_dim, None, None, False),
        q=q.to(weights),
        k=k.to(weights),
        v=v.to(weights),
        mask=mask,
        arguments=arguments,
        autocast=autocast,
        needs_grad=NAMES[spec.seed % 7 % 3 :] if spec.seed % 5 == 0 else NAMES,
        out=q,
        d_out=d_out.to(dtype),
        gradients={},
    )
    return call_again(call)


def _kernel(spec: CallSpec, generator: Any) -> tuple[Any, Any, dict[str, Any], Any]:
    """Return a kernel, its mask, its other arguments, and the dtype of autocast."""
    import torch

    from attnimg.backends._exact import exact_attention
    from attnimg.backends._transformers import eager_attention, native_attention

    noisy, backends = import_module("noisy_proofs"), import_module("attnimg.backends")
    lengths = torch.tensor((0, *spec.lengths))
    positions = torch.cat([torch.arange(n) for n in spec.lengths])[None]
    arguments: dict[str, Any] = {"scaling": spec.head_dim**-0.5, "position_ids": positions}
    if spec.window is not None:
        arguments["sliding_window"] = spec.window
    if spec.softcap is not None:
        arguments["softcap"] = spec.softcap
    if spec.sinks:
        arguments["s_aux"] = torch.randn(spec.heads, generator=generator)
        arguments["s_aux"] = arguments["s_aux"].to(getattr(torch, spec.dtype))
    if spec.kernel == "sdpa":
        return exact_attention("sdpa"), None, arguments, None
    if spec.kernel in ("fa2", "fa3", "fa4"):
        ends = lengths.cumsum(0).int()
        for side in "qk":
            arguments |= {f"cu_seq_lens_{side}": ends, f"max_length_{side}": max(spec.lengths)}
        tile = (64, 128)[spec.seed % 2]
        module = noisy.load(spec.kernel, fault="none", tile=tile)
        return _flash(module), None, arguments, None
    number = torch.repeat_interleave(torch.arange(len(spec.lengths)), lengths[1:])
    behind = torch.arange(len(number))[:, None] - torch.arange(len(number))
    seen = (behind >= 0) & (behind < (spec.window or len(number)))
    seen = (seen & (number[:, None] == number))[None, None]
    if spec.kernel == "sdpa, masked":
        sdpa = backends.find_backend("sdpa")
        return partial(native_attention, sdpa), seen, arguments, None
    cast = getattr(torch, spec.dtype) if "autocast" in spec.kernel else None
    kind = torch.float32 if cast else getattr(torch, spec.dtype)
    bias = torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, torch.finfo(kind).min)
    return eager_attention, bias, arguments, cast


def _flash(module: Any) -> Any:
    from attnimg.backends._varlen import FlashKernel

    return FlashKernel(
        backend="flash_attention_2",
        dense=module.flash_attn_func,
        varlen=module.flash_attn_varlen_func,
    )


def check(call: Any, spec: CallSpec) -> Any:
    """Compare a call as a run does."""
    from attnimg.backends import find_backend
    from attnimg.verification.running_check import check_call

    name = "flash_attention_2" if spec.kernel.startswith("fa") else spec.kernel.split(",")[0]
    backend = find_backend(name.split()[0])
    assert backend is not None
    return check_call(call, backend=backend, dtype=spec.dtype, longest=None, seed=str(spec.seed))


def check_right_kernels(n_checks: int) -> dict[str, Any]:
    """Check right kernels, in two processes."""
    parts = [range(begin, min(begin + PART, n_checks)) for begin in range(0, n_checks, PART)]
    found: dict[str, Any] = {}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for part in pool.map(check_draws, parts):
            found = _sum(found, part) if found else part
            print(f"right: {found}", flush=True)
    return found


def check_draws(numbers: range) -> dict[str, Any]:
    """Check the right kernels of the calls with these numbers."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "checks": 0, "skipped": {}, "doubtful": 0, "stopped": 0, "reasons": [],
        "closest_to_its_bound": {name: 0.0 for name in KERNELS}, "cpu_s": 0.0,
    }  # fmt: skip
    begun = time.process_time()
    for number in numbers:
        spec = draw_spec(number)
        result = check(make_call(spec), spec)
        if result.skipped:
            found["skipped"][result.skipped] = found["skipped"].get(result.skipped, 0) + 1
            continue
        found["checks"] += 1
        found["doubtful"] += bool(result.faults) and not result.confirmed
        found["stopped"] += result.confirmed
        if result.faults:
            found["reasons"].append(f"{spec}: {result.faults[0].text}")
        else:
            closest = found["closest_to_its_bound"]
            closest[spec.kernel] = round(max(closest[spec.kernel], result.margin), 3)
    found["cpu_s"] = round(time.process_time() - begun, 1)
    return found


def _sum(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the sum of two parts' results."""
    skipped = Counter(one["skipped"]) + Counter(other["skipped"])
    closest = {
        kernel: max(margin, other["closest_to_its_bound"][kernel])
        for kernel, margin in one["closest_to_its_bound"].items()
    }
    added = {name: one[name] + other[name] for name in one if not isinstance(one[name], dict)}
    added["cpu_s"] = round(added["cpu_s"], 1)
    return {**added, "skipped": dict(skipped), "closest_to_its_bound": closest}


def check_wrong_kernels() -> dict[str, Any]:
    """Check exact attention with each fault, on rows where the fault has an effect."""
    found = {}
    for fault in FAULTS:
        seen = stopped = 0
        for number in range(WRONG_CHECKS):
            spec = replace(
                draw_spec(number), kernel="sdpa", dtype=DTYPES[number % 3], lengths=(40, 30, 50),
                heads=4, kv_heads=2, window=None, softcap=None, sinks=False, values="spread",
                d_out=1.0, seed=number * 30 + 1,
            )  # fmt: skip
            if "window" in fault:
                spec = replace(spec, window=4)
            result = check(make_call(spec, partial(_faulty, fault)), spec)
            seen, stopped = seen + bool(result.faults), stopped + result.confirmed
        found[fault] = {"checks": WRONG_CHECKS, "seen": seen, "stopped": stopped}
    return found


def _faulty(fault: str, module: Any, q: Any, k: Any, v: Any, mask: Any, **arguments: Any) -> Any:
    """Compute exact attention with one fault."""
    import torch

    from attnimg.backends._exact import exact_attention

    def with_gradient(x: Any, factor: Any) -> Any:
        """Return x, whose gradient is multiplied by a factor."""
        return x.detach() + factor * (x - x.detach())

    if fault == "documents see one another":
        del arguments["position_ids"]
    elif fault == "a window is a key too long":
        arguments["sliding_window"] += 1
    elif fault == "the scale is 5 % too large":
        arguments["scaling"] *= 1.05
    elif fault == "dv is 3 % too large":
        v = with_gradient(v, 1.03)
    elif fault == "dk of a key head is lost":
        k = with_gradient(k, torch.tensor([1.0, 0.0], dtype=k.dtype)[:, None, None])
    elif fault == "dq of the first 16 tokens is lost":
        q = with_gradient(q, (torch.arange(q.shape[2]) >= 16).to(q.dtype)[:, None])
    elif fault == "a gradient is NaN":
        v = v.view_as(v)
        v.register_hook(lambda gradient: gradient.index_fill(2, torch.tensor([7]), torch.nan))
    out, _ = exact_attention("sdpa")(module, q, k, v, mask, **arguments)
    if fault == "the last token's output is 0":
        out = torch.cat([out[:, :-1], torch.zeros_like(out[:, -1:])], 1)
    elif fault == "out is 3 % too large":
        out = out + 0.03 * out.detach()
    return out, None


def cost() -> dict[str, Any]:
    """Return the time that a check adds to a step, and its share at the default interval."""
    return {name: _measure_cost(*shape) for name, shape in MODELS.items()}


def _measure_cost(
    layers: int, hidden: int, heads: int, kv_heads: int, tokens: int
) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from attnimg.train import attention_check, engine
    from attnimg.verification.process_state import RunState

    tiny_run: Any = import_module("tiny_run")
    trainer: Any = engine.Engine
    seconds: list[float] = []
    step = trainer.training_step

    def timed(self: Any, *arguments: Any) -> Any:
        begun = time.process_time()
        found = step(self, *arguments)
        seconds.append(time.process_time() - begun)
        return found

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = tiny_run.make_tokenizer(folder / "model")
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        trainer.training_step = timed
        default, attention_check.DEFAULT_STEPS = attention_check.DEFAULT_STEPS, EVERY
        try:
            tiny_run.run(
                folder, folder / "out", max_steps=STEPS, num_epochs=1000, sequence_len=tokens,
                attn_check_steps=EVERY, logging_steps=STEPS,
            )  # fmt: skip
        finally:
            trainer.training_step = step
            attention_check.DEFAULT_STEPS = default
    state, compared = RunState(), []
    for _ in range(10):
        begun = time.process_time()
        state.changes()
        compared.append(time.process_time() - begun)
    numbered = list(enumerate(seconds, start=1))[EVERY:]
    off = [taken for number, taken in numbered if number % EVERY]
    extra = [taken - statistics.median(off) for number, taken in numbered if not number % EVERY]
    interval = DEFAULT_EVERY * statistics.mean(off)
    share = statistics.mean(extra) / interval
    share += statistics.mean(compared) / max(attention_check.COMPARE_EVERY_S, interval)
    return {
        "steps": STEPS,
        "checks": len(extra),
        "step_ms": round(1000 * statistics.mean(off), 1),
        "check_ms": round(1000 * statistics.mean(extra), 1),
        "process_ms": round(1000 * statistics.mean(compared), 1),
        "percent_at_200_steps": round(100 * share, 3),
    }


if __name__ == "__main__":
    main()
