"""The page of what was built: each cell comes from a record, and what has none is marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes.pages.kernels_built import kernels_built_page
from recipes.read import read_recipes
from recipes.solve.plan import solve_all

ROOT = Path(__file__).resolve().parents[3]
PLANS = solve_all(read_recipes(ROOT))
STEPS = {
    step.kernel.name: step for plan in PLANS if plan.image.name == "hopper" for step in plan.steps
}
FA3 = STEPS["flash-attn-3"]
MADE = {
    "name": "flash-attn-3", "key": FA3.key, "trimmed": False, "wheel": "a.whl", "bytes": 35071232,
    "cpu_seconds": 3607, "day": "2026-11-25", "machine": "2 cores",
    "code": {"a.so": ["sm_90a"], "b.so": ["sm_80"]},
}  # fmt: skip


def row(
    begin: str, records: Any = None, runs: Any = None, *, platform: str = "linux/amd64"
) -> list[str]:
    """Return the cells of hopper's row whose first cell begins so, for a platform."""
    page = kernels_built_page(PLANS, records or {}, runs or {})
    part = page.partition("### `hopper`\n")[2].partition("\n### ")[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines()]
    (found,) = (line for line in lines if line[0].startswith(begin) and line[1] == platform)
    return found


def cells(**changes: object) -> list[str]:
    return row("FlashAttention-3", {"hopper": {"kernels": [{**MADE, **changes}]}})[1:]


def test_a_kernel_has_what_its_record_says() -> None:
    assert cells() == [
        "linux/amd64", "sm_80 sm_90a", "built, 2026-11-25", "3,607 s", "35.1 MB", "2 cores",
        "not yet",
    ]  # fmt: skip


def test_the_time_of_a_build_from_the_cache_is_not_given() -> None:
    assert cells(objects_compiled=1, objects_reused=40)[3] == "not known: from the cache"
    assert cells(objects_compiled=40, objects_reused=1)[3] == "3,607 s"


def test_a_kernel_without_a_record_is_marked_as_not_yet_built() -> None:
    found = row("FlashAttention-3")[1:]
    assert found == ["linux/amd64", "sm_90a", "not yet built", "-", "-", "-", "not yet"]


def test_each_platform_has_a_record_of_its_own() -> None:
    arm = next(plan for plan in PLANS if plan.image.name == "hopper").others[0]
    (step,) = (step for step in arm.steps if step.kernel.name == "flash-attn-3")
    records = {"hopper-arm64": {"kernels": [{**MADE, "key": step.key}]}}
    found = row("FlashAttention-3", records, platform="linux/arm64")
    assert found[2:4] == ["sm_80 sm_90a", "built, 2026-11-25"]
    assert row("FlashAttention-3", records)[3] == "not yet built"


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"key": "0" * 16}, "2026-11-25, from an earlier recipe"),
        ({"trimmed": True}, "small build, 2026-11-25"),
    ],
    ids=["an earlier recipe", "a small build"],
)
def test_another_build_than_the_recipe_s_is_marked(changes: dict[str, Any], state: str) -> None:
    assert cells(**changes)[2] == state


def run(*proofs: tuple[str, str], arch: str = "sm_90", version: str = "3.0.0") -> Any:
    """Return the records of one run on a GPU: (backend, state) of each proof."""
    start = {"gpu": "NVIDIA H200", "arch": arch, "versions": {"torch": "2.11.0"}}
    records: list[Any] = [
        {"kind": "run", "step": "start", "backend": "", "state": "measured", "values": start},
        {"kind": "facts", "backend": "", "state": "measured", "values": {"platform": "x86_64"}},
    ]
    for backend, state in proofs:
        values = {} if state == "not reached" else {"versions": {"flash-attn-3": version}}
        records.append({"kind": "proof", "backend": backend, "state": state, "values": values})
    return {"2026-11-26-h200-3": records}


