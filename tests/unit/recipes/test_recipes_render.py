"""Rendering: every generated file says what the recipes say, and nothing is written by halves."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnimg.backends import all_backends
from attnimg.errors import AttnimgError
from attnimg.selection.gpus_and_images import gpu_catalogue
from recipes.facts import ImagePlan
from recipes.files import NOTICE, write_all
from recipes.pages.built import read_records
from recipes.pages.config_keys_page import TEXTS as CONFIG_KEYS
from recipes.pages.model_pages import FAMILIES_RECORD, RELOAD_RECORD
from recipes.read import read_recipes
from recipes.render.bake import labels
from recipes.render.image_lists import matrix_json
from recipes.render_all import render_files
from recipes.solve.lock import read_locks, split_lock
from recipes.solve.plan import solve, solve_all

ROOT = Path(__file__).resolve().parents[3]
RECIPES = read_recipes(ROOT)
PLANS = {plan.image.name: plan for plan in solve_all(RECIPES)}
LOCKS = read_locks(tuple(PLANS.values()), root=ROOT)
RUNNERS = (ROOT / "recipes/runners.toml").read_text(encoding="utf-8")
RECORDS = {
    "families": (ROOT / FAMILIES_RECORD).read_text(encoding="utf-8"),
    "reload": (ROOT / RELOAD_RECORD).read_text(encoding="utf-8"),
    "config_keys": (ROOT / CONFIG_KEYS).read_text(encoding="utf-8"),
    "built": read_records(ROOT),
}
TEXTS = render_files(tuple(PLANS.values()), RECIPES, locks=LOCKS, runners=RUNNERS, **RECORDS)
FA4_SET = RECIPES.kernels["flash-attn-4"].ahead_of_time
assert FA4_SET is not None


@pytest.mark.parametrize("path", [pytest.param(path, id=f"{path} is up to date") for path in TEXTS])
def test_nothing_drifted(path: str) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == TEXTS[path], "make render"


@pytest.mark.parametrize("path", [pytest.param(path, id=f"{path} has it") for path in TEXTS])
def test_a_generated_file_has_the_notice(path: str) -> None:
    assert NOTICE in "".join(TEXTS[path].splitlines(keepends=True)[:2])


def test_a_stable_target_for_every_recipe_file() -> None:
    bake = json.loads(TEXTS["docker/docker-bake.json"])
    files = {path.stem for path in (ROOT / "recipes/images").glob("*.toml")}
    assert set(bake["group"]["all"]["targets"]) == files
    assert files < set(bake["target"])


def test_the_base_is_named_once() -> None:
    assert TEXTS["docker/docker-bake.json"].count("docker-image://") == 1


def test_a_digest_pins_the_base() -> None:
    digest = "sha256:" + "0" * 64
    bases = {name: replace(base, digest=digest) for name, base in RECIPES.bases.items()}
    recipes = replace(RECIPES, bases=bases)
    after = render_files(solve_all(recipes), recipes, locks=LOCKS, runners=RUNNERS, **RECORDS)
    base = json.loads(after["docker/docker-bake.json"])["variable"]["BASE"]["default"]
    assert base == f"docker-image://docker.io/library/python:3.11-slim-bookworm@{digest}"


def test_the_dockerfile_takes_every_argument() -> None:
    targets = json.loads(TEXTS["docker/docker-bake.json"])["target"].values()
    given = {name for target in targets for name in target.get("args", {})}
    dockerfile = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ARG (.+)$", dockerfile, flags=re.MULTILINE)
    taken = {word.partition("=")[0] for line in lines for word in line.split()}
    assert given <= taken


def test_a_bumped_kernel_changes_its_own_build_and_what_is_installed() -> None:
    kernel = replace(RECIPES.kernels["sageattention"], version="2.2.1")
    recipes = replace(RECIPES, kernels={**RECIPES.kernels, "sageattention": kernel})
    after = render_files(solve_all(recipes), recipes, locks=LOCKS, runners=RUNNERS, **RECORDS)
    changed = {path for path in TEXTS if TEXTS[path] != after[path]}
    assert {path for path in changed if path.startswith("docker/images/hopper")} == {
        f"docker/images/{name}/{file}"
        for name in ("hopper", "hopper-arm64")
        for file in ("kernels/sageattention.json", "wheelhouse.json")
    }
    old, new = (json.loads(texts["docker/docker-bake.json"])["target"] for texts in (TEXTS, after))
    without_labels = [
        {name: {**target, "labels": None} for name, target in targets.items()}
        for targets in (old, new)
    ]
    assert without_labels[0] == without_labels[1], "no argument of any other kernel's build"


def mounted_by(stage: str) -> set[str]:
    """Name what a stage of the Dockerfile reads: mounted files and named contexts."""
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    (body,) = re.findall(rf"^FROM \S+ AS {stage}\n(.*?)(?=^FROM )", text, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"(?:from|source)=([^,\s]+)", body)) - {"/wheels"}


def test_the_build_of_a_kernel_reads_its_own_files_alone() -> None:
    assert mounted_by("kernel-builder") == {
        "source", "patches", "docker/images/$IMAGE/kernels/$KERNEL.json", "docker/kernel",
    }  # fmt: skip


def compiled_shapes(device: str) -> list[dict[str, object]]:
    name = "hopper" if device == "sm_90" else "blackwell"
    return json.loads(TEXTS[f"docker/images/{name}/fa4_kernels.json"])["targets"][device]["shapes"]


def plain_shape(head_dim: int, heads_per_kv: int, **rest: object) -> dict[str, object]:
    shape = {"head_dim": head_dim, "head_dim_v": head_dim, "heads_per_kv": heads_per_kv}
    return shape | {"window": False, "softcap": 0.0, "sinks": False} | rest


@pytest.mark.parametrize(
    ("shape", "devices"),
    [
        pytest.param(plain_shape(128, 5), "90 100 103 120 121", id="Qwen3-14B"),
        pytest.param(plain_shape(128, 7), "90 100 103 120 121", id="Qwen2.5-7B"),
        pytest.param(plain_shape(128, 3), "90 100 103 120 121", id="Llama-3.2-3B"),
        pytest.param(plain_shape(256, 6), "90 100 103", id="Qwen3.5-27B"),
        pytest.param(plain_shape(128, 12), "90 100 103 120 121", id="GLM-4.5-Air"),
        pytest.param(plain_shape(128, 16), "90 100 103 120 121", id="GLM-4-9B"),
        pytest.param(plain_shape(128, 2, window=True), "90 100 103 120 121", id="Gemma 3 27B"),
        pytest.param(plain_shape(256, 2, window=True), "90", id="Gemma 3 4B: sm_100 has none"),
        pytest.param(plain_shape(256, 2, softcap=50.0), "90", id="Gemma 2: sm_100 has none"),
        pytest.param(plain_shape(64, 8, sinks=True, window=True), "90 100 103", id="gpt-oss"),
        pytest.param(plain_shape(192, 1, head_dim_v=128), "90 100 103", id="Moonlight, MLA"),
        pytest.param(plain_shape(96, 8), "", id="no model's: not a product of dimensions"),
    ],
)
def test_the_shapes_compiled_ahead_of_time(shape: dict[str, object], devices: str) -> None:
    everywhere = ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
    found = {device for device in everywhere if shape in compiled_shapes(device)}
    assert found == {f"sm_{number}" for number in devices.split()}


def test_a_shape_of_several_models_is_compiled_once() -> None:
    shapes = compiled_shapes("sm_90")
    assert len(shapes) == len({json.dumps(shape) for shape in shapes})
    assert len(shapes) < sum(len(m.windows) for m in FA4_SET.models)


def test_what_is_left_out_has_a_reason_and_nothing_else_is() -> None:
    for name in ("hopper", "blackwell"):
        asked = json.loads(TEXTS[f"docker/images/{name}/fa4_kernels.json"])
        for target in asked["targets"].values():
            layers = sum(len(model.windows) for model in FA4_SET.models)
            assert all(target["left_out"].values())
            assert len(target["left_out"]) + len(target["shapes"]) <= layers


def test_another_set_of_models_does_not_rebuild_the_wheel() -> None:
    kernel = RECIPES.kernels["flash-attn-4"]
    fewer = replace(FA4_SET, models=FA4_SET.models[:1], targets={})
    recipes = replace(
        RECIPES, kernels={**RECIPES.kernels, "flash-attn-4": replace(kernel, ahead_of_time=fewer)}
    )
    keys = {
        step.key
        for plan in (PLANS["hopper"], solve(RECIPES.images["hopper"], recipes))
        for step in plan.steps
        if step.kernel.name == "flash-attn-4"
    }
    assert len(keys) == 1


def test_labels_carry_oci_and_our_own() -> None:
    found = labels(PLANS["hopper"])
    assert found["attnimg.arch"] == "sm_90a"
    assert found["attnimg.abi"] == "cp311-torch2.14-cu130${ARCH}"
    assert found["attnimg.driver_min"] == "580.65.06"
    assert "flash-attn-3==3.0.0" in found["attnimg.kernels"].split()
    assert found["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels(PLANS["rocm"])["attnimg.torch"] == "unresolved"


@pytest.mark.parametrize("variable", ["VERSION", "REVISION", "CREATED", "BASE_NAME", "BASE_DIGEST"])
def test_what_is_known_at_the_build_alone_is_a_variable_of_one_label(variable: str) -> None:
    bake = json.loads(TEXTS["docker/docker-bake.json"])
    assert bake["variable"][variable]["default"] in ("", "dev")
    for name in PLANS:
        values = list(bake["target"][name]["labels"].values())
        assert values.count(f"${{{variable}}}") == 1


@pytest.mark.parametrize(
    ("name", "pins"),
    [
        # The index has a CUDA build of 2.13.0.
        pytest.param("cpu", {"torch==2.13.0+cpu"}, id="the cpu image's torch"),
        pytest.param(
            "hopper",
            {"torch==2.14.1", "triton==3.8.0", "flash-attn==2.8.3.post2", "flash-attn-4==4.0.0b36"}
            | {"nvidia-cutlass-dsl==4.8.1", "quack-kernels==0.6.5", "xformers==0.0.35"}
            | {"nvidia-cudnn-cu13==9.24.0.43", "cuda-toolkit==13.0.3.0", "torchao==0.18.0"},
            id="hopper's torch and kernels, with CUDA",
        ),
        pytest.param("turing", {"torch==2.14.1", "xformers==0.0.35"}, id="turing's"),
    ],
)
def test_a_child_image_can_not_replace(name: str, pins: set[str]) -> None:
    assert pins <= set(TEXTS[f"docker/constraints/{name}-fixed.txt"].splitlines())


# What axolotl pins otherwise, what security fixes replace, and what has no part in the ABI.
FREE = ("packaging", "transformers", "trl", "numpy", "urllib3", "einops", "ninja", "bitsandbytes")


@pytest.mark.parametrize("name", [pytest.param(name, id=f"in {name}") for name in PLANS])
def test_a_child_image_may_have_other_versions_of_the_rest(name: str) -> None:
    fixed = set(TEXTS[f"docker/constraints/{name}-fixed.txt"].splitlines())
    tested = set(TEXTS[f"docker/constraints/{name}.txt"].splitlines())
    assert not [line for line in fixed if line.partition("==")[0] in FREE]
    assert {line.removesuffix("+cpu") for line in fixed} <= tested


def test_the_compilers_of_an_image_are_for_its_gpus() -> None:
    bake = json.loads(TEXTS["docker/docker-bake.json"])["target"]
    assert bake["hopper_devel"]["args"]["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert bake["ampere_devel"]["args"]["TORCH_CUDA_ARCH_LIST"] == "8.0 8.6 8.9"
    assert bake["blackwell_devel"]["args"]["TORCH_CUDA_ARCH_LIST"] == "10.0 10.3 12.0 12.1"
    assert bake["hopper_devel"]["contexts"] == bake["hopper"]["contexts"]
    assert bake["cpu_devel"]["args"] == {}
    # Its lock has the packages of a toolchain, and nvcc in the release of torch's CUDA.
    for name, plan in PLANS.items():
        path = ROOT / f"requirements/images/toolchain-{plan.lock}.txt"
        assert (f"{name}_devel" in bake) == path.exists()
        if plan.image.accelerator == "cuda":
            assert f"nvidia-cuda-nvcc=={plan.toolkit}." in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [pytest.param(name, id=f"{name} is locked") for name in PLANS])
def test_every_package_of_a_lock_file_has_a_hash(name: str) -> None:
    locked = split_lock(LOCKS[name])
    assert all("--hash=sha256:" in text for text in locked.values())
    assert {"transformers", "trl", "peft", "datasets"} <= set(locked)
    assert "index-url" not in LOCKS[name]


def test_what_is_shipped_is_what_is_tested() -> None:
    tested = split_lock((ROOT / "requirements/lock.txt").read_text(encoding="utf-8"))
    shipped = split_lock(LOCKS["cpu"])
    assert {name: text.split()[0] for name, text in shipped.items()} == {
        name: tested[name].split()[0] for name in shipped
    }


def test_the_cpu_lock_has_nothing_of_cuda() -> None:
    assert not [
        n for n in split_lock(LOCKS["cpu"]) if n.startswith(("nvidia", "cuda", "triton", "torch"))
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(n, id=f"{n} holds its layers") for n, p in PLANS.items() if p.nvcc]
)
def test_an_image_installs_what_its_layers_installed(name: str) -> None:
    whole = {text.split()[0] for text in split_lock(LOCKS[name]).values()}
    for layer in ("torch", "stack"):
        path = ROOT / f"requirements/images/{layer}-{PLANS[name].lock}.txt"
        layered = {
            text.split()[0] for text in split_lock(path.read_text(encoding="utf-8")).values()
        }
        assert layered <= whole


def test_every_gpu_of_the_catalogue_that_we_can_serve_has_one_image() -> None:
    images = json.loads(TEXTS["attnimg/data/images.json"])["images"]
    stable = [found for found in images.values() if found["channel"] == "stable"]
    for name, gpu in gpu_catalogue().items():
        serving = [found for found in stable if gpu.arch.name in found["devices"]]
        serving = [found for found in serving if f"linux/{gpu.cpu}" in found["platforms"]]
        assert len(serving) == (0 if name in ("v100", "jetson-thor") else 1), name


def test_the_page_of_images_names_the_arm64_build_for_arm64_machines() -> None:
    _, _, gpus = TEXTS["docs/images.md"].partition("## Which image")
    for name, gpu in gpu_catalogue().items():
        (row,) = (line for line in gpus.splitlines() if f"| `{name}` |" in line)
        served = gpu.cpu == "arm64" and name != "jetson-thor"
        assert ("its linux/arm64 build" in row) == served


def test_every_backend_has_a_row_in_the_support_matrix() -> None:
    page = TEXTS["docs/backends-by-image.md"]
    for backend in all_backends():
        name = f"`{backend.name}`" if backend.in_config else f"{backend.name} (only with `auto`)"
        assert f"| {name} |" in page
    assert "| `flash_attention_3` | - | - | - | T | - | - |" in page
    assert "| `sage` | T | T (sm_120 sm_121) | - | T | - | - |" in page


def test_a_gpu_without_a_runner_is_a_skip_on_the_record() -> None:
    plans: tuple[ImagePlan, ...] = (PLANS["hopper"], PLANS["turing"])
    built = {"label": "ubuntu-24.04", "disk_gb": 14, "prepare": True}
    text = matrix_json(plans, runners={"build": {"cuda": built}, "gpu": {"sm_90": "h100"}})
    runners = {entry["arch"]: entry["runner"] for entry in json.loads(text)["gpu"]}
    assert runners == {"sm_90": "h100", "sm_75": None}


def test_a_platform_without_a_runner_is_a_skip_on_the_record() -> None:
    built = {"label": "ubuntu-24.04", "disk_gb": 14, "prepare": True}
    arm = {"label": "arm", "disk_gb": 100, "prepare": False}
    plans: tuple[ImagePlan, ...] = (PLANS["hopper"], PLANS["cpu"])
    for runners, skip in (
        ({"cuda": built}, "no runner in recipes/runners.toml for cuda-arm64"),
        ({"cuda": built, "cuda-arm64": arm}, ""),
    ):
        found = json.loads(matrix_json(plans, runners={"build": runners, "gpu": {}}))
        entries = {(e["image"], e["platform"]): e for e in found["images"]}
        assert entries["hopper", "linux/amd64"]["skip"] == ""
        assert entries["hopper", "linux/arm64"]["skip"] == skip
        # Its torch is unresolved, whatever the runner.
        assert "index for CPUs was not reached" in entries["cpu", "linux/arm64"]["skip"]
        compiled = [e for e in found["kernels"] if e["platform"] == "linux/arm64"]
        assert {e["runner"] for e in compiled} == (set() if skip else {"arm"})


@pytest.mark.parametrize("name", [plan.name for plan in PLANS.values() if plan.others])
def test_the_locks_of_both_platforms_have_the_same_versions(name: str) -> None:
    plan = PLANS[name]
    layers = ("torch-{lock}", "stack-{lock}", "toolchain-{lock}", "{name}")
    for other in plan.others:
        assert other.platform == "linux/arm64"
        for layer in layers:
            first, second = (
                {
                    package: block.split()[0]
                    for package, block in split_lock(
                        (ROOT / f"requirements/images/{layer.format(lock=p.lock, name=p.name)}.txt")
                        .read_text(encoding="utf-8")
                    ).items()
                }
                for p in (plan, other)
            )  # fmt: skip
            shared = first.keys() & second.keys()
            assert {key: first[key] for key in shared} == {key: second[key] for key in shared}
            # Kernels, and torch where its wheel is unresolved, are all that arm64 may lack.
            lacks = first.keys() - second.keys()
            assert lacks <= {"torch", *(step.kernel.name for step in plan.steps)}
            assert second.keys() <= first.keys()


def test_one_variable_chooses_the_platform_of_every_target() -> None:
    bake = json.loads(TEXTS["docker/docker-bake.json"])
    assert bake["variable"]["PLATFORM"]["default"] == "linux/amd64"
    for name, target in bake["target"].items():
        assert target.get("platforms", ["${PLATFORM}"]) == ["${PLATFORM}"], name
        args = target.get("args", {})
        assert all(args[key].endswith("${ARCH}") for key in ("IMAGE", "LOCK") if key in args), name
    for platform, end in (("linux/amd64", ""), ("linux/arm64", "-arm64")):
        found = printed_by_buildx(ROOT, "hopper", PLATFORM=platform)["hopper"]
        assert found["platforms"] == [platform]
        assert found["args"]["IMAGE"] == f"hopper{end}"
        assert found["args"]["LOCK"] == f"2.14.1-cu130{end}"
        assert found["labels"]["attnimg.abi"] == f"cp311-torch2.14-cu130{end}"
        kernels = found["labels"]["attnimg.kernels"].split()
        assert ("torchao==0.18.0" in kernels) == (not end)
        assert {path for path in TEXTS if path.startswith(f"docker/images/hopper{end}/")}


def printed_by_buildx(folder: Path, *targets: str, **variables: str) -> dict[str, Any]:
    """Return the targets of a bake file as the engine's own bake reads them."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed: buildx can't read the bake file")
    asked = subprocess.run(["docker", "buildx", "version"], capture_output=True, check=False)
    if asked.returncode != 0:
        pytest.skip("docker has no buildx")
    command = ["docker", "buildx", "bake", "-f", "docker/docker-bake.json", "--print", *targets]
    env = {**os.environ, **variables}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["target"]
    return found


