"""The steps of a GPU run, the most valuable first, and the pending units of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from suite_workers import Unit

# The most valuable steps first, with the seconds that each may take in total.
STEPS = {
    "machine": 60.0,
    "proofs": 150.0,
    "kernels": 150.0,
    "training": 120.0,
    "layers": 90.0,
    "repeats": 90.0,
    "timing": 120.0,
    "job": 180.0,
    "slow": 200.0,
    "tests": 150.0,
}
# These compile kernels during their proof, so they come after the fast ones.
SLOW = ("flash_attention_4", "flex_attention")
# The reference for losses: the first of these backends that was trained.
REFERENCES = ("sdpa", "eager", "sdpa_math")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of the units.

    Attributes:
        workers: number of parallel proofs.
        dtypes: precisions of proofs; other units use the first.
        head_dims: head sizes of proofs and timings.
        proof_tokens: the longest row of a proof.
        repeats: proofs of one backend, for the rate of false refusals.
        shapes: models of the training step: name -> (tokens a row, learning rate).
        steps: training steps.
        width: heads times head_dim of a timed call.
        lengths: row lengths of timings.
        timed_tokens: tokens of a timed call, however long its rows are.
        job: values of the `attnimg train` unit.
        job_backends: how many backends run the job.
        tests: whether the GPU tests run.
        time_factor: of every time limit; a shared CPU may be slow.
        proven: the backends of torch to prove, if they fit; None for all.
        repeated: number of backends in the repeats.
        layers: model types whose fused layers are proven.
    """

    workers: int
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    proof_tokens: int
    repeats: int
    shapes: Mapping[str, tuple[int, float]]
    steps: int
    width: int
    lengths: tuple[int, ...]
    timed_tokens: int
    job: Mapping[str, Any]
    job_backends: int
    tests: bool
    time_factor: float
    proven: frozenset[str] | None
    repeated: int
    layers: tuple[str, ...]

    @staticmethod
    def gpu() -> Sizes:
        """Return the sizes for an H100."""
        return Sizes(
            workers=3,
            dtypes=("bfloat16", "float16"),
            head_dims=(64, 128, 256),
            proof_tokens=2048,
            repeats=20,
            shapes={"tiny": (512, 1e-3), "1b": (4096, 1e-4)},
            steps=20,
            width=2048,
            lengths=(2048, 8192),
            timed_tokens=16384,
            job={"shape": "1b", "sequence_len": 4096, "rows": 2, "steps": 20},
            job_backends=3,
            tests=True,
            time_factor=1.0,
            proven=None,
            repeated=99,
            layers=("llama", "gemma2", "qwen3", "mixtral"),
        )

    @staticmethod
    def rehearsal() -> Sizes:
        """Return sizes for one core without a GPU."""
        return Sizes(
            workers=1,
            dtypes=("float32",),
            head_dims=(32,),
            proof_tokens=64,
            repeats=2,
            shapes={"tiny": (96, 1e-3)},
            steps=6,
            width=64,
            lengths=(64,),
            timed_tokens=128,
            job={"shape": "tiny", "sequence_len": 256, "rows": 1, "steps": 4},
            job_backends=1,
            tests=False,
            time_factor=6.0,
            # Other backends run the same code, and each proof takes seconds.
            proven=frozenset({"sdpa", "eager"} | {"sdpa_flash", "sdpa_cudnn", "varlen_attn"}),
            repeated=1,
            layers=("llama",),
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of a run.

    Attributes:
        native: backends that need no package besides torch, by rank.
        kernels: backends of kernel packages, by rank: name -> distribution.
        records: all so far.
        in_config: backends that a config may name.
        packing: backend -> how it keeps documents apart: "native", "mask" or "none".
        known: records of an earlier run, whose proofs count too.
    """

    native: Sequence[str]
    kernels: Mapping[str, str]
    records: Sequence[Mapping[str, Any]]
    in_config: frozenset[str] | set[str]
    packing: Mapping[str, str]
    known: Sequence[Mapping[str, Any]] = ()

    def done(self) -> set[str]:
        """Return the names of units that have a record."""
        return {record["unit"] for record in self.records if "unit" in record}

    def installed(self) -> set[str]:
        """Return the distributions of kernels that were installed, or failed to be."""
        return {
            record["backend"]
            for record in self.records
            if record["kind"] == "kernel" and record["state"] in ("passed", "failed")
        }

    def proven(self, dtype: str) -> dict[str, set[int]]:
        """Return the head sizes on which packing backends passed: name -> sizes, in this order."""
        found: dict[str, set[int]] = {}
        here = {name for name, package in self.kernels.items() if package in self.installed()}
        known = [r for r in self.known if r["backend"] in here or r["backend"] in self.native]
        for record in (*self.records, *known):
            if record["kind"] == "proof" and record["state"] == "passed":
                values = record["values"]
                if values["dtype"] == dtype and values["packing"]:
                    found.setdefault(record["backend"], set()).update(values["head_dims"])
        return found

    def reference(self, shape: str) -> tuple[str, list[float]] | None:
        """Return the reference backend for a shape, and its losses."""
        found = {
            record["backend"]: list(record["values"]["losses"])
            for record in self.records
            if record["kind"] == "training"
            and record["state"] == "passed"
            and record["values"]["shape"] == shape
        }
        return next(((name, found[name]) for name in REFERENCES if name in found), None)


def pending(step: str, progress: Progress, sizes: Sizes, *, waiting: bool) -> list[Unit]:
    """Return the units of a step that have no record yet, the most valuable first.

    Args:
        step: a name of STEPS.
        progress: of the run.
        sizes: of the units.
        waiting: whether kernels are being compiled, so that more may be installed later.
    """
    made: dict[str, Callable[[], list[Unit]]] = {
        "machine": _machine,
        "proofs": lambda: _native_proofs(progress, sizes),
        "kernels": lambda: _kernel_proofs(progress, sizes, waiting=waiting),
        "training": lambda: _training(progress, sizes),
        "layers": lambda: _layers(sizes),
        "repeats": lambda: _repeats(progress, sizes),
        "timing": lambda: _timing(progress, sizes),
        "job": lambda: _job(progress, sizes),
        "slow": lambda: _slow_proofs(progress, sizes, waiting=waiting),
        "tests": lambda: [Unit(step="tests", kind="tests", limit_s=150)] if sizes.tests else [],
    }
    done = progress.done()
    units = [unit for unit in made[step]() if unit.name not in done]
    return [replace(unit, limit_s=unit.limit_s * sizes.time_factor) for unit in units]


def _machine() -> list[Unit]:
    return [
        Unit(step="machine", kind="facts", what="facts", limit_s=60),
        Unit(step="machine", kind="doctor", what="doctor", limit_s=60),
    ]


def _proof(
    step: str, backend: str, sizes: Sizes, progress: Progress, dtype: str, head_dims: Sequence[int],
    *, repeats: int = 1, limit_s: float = 80.0,
) -> Unit:  # fmt: skip
    """Return the proof of a backend: packed rows and rows of one document, where it packs."""
    dims = "+".join(map(str, head_dims))
    return Unit(
        step=step,
        kind="proof",
        backend=backend,
        what=f"{dtype} head_dim {dims}",
        limit_s=limit_s,
        values={
            "dtype": dtype,
            "head_dims": list(head_dims),
            "packing": progress.packing[backend] != "none",
            "sequence_len": sizes.proof_tokens,
            "repeats": repeats,
        },
    )


def _native_proofs(progress: Progress, sizes: Sizes) -> list[Unit]:
    """All head sizes in one proof; each alone where that failed."""
    names = [
        name
        for name in progress.native
        if name not in SLOW and (sizes.proven is None or name in sizes.proven)
    ]
    first, *others = sizes.dtypes
    units = [_proof("proofs", name, sizes, progress, first, sizes.head_dims) for name in names]
    failed = [
        record["backend"]
        for record in progress.records
        if (record["kind"], record["step"]) == ("proof", "proofs")
        and record["state"] not in ("passed", "not here", "not reached")
        and len((record.get("values") or {}).get("head_dims", sizes.head_dims)) > 1
    ]
    units += [
        _proof("proofs", name, sizes, progress, first, [size])
        for name in failed
        for size in sizes.head_dims
    ]
    middle = sizes.head_dims[len(sizes.head_dims) // 2]
    units += [
        _proof("proofs", name, sizes, progress, dtype, [middle])
        for dtype in others
        for name in names
    ]
    return list({unit.name: unit for unit in units}.values())


def _kernel_proofs(progress: Progress, sizes: Sizes, *, waiting: bool) -> list[Unit]:
    """Each head size in a proof of its own: a small build has only some of them."""
    names = [name for name in _ready(progress, waiting=waiting) if name not in SLOW]
    first, *others = sizes.dtypes
    middle = sizes.head_dims[len(sizes.head_dims) // 2]
    pairs = [(first, size) for size in sizes.head_dims] + [(dtype, middle) for dtype in others]
    # The usual sizes of every kernel before the rest of any.
    pairs.sort(key=lambda pair: pair[0] != first or pair[1] > 128)
    return [
        _proof("kernels", name, sizes, progress, dtype, [size])
        for dtype, size in pairs
        for name in names
    ]


def _slow_proofs(progress: Progress, sizes: Sizes, *, waiting: bool) -> list[Unit]:
    """One head size alone, the smallest, which the models of the training step have."""
    ready = {*progress.native, *_ready(progress, waiting=waiting)}
    return [
        _proof("slow", name, sizes, progress, sizes.dtypes[0], [sizes.head_dims[0]], limit_s=180)
        for name in SLOW
        if name in ready
    ]


def _ready(progress: Progress, *, waiting: bool) -> list[str]:
    """Return the kernels to prove: those that are installed, and all if no more will be."""
    ready = progress.installed()
    return [name for name, package in progress.kernels.items() if package in ready or not waiting]


def _training(progress: Progress, sizes: Sizes) -> list[Unit]:
    """Train on each proven backend, first on the reference."""
    units = []
    dtype = sizes.dtypes[0]
    size = min(sizes.head_dims) if len(sizes.head_dims) == 1 else 64
    proven = [name for name, sizes_of in progress.proven(dtype).items() if size in sizes_of]
    for shape, (tokens, rate) in sizes.shapes.items():
        reference = progress.reference(shape)
        untried = [
            name
            for name in REFERENCES
            if name in proven and f"training {name} {shape}" not in progress.done()
        ]
        names = proven if reference is not None or not untried else untried[:1]
        for name in names:
            values = {
                "shape": shape, "tokens": tokens, "learning_rate": rate, "dtype": dtype,
                "steps": sizes.steps, "reference": reference,
            }  # fmt: skip
            units.append(
                Unit(step="training", kind="training", backend=name, what=shape, values=values)
            )
    return units


def _repeats(progress: Progress, sizes: Sizes) -> list[Unit]:
    """Repeat proofs that passed and that were refused, to measure how often each happens."""
    dtype = sizes.dtypes[0]
    middle = sizes.head_dims[len(sizes.head_dims) // 2]
    refused = [
        record["backend"]
        for record in progress.records
        if record["kind"] == "proof" and record["state"] == "failed" and "values" in record
    ]
    names = dict.fromkeys([*progress.proven(dtype), *refused])
    names = [name for name in names if name not in SLOW]
    # Those whose gradients are summed in no fixed order come first.
    noisy = [
        name for name in names if name in progress.kernels or "flash" in name or "varlen" in name
    ]
    return [
        _proof(
            "repeats", name, sizes, progress, dtype, [middle], repeats=sizes.repeats, limit_s=90.0
        )
        for name in [*noisy, *(name for name in names if name not in noisy)][: sizes.repeated]
    ]


def _timing(progress: Progress, sizes: Sizes) -> list[Unit]:
    """Time each proven backend; the sizes that most models have first."""
    dtype = sizes.dtypes[0]
    calls = [
        (size, length, packing)
        for length in reversed(sizes.lengths)
        for packing in (True, False)
        for size in sorted(sizes.head_dims, key=lambda size: size != 128)
    ]
    units = []
    for size, length, packing in calls:
        for name, proven in progress.proven(dtype).items():
            # These store all scores of a row.
            if size not in proven or (name in ("eager", "sdpa_math") and length > 4096):
                continue
            rows = "packed" if packing else "one document"
            values = {
                "head_dim": size, "length": length, "packing": packing, "dtype": dtype,
                "width": sizes.width, "tokens": sizes.timed_tokens,
            }  # fmt: skip
            what = f"head_dim {size}, {length} tokens, {rows}"
            units.append(
                Unit(
                    step="timing", kind="timing", backend=name, what=what, limit_s=40, values=values
                )
            )
    return units


def _layers(sizes: Sizes) -> list[Unit]:
    """Prove Liger's layers of large models, and optimizers with quantized states."""
    units = [
        Unit(step="layers", kind="layers", what=f"{model_type} {dtype}", limit_s=60,
             values={"model_type": model_type, "dtype": dtype, "tokens": sizes.proof_tokens})
        for model_type in sizes.layers
        for dtype in sizes.dtypes
    ]  # fmt: skip
    optimizers = ("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adamw_torch_8bit",
                  "adamw_torch_4bit")  # fmt: skip
    return units + [
        Unit(step="layers", kind="layers", what=name, limit_s=60,
             values={"optimizer": name, "dtype": sizes.dtypes[0]})
        for name in optimizers
    ]  # fmt: skip


def _job(progress: Progress, sizes: Sizes) -> list[Unit]:
    """Run `attnimg train` with the backends that trained the largest model fastest."""
    shape = list(sizes.shapes)[-1]
    speeds = {
        record["backend"]: record["values"]["tokens_per_second"]
        for record in progress.records
        if record["kind"] == "training"
        and record["state"] == "passed"
        and record["values"]["shape"] == shape
        and record["backend"] in progress.in_config
    }
    best = sorted(speeds, key=lambda name: -speeds[name])[: sizes.job_backends]
    values = {**sizes.job, "dtype": sizes.dtypes[0]}
    return [
        Unit(step="job", kind="train-command", backend=name, limit_s=120, values=values)
        for name in best
    ]
