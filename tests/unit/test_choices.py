"""What is chosen for every GPU that has a name, read against what its kernels can do.

tests/unit/golden/choices.json holds all of it; that it is in step with the code, as
docs/choices.md, test_recipes_render.py sees to. A change of it is a change of people's runs.
Source of the rules here: the kernels themselves, read for the backends' files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnimg.__main__ import run as attnimg
from attnimg.backends import all_backends
from attnimg.gpus import catalogue
from attnimg.images import catalogue as images
from recipes.choices import MODELS

GOLDEN = json.loads((Path(__file__).parent / "golden/choices.json").read_text(encoding="utf-8"))
# GPUs of arm64 machines have blocks of their own, "sm_90 arm64": no image runs there.
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
# Of the models: whose layers' head sizes are 192, 256 or 512, and whose attention has sinks.
WIDE = {"gemma2", "gemma3_text", "gemma4_text", "deepseek_v3", "qwen3_next"}
SINKS = {"gpt_oss"}


def may_run(arch: str, model: str) -> set[str]:
    """Name what `auto` may take for some layers of a model on an architecture."""
    flash = set() if model in SINKS else {FLASH_2}
    if arch in ("cpu", "sm_70", "sm_75"):
        return {"sdpa", "eager"}
    if arch.startswith("gfx") or arch in ("sm_80", "sm_86", "sm_89"):
        return flash | {"sdpa", "flex_attention"}
    if arch == "sm_90":
        return flash | {FLASH_3, FLASH_4, "sdpa"}
    if arch in ("sm_120", "sm_121"):
        return flash | {"sdpa", "flex_attention"} | (set() if model in WIDE | SINKS else {FLASH_4})
    return flash | {FLASH_4, "sdpa"}


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
    assert {gpu for block in blocks for gpu in block["gpus"]} == set(catalogue())
    assert all(list(block["models"]) == list(MODELS) for block in BLOCKS.values())
    assert len(MODELS) >= 12


def test_every_image_is_there_for_every_gpu() -> None:
    for arch, block in BLOCKS.items():
        assert list(block["images"]) == list(images())
        served = {name for name, cell in block["images"].items() if cell != "wrong-image"}
        assert served == {name for name, image in images().items() if arch in image.devices}
        own = block["image"]
        assert own is None or block["images"][own] == {}


def test_no_image_runs_on_an_arm64_machine() -> None:
    gpus = [gpu for block in ARM64.values() for gpu in block["gpus"]]
    assert set(gpus) == {"dgx-spark", "gh200", "gb200", "gb300", "jetson-thor"}
    for block in ARM64.values():
        assert block["image"] is None
        assert set(block["images"].values()) == {"wrong-image"}


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
    [("t4", None, "gemma2"), ("v100", None, "llama"), ("h100", None, "gemma4_text"),
     ("b200", None, "deepseek_v3"), ("rtx5090", None, "gpt_oss"), ("mi300x", None, "mistral"),
     ("cpu", None, "qwen3_next"), ("a100", "ampere-frontier", "llama"),
     ("b200", "blackwell-frontier", "deepseek_v3"), ("t4", "turing-frontier", "mistral"),
     ("h100", "ampere", "llama")],
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
    Path("model/config.json").write_text(json.dumps({"model_type": model}))
    Path("c.yaml").write_text(
        "base_model: ./model\nlearning_rate: 1e-4\nsequence_len: 8192\nsample_packing: true\n"
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