def test_buildx_takes_the_bake_file() -> None:
    targets = printed_by_buildx(ROOT, "all")
    assert targets["hopper_flash-attn"]["args"]["KERNEL"] == "flash-attn"
    assert targets["hopper_wheels"]["contexts"]["flash-attn"] == "target:hopper_flash-attn"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy what rendering reads; nothing is rendered there yet."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/releases.md", tmp_path / "docs")
    shutil.copytree(ROOT / "docs" / "measured", tmp_path / "docs" / "measured")
    return tmp_path


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recipes", *arguments, "--root", str(checkout)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


TOY = """
version = "1.0"
summary = "Toy"
source = "toy==1.0"
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
form = "sdist"
backends = ["sdpa"]
abi = "stable"
cxx_standard = 17
torch = ">=2.10"
python = ">=3.10"
nvcc = ">=12.8"
requires = []
ships = ["toy"]

[archs]
sm_75 = { token = "7.5", code = "sm_75" }

[build.cuda]
arch_variable = "TORCH_CUDA_ARCH_LIST"
env = {}
job_memory_gb = 2.0
"""


def test_a_kernel_is_one_toml_and_no_other_edit(checkout: Path) -> None:
    (checkout / "recipes/kernels/toy.toml").write_text(TOY, encoding="utf-8")
    edit(checkout / "recipes/images/turing.toml", '["xformers"]', '["xformers", "toy"]')
    done = run(checkout, "render")
    assert done.returncode == 0, done.stderr
    build = json.loads((checkout / "docker/images/turing/kernels/toy.json").read_text())
    assert (build["arch_variable"], build["tokens"]) == ("TORCH_CUDA_ARCH_LIST", ["7.5"])
    wanted = json.loads((checkout / "docker/images/turing/wheelhouse.json").read_text())
    assert wanted["kernels"] == {
        "toy": build["key"],
        **json.loads(TEXTS["docker/images/turing/wheelhouse.json"])["kernels"],
    }
    targets = printed_by_buildx(checkout, "turing")
    assert targets["turing_toy"]["target"] == "kernel"
    args = {key: targets["turing_toy"]["args"][key] for key in ("IMAGE", "KERNEL", "BUILDER")}
    assert args == {"IMAGE": "turing", "KERNEL": "toy", "BUILDER": "toolchain"}
    assert "COPY --from=toy /wheels /wheels" in targets["turing_wheels"]["dockerfile-inline"]
    before = printed_by_buildx(ROOT, "turing")
    assert targets["turing_xformers"] == before["turing_xformers"], "it is not built again"