LINK = "[NVIDIA H200](gpu-runs.md#2026-11-26-h200-3), torch 2.11.0: "


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        pytest.param(run(("flash_attention_3", "passed")), f"{LINK}passed", id="passed"),
        pytest.param(
            run(("flash_attention_3", "passed"), ("flash_attention_3", "failed")),
            f"{LINK}passed and failed",
            id="both",
        ),
        pytest.param(
            run(("flash_attention_3", "passed"), version="3.0.0+trim"),
            f"{LINK}passed, a small build",
            id="a small build",
        ),
        pytest.param(run(("flash_attention_3", "passed"), version="2.9"), "not yet", id="older"),
        pytest.param(run(("flash_attention_3", "not reached")), "not yet", id="not reached"),
        pytest.param(run(("sdpa", "passed")), "not yet", id="another backend"),
        pytest.param(run(("flash_attention_3", "passed"), arch="sm_80"), "not yet", id="its GPU"),
    ],
)
def test_a_kernel_was_tested_on_the_gpus_of_the_recorded_proofs(runs: Any, says: str) -> None:
    assert row("FlashAttention-3", runs=runs)[-1] == says


def sets(record: Any) -> list[list[str]]:
    """Return the rows of hopper's FlashAttention-4 kernels."""
    page = kernels_built_page(PLANS, {"fa4-cache-hopper": record} if record else {}, {})
    rows = [line.strip("| ").split(" | ") for line in page.splitlines()]
    wanted = ["`hopper`", "FlashAttention-4, sm_90", "linux/amd64"]
    return [cells[1:2] + cells[3:] for cells in rows if cells[:3] == wanted]


SET: dict[str, Any] = {
    "date": "2026-11-26", "machine": "2 cores", "fingerprint": {"flash-attn-4": "4.0.0b36"},
    "targets": {"sm_90": {"kernels": 192, "bytes": 15027512, "cpu_s": 529, "calls": 112}},
}  # fmt: skip
WHAT = "FlashAttention-4, sm_90"


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (None, [WHAT, "-", "not yet built", "-", "-", "-"]),
        (SET, [WHAT, "192", "built, 2026-11-26", "529 s", "15.0 MB", "2 cores"]),
        ({**SET, "targets": {}}, [WHAT, "-", "not yet built", "-", "-", "-"]),
        (
            {**SET, "targets": {"sm_90": {**SET["targets"]["sm_90"], "calls": 96}}},
            [WHAT, "192", "2026-11-26, from an earlier recipe", "529 s", "15.0 MB", "2 cores"],
        ),
        (
            {**SET, "fingerprint": {"flash-attn-4": "4.0.0b35"}},
            [WHAT, "192", "2026-11-26, of version 4.0.0b35", "529 s", "15.0 MB", "2 cores"],
        ),
    ],
    ids=["none", "built", "another GPU's", "of fewer models", "of an earlier version"],
)
def test_a_set_compiled_ahead_of_time_has_a_row_for_each_gpu(record: Any, says: list[str]) -> None:
    assert sets(record) == [says]


def test_an_image_has_its_sizes_by_layer() -> None:
    layers = [
        {"name": "base", "bytes": 80_000_000, "zstd_bytes": 30_000_000, "gzip_bytes": 33_000_000},
        {"name": "torch", "bytes": 5e9, "zstd_bytes": 2e9, "gzip_bytes": 2.2e9},
        {"name": "torch", "bytes": 0, "zstd_bytes": 1e6, "gzip_bytes": 0},
    ]
    record = {
        "platform": "linux/amd64", "day": "2026-11-28", "revision": "70f9f25aaaa",
        "selftest": "52 passed, 9 skipped", "layers": layers,
    }  # fmt: skip
    page = kernels_built_page(PLANS, {"image-hopper": record}, {})
    assert (
        "| `hopper` | linux/amd64 | 2,031 | 2,233 | 5,080 | base 30, torch 2,001 "
        "| 52 passed, 9 skipped | 2026-11-28, 70f9f25 |\n"
    ) in page
    assert "| `turing` | linux/amd64 | - | - | - | - | - | no record yet |\n" in page


def test_every_record_of_the_checkout_is_on_the_page() -> None:
    names = {path.stem for path in (ROOT / "docs/built").glob("*.json")}
    images = {plan.image.name for plan in PLANS}
    kinds = ("", "fa4-cache-", "triton-cache-", "image-")
    known = {f"{kind}{image}{end}" for kind in kinds for image in images for end in ("", "-arm64")}
    assert names <= known
