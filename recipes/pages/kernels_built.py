"""Write docs/kernels-built.md: what was built for each image, on which machine, and its tests."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from recipes.archs import device_name, sort_key
from recipes.facts import ImagePlan, Kernel, Step, on_all_platforms
from recipes.files import NOTICE
from recipes.pages import markdown_table
from recipes.pages.built import NOT_BUILT, find_kernel, kernel_state
from recipes.render.precompiled import kernel_sets

Records = Mapping[str, Mapping[str, Any]]
Runs = Mapping[str, Sequence[Mapping[str, Any]]]

_HEAD = f"""<!-- {NOTICE} -->

# Which kernels were built?

Everything here comes from records: `docs/built/` has one for each image and platform, which
`make built/NAME`, `make fa4-kernels/NAME`, `make triton-kernels/NAME` and `make image-record/NAME`
write from the files themselves. *From an earlier recipe*: the recipe has changed since, so the
kernel must be compiled again.
"""
_KERNELS = """
*Machine code* was read from the libraries of the wheel; for a kernel that is not built, it is the
recipe's. *On a GPU* has the results of proofs of the same version, in any build; [runs on
GPUs](gpu-runs.md) has the details.
"""
_SETS = """
## Kernels that are compiled ahead of time

[Compiled while an image is built](precompiled-kernels.md), for each compute capability, instead of
at the first use.

"""
_IMAGES = """
## Images

In MB (10^6 bytes): as `make push/NAME` sends it (zstd -3), as `docker push` does (gzip -6), and
unpacked; and the result of `attnimg selftest` in it.

"""
# The states of a proof that ran.
_RAN = ("passed", "failed", "crash", "timeout")
# How the names of records of kernels compiled ahead of time begin -> what they are.
_AHEAD = {"fa4": "{}", "triton": "{}'s Triton kernels"}


def kernels_built_page(plans: Iterable[ImagePlan], records: Records, runs: Runs) -> str:
    """Return the text of the page.

    Args:
        plans: of all images.
        records: of docs/built, by the names of the files.
        runs: on GPUs, by name.
    """
    stable = [plan for plan in plans if plan.image.channel == "stable"]
    parts = [_HEAD, "\n## Kernels\n", _KERNELS]
    head: tuple[str, ...]
    for plan in (plan for plan in stable if plan.steps):
        head = (
            "kernel", "platform", "machine code", "state", "CPU time", "wheel", "compiled on",
            "on a GPU",
        )  # fmt: skip
        parts.append(
            f"\n### `{plan.image.name}`\n\n{markdown_table(head, _kernels(plan, records, runs))}"
        )
    head = ("image", "for", "platform", "kernels", "state", "CPU time", "size", "compiled on")
    rows = [row for plan in stable for row in _sets(plan, records)]
    parts.append(f"{_SETS}{markdown_table(head, rows)}")
    head = (
        "image",
        "platform",
        "zstd",
        "gzip",
        "unpacked",
        "zstd by layer",
        "selftest",
        "recorded",
    )
    rows = [row for plan in stable for row in _images(plan, records)]
    parts.append(f"{_IMAGES}{markdown_table(head, rows)}")
    return "".join(parts)


def _kernels(plan: ImagePlan, records: Records, runs: Runs) -> Iterator[tuple[str, ...]]:
    """Yield a row for each kernel and platform of an image."""
    for one in on_all_platforms([plan]):
        for step in one.steps:
            made = find_kernel(step, records.get(one.name, {})) or {}
            found = {code for codes in made.get("code", {}).values() for code in codes}
            codes = found or set(step.codes)
            wheel = step.kernel.form == "wheel"
            state = "public wheel" if wheel else kernel_state(step, records.get(one.name, {}))
            yield (
                f"{step.kernel.summary} {step.kernel.version}",
                one.platform,
                " ".join(sorted(codes, key=sort_key)) or "none in the wheel",
                state,
                _cpu_time(made),
                _megabytes(made.get("bytes")),
                made.get("machine", "-"),
                _on_gpus(step, one.platform, runs),
            )


def _on_gpus(step: Step, platform: str, runs: Runs) -> str:
    """Return the results of a kernel's proofs on the GPUs that it is built for."""
    devices = {device_name(arch) for arch in step.archs}
    found = []
    for name, records in sorted(runs.items()):
        values = {r["kind"]: r.get("values") or {} for r in reversed(records)}
        start = values.get("run", {})
        arm = "aarch64" in str(values.get("facts", {}).get("platform"))
        if start.get("arch") not in devices or arm != platform.endswith("arm64"):
            continue
        if result := _result(step.kernel, records):
            gpu, torch = start["gpu"], start["versions"].get("torch", "?")
            found.append(f"[{gpu}](gpu-runs.md#{name}), torch {torch}: {result}")
    return "; ".join(found) or "not yet"