SHA = "6540b148e40ba81cbd4de86392225a076a1591146e9cebb099b3b234ba9feebe"


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        pytest.param("kernels/xformers", "summary", "sumary", "sumary: unknown key", id="a typo"),
        pytest.param(
            "kernels/torchao", SHA, "0" * 64, "is not that of its package", id="wrong hash"
        ),
        pytest.param("kernels/torchao", f'sha256 = "{SHA}"', "", "sha256: missing", id="no hash"),
        pytest.param("images/turing", '"sm_75"', '"sm_70"', "found sm_70", id="an arch nobody has"),
        pytest.param("images/cpu", "[", "[[", "is not a valid recipe", id="a broken TOML"),
        pytest.param(
            "bases",
            "digest = {",
            'digest = "latest" # {',
            "digest: found 'latest', needed sha256: and 64 hexadecimal digits",
            id="a tag for a digest",
        ),
    ],
)
def test_bad_input_is_refused_and_writes_nothing(
    checkout: Path, file: str, old: str, new: str, says: str
) -> None:
    edit(checkout / f"recipes/{file}.toml", old, new)
    done = run(checkout, "render")
    assert done.returncode == 2
    assert says in done.stderr
    assert [part in done.stderr for part in ("  why: ", "  do:  ", "Traceback")] == [
        True,
        True,
        False,
    ]
    assert not (checkout / "docker").exists()


