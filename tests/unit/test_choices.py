"""What is chosen for every GPU that has a name, read against what its kernels can do.

tests/unit/golden/choices.json holds all of it. test_recipes_render.py checks that it is in step
with the code, as docs/what-auto-chooses.md is. A change of it is a change of people's runs.
Source of the rules here: the kernels themselves, read for the backends' files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnimg.__main__ import run as attnimg
from attnimg.backends import all_backends
from attnimg.selection.gpus_and_images import gpu_catalogue
from attnimg.selection.gpus_and_images import image_catalogue as images
from recipes.pages.choices import ROW, models

GOLDEN = json.loads((Path(__file__).parent / "golden/choices.json").read_text(encoding="utf-8"))
# GPUs of arm64 machines have blocks of their own, "sm_90 arm64".
ARM64: dict[str, Any] = {key: block for key, block in GOLDEN.items() if key.endswith(" arm64")}
BLOCKS: dict[str, Any] = {arch: block for arch, block in GOLDEN.items() if " " not in arch}
BLOCKS.pop("//")
TAKES = [
    pytest.param(arch, model, line, id=f"{arch} {model} {image or block['image']}")
    for arch, block in BLOCKS.items()
    for image, lines in {None: block["models"], **block["images"]}.items()
    if lines != "wrong-image"
    for model, line in lines.items()
]
FLASH_2, FLASH_3, FLASH_4 = (f"flash_attention_{member}" for member in (2, 3, 4))
GENERIC, FLEX, XFORMERS = "flash_attention_4_generic", "flex_attention", "xformers"
MODELS = models()
SINKS = {"gpt-oss-20b", "gpt-oss-120b"}
CAPPED = {"Gemma-2-9B", "Gemma-2-27B"}
# Sizes that FlashAttention-4 has no kernel for on RTX 50, or takes without a window elsewhere.
WIDE = {"Gemma-2-9B", "Gemma-3-4B", "Gemma-3-12B", "Gemma-4-31B"}
# Qwen3, Llama 3, Mistral, Phi, GLM: head sizes of at most 128, and nothing but a window besides.
PLAIN = [
    "Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.3-70B", "Mistral-7B-v0.1", "Mistral-Small-24B",
    "Qwen2.5-7B", "Qwen3-8B", "Qwen3-32B", "Qwen3-30B-A3B", "Phi-4", "GLM-4-9B-0414", "GLM-4.5-Air",
]  # fmt: skip
HYBRID = ["Qwen3-Next-80B-A3B", "Qwen3.5-9B", "Qwen3.5-27B", "Granite-4.0-H-Small", "Jamba-v0.1"]
FLASH = [*PLAIN, *HYBRID, "Gemma-3-27B", "DeepSeek-V3"]
# What an expert would choose for packed rows of 8192 tokens: the columns are sm_75, sm_90, sm_100,
# sm_120 and gfx942. Source: the kernels' own limits, read for the backends' files, and the times
# that their ranks name (2026-11-26).
EXPERT = {
    **{model: [[XFORMERS], [FLASH_3], [FLASH_4], [FLASH_2], [FLASH_2]] for model in FLASH},
    "Gemma-3-4B": [[XFORMERS], [FLASH_3], [GENERIC], [FLASH_2], [FLASH_2]],
    "Gemma-3-12B": [[XFORMERS], [FLASH_3], [GENERIC], [FLASH_2], [FLASH_2]],
    "Gemma-2-9B": [["eager"], [FLASH_3], [GENERIC], [FLASH_2], [FLEX]],
    "Gemma-2-27B": [["eager"], [FLASH_3], [FLASH_4], [FLASH_2], [FLEX]],
    "Gemma-4-31B": [[XFORMERS], [FLASH_3, "sdpa"], [GENERIC, "sdpa"], [FLASH_2, "sdpa"],
                    [FLASH_2, "sdpa"]],
    "gpt-oss-20b": [["eager"], [FLASH_4], [FLASH_4], [FLEX], [FLEX]],
    "gpt-oss-120b": [["eager"], [FLASH_4], [FLASH_4], [FLEX], [FLEX]],
}  # fmt: skip


@pytest.mark.parametrize("model", EXPERT)
def test_what_is_taken_is_what_an_expert_takes(model: str) -> None:
    archs = ("sm_75", "sm_90", "sm_100", "sm_120", "gfx942")
    assert [BLOCKS[arch]["models"][model]["takes"] for arch in archs] == EXPERT[model]


@pytest.mark.parametrize("arch", BLOCKS)
def test_packing_is_refused_where_documents_would_mix(arch: str) -> None:
    lines = BLOCKS[arch]["models"]
    refused = {model: line["errors"] for model, line in lines.items() if "errors" in line}
    # Flash kernels get the boundaries of gpt-oss's documents; transformers' masks don't.
    masked = [model for model in SINKS if set(lines[model]["takes"]) & {"eager", FLEX}]
    assert sorted(refused) == sorted(masked)
    assert all(codes == ["packing-not-isolated"] for codes in refused.values())


def may_run(arch: str, model: str) -> set[str]:
    """Name what `auto` may take for some layers of a model on an architecture."""
    flash = set() if model in SINKS else {FLASH_2}
    if arch in ("cpu", "sm_70", "sm_75"):
        return {"sdpa", "eager"} | (set() if arch == "cpu" else {XFORMERS})
    if arch.startswith("gfx") or arch in ("sm_80", "sm_86", "sm_89"):
        if arch.startswith("gfx") and model in CAPPED:
            return {FLEX}
        return flash | {"sdpa", FLEX}
    if arch == "sm_90":
        return flash | {FLASH_3, FLASH_4, "sdpa", FLEX}
    if arch in ("sm_120", "sm_121"):
        return flash | {"sdpa", FLEX}
    return flash | {FLASH_4, GENERIC, "sdpa", FLEX} - (set() if model in WIDE else {GENERIC})


@pytest.mark.parametrize(("arch", "model", "line"), TAKES)
def test_what_is_taken_exists_for_that_gpu_and_model(
    arch: str, model: str, line: dict[str, Any]
) -> None:
    takes = set(line["takes"])
    assert takes
    assert takes <= may_run(arch, model)


@pytest.mark.parametrize(("arch", "model", "line"), TAKES)
def test_every_backend_is_taken_or_fits_or_is_refused_with_a_code(
    arch: str, model: str, line: dict[str, Any]
) -> None:
    takes, refused = set(line["takes"]), line["refused"]
    assert set(refused) < {backend.name for backend in all_backends()}
    assert all(refused.values())
    # A group of layers may run what not every layer could.
    assert len(takes) > 1 or not takes & set(refused)


def test_every_gpu_and_every_model_is_there() -> None:
    blocks = [*BLOCKS.values(), *ARM64.values()]
    assert {gpu for block in blocks for gpu in block["gpus"]} == set(gpu_catalogue())
    assert all(list(block["models"]) == list(MODELS) for block in BLOCKS.values())
    assert len(MODELS) >= 29


def test_every_image_is_there_for_every_gpu() -> None:
    for arch, block in BLOCKS.items():
        assert list(block["images"]) == list(images())
        served = {name for name, cell in block["images"].items() if cell != "wrong-image"}
        assert served == {name for name, image in images().items() if arch in image.devices}
        own = block["image"]
        assert own is None or block["images"][own] == {}


def test_an_arm64_machine_has_the_image_and_the_choices_of_its_gpu() -> None:
    gpus = [gpu for block in ARM64.values() for gpu in block["gpus"]]
    assert set(gpus) == {"dgx-spark", "gh200", "gb200", "gb300", "jetson-thor"}
    for key, block in ARM64.items():
        arch = key.partition(" ")[0]
        served = {name for name, cell in block["images"].items() if cell != "wrong-image"}
        with_code = {name: image for name, image in images().items() if arch in image.devices}
        assert served == {n for n, image in with_code.items() if "linux/arm64" in image.platforms}
        assert (block["image"] is None) == (arch == "sm_110")
        if arch in BLOCKS:
            takes = {model: line["takes"] for model, line in BLOCKS[arch]["models"].items()}
            assert {model: line["takes"] for model, line in block["models"].items()} == takes


@pytest.mark.parametrize("arch", ["sm_70", "sm_75"])
def test_before_ampere_there_is_no_bf16_and_no_flash(arch: str) -> None:
    assert BLOCKS[arch]["dtype"] == "float16"
    for line in BLOCKS[arch]["models"].values():
        for member in (FLASH_2, FLASH_3, FLASH_4):
            assert {"arch-too-old", "arch-mismatch"} & set(line["refused"][member])


@pytest.mark.parametrize("arch", [arch for arch in BLOCKS if arch != "sm_90"])
def test_flash_attention_3_is_hoppers_alone(arch: str) -> None:
    for line in BLOCKS[arch]["models"].values():
        assert "arch-mismatch" in line["refused"][FLASH_3]


@pytest.mark.parametrize(
    ("gpu", "image", "model"),
    [("t4", None, "Gemma-2-9B"), ("v100", None, "Llama-3.1-8B"), ("h100", None, "Gemma-4-31B"),
     ("b200", None, "DeepSeek-V3"), ("rtx5090", None, "gpt-oss-20b"),
     ("mi300x", None, "Mistral-7B-v0.1"), ("cpu", None, "Qwen3-Next-80B-A3B"),
     ("a100", "ampere-frontier", "Llama-3.1-8B"), ("b200", "blackwell-frontier", "DeepSeek-V3"),
     ("t4", "turing-frontier", "Mistral-7B-v0.1"), ("h100", "ampere", "Llama-3.1-8B"),
     ("b300", None, "Gemma-3-4B"), ("h200", None, "Granite-4.0-H-Small")],
)  # fmt: skip
def test_explain_says_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gpu: str,
    image: str | None,
    model: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(MODELS[model]))
    Path("c.yaml").write_text(
        f"base_model: ./model\nlearning_rate: 1e-4\nsequence_len: {ROW}\nsample_packing: true\n"
        "datasets: [{path: d.jsonl, type: completion}]\n"
    )
    asked = ["--image", image] if image else []
    attnimg(["explain", "c.yaml", "--on", gpu, *asked, "--json"])
    said = json.loads(capsys.readouterr().out)
    block = next(block for block in BLOCKS.values() if gpu in block["gpus"])
    cell = block["images"][image] if image else {}
    if cell == "wrong-image":
        assert "wrong-image" in [warning["code"] for warning in said["warnings"]]
        return
    line = cell.get(model, block["models"][model])
    groups = [choice["backend"] for choice in said["groups"]]
    assert (groups or [said["chosen"]["backend"]]) == line["takes"]
    assert said["image"] == (image or block["image"])
    codes = {v["backend"]: [r["code"] for r in v["reasons"]] for v in said["candidates"]}
    assert {name: found for name, found in codes.items() if found} == line["refused"]
    assert [error["code"] for error in said["errors"]] == line.get("errors", [])