def _result(kernel: Kernel, records: Sequence[Mapping[str, Any]]) -> str:
    """Return how the proofs of this version of a kernel ended in one run; empty for none."""
    states, small = set(), False
    for record in records:
        versions = (record.get("values") or {}).get("versions") or {}
        version, _, label = str(versions.get(kernel.name, "")).partition("+")
        ours = record["kind"] == "proof" and record["backend"] in kernel.backends
        if ours and version == kernel.version and record["state"] in _RAN:
            states.add(str(record["state"]))
            small |= label == "trim"
    return " and ".join(sorted(states, reverse=True)) + (", a small build" if small else "")


def _sets(plan: ImagePlan, records: Records) -> Iterator[tuple[str, ...]]:
    """Yield a row for each set of kernels that is compiled ahead of time, and each GPU."""
    for one, (kind, what) in product(on_all_platforms([plan]), _AHEAD.items()):
        steps = [
            step
            for step in one.steps
            if (step.kernel.ahead_of_time if kind == "fa4" else step.kernel.triton)
        ]
        record = records.get(f"{kind}-cache-{one.name}", {})
        for step, device in ((s, device_name(arch)) for s in steps for arch in s.archs):
            made = record.get("targets", {}).get(device, {})
            yield (
                f"`{plan.image.name}`",
                f"{what.format(step.kernel.summary)}, {device}",
                one.platform,
                str(made.get("kernels", "-")),
                _set_state(step, record, made, calls=_calls(one, kind, device)),
                _seconds(made.get("cpu_s")),
                _megabytes(made.get("bytes")),
                record["machine"] if made else "-",
            )


def _set_state(
    step: Step, record: Mapping[str, Any], made: Mapping[str, Any], *, calls: int
) -> str:
    """Return whether the kernels for a GPU were compiled; `calls` is their number in the recipe."""
    if not made:
        return NOT_BUILT
    version = record["fingerprint"].get(step.kernel.name)
    if version != step.kernel.version:
        return f"{record['date']}, of version {version}"
    return (
        f"{record['date']}, from an earlier recipe"
        if made["calls"] != calls
        else f"built, {record['date']}"
    )


def _calls(plan: ImagePlan, kind: str, device: str) -> int:
    """Return the number of calls for which a recipe has kernels compiled ahead of time."""
    asked = json.loads(kernel_sets((plan,))[f"docker/images/{plan.name}/{kind}_kernels.json"])
    each = math.prod(
        len(asked.get(axis, "x")) for axis in ("dtypes", "varlen", "gradient", "causal")
    )
    if kind == "fa4":
        return each * len(asked["targets"][device]["shapes"])
    return each * sum(len(pairs) for pairs in asked["heads"].values())


def _images(plan: ImagePlan, records: Records) -> Iterator[tuple[str, ...]]:
    """Yield the sizes of an image on each of its platforms."""
    for one in on_all_platforms([plan]):
        record = records.get(f"image-{one.name}")
        if record is None:
            yield (f"`{one.image.name}`", one.platform, *["-"] * 5, "no record yet")
            continue
        layers = record["layers"]
        stages: dict[str, int] = {}
        for layer in layers:
            stages[layer["name"]] = stages.get(layer["name"], 0) + layer["zstd_bytes"]
        totals = (
            sum(layer[key] for layer in layers) for key in ("zstd_bytes", "gzip_bytes", "bytes")
        )
        yield (
            f"`{one.image.name}`",
            one.platform,
            *(f"{total / 1e6:,.0f}" for total in totals),
            ", ".join(f"{stage} {size / 1e6:,.0f}" for stage, size in stages.items()),
            record["selftest"],
            f"{record['day']}, {record['revision'][:7]}",
        )


def _cpu_time(made: Mapping[str, Any]) -> str:
    """Return the CPU time of a build; unknown if it took most objects from the cache."""
    reused = made.get("objects_reused", 0) > made.get("objects_compiled", 0)
    return "not known: from the cache" if reused else _seconds(made.get("cpu_seconds"))


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:,} s"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f} MB"