def test_a_rendered_checkout_is_up_to_date_until_a_recipe_changes(checkout: Path) -> None:
    assert run(checkout, "check").returncode == 1
    assert run(checkout, "render").returncode == 0
    assert run(checkout, "check").returncode == 0
    assert run(checkout, "render").stdout == ""
    edit(checkout / "recipes/images/cpu.toml", "size_max_mb = 350", "size_max_mb = 349")
    drift = run(checkout, "check")
    assert (drift.returncode, "docs/images.md" in drift.stderr) == (1, True)


def test_an_image_with_open_values_is_not_published(checkout: Path) -> None:
    done = run(checkout, "release", "rocm")
    assert done.returncode == 2
    assert "torch is unresolved" in done.stderr


def test_an_unknown_image_is_named_with_those_that_are_known(checkout: Path) -> None:
    done = run(checkout, "solve", "volta")
    assert done.returncode == 2
    assert "known: ampere" in done.stderr


def test_what_can_not_be_written_leaves_the_old_files_whole(tmp_path: Path) -> None:
    (tmp_path / "small").write_text("old", encoding="utf-8")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(AttnimgError, match="can't be written") as caught:
            write_all(tmp_path, {"small": "new", "large": "x" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert (tmp_path / "small").read_text(encoding="utf-8") == "old"


def test_a_file_in_place_of_a_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "docs").write_text("no folder", encoding="utf-8")
    with pytest.raises(AttnimgError, match="can't be written"):
        write_all(tmp_path, {"docs/images.md": "new"})
