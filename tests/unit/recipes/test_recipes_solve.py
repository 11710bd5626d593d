"""The solver plans an image that can be built, and refuses others with all reasons and a fix."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnimg.errors import AttnimgError
from recipes.facts import Image, ImageKernel, Kernel, Need, Prebuilt, Recipes, Removal, Unresolved
from recipes.read import read_recipes
from recipes.solve.plan import cache_key, refuse_unresolved, solve, solve_all
from recipes.solve.rules import SERVED, reasons_against

ROOT = Path(__file__).resolve().parents[3]
RECIPES = read_recipes(ROOT)


def image(name: str, *, kernels: Any = None, **changes: Any) -> Image:
    """Change an image that works; kernels are choices, or names with blanks between."""
    if isinstance(kernels, str):
        changes["kernels"] = tuple(ImageKernel(name=kernel) for kernel in kernels.split())
    elif kernels is not None:
        changes["kernels"] = kernels
    return replace(RECIPES.images[name], **changes)


def with_kernel(name: str, **changes: Any) -> Recipes:
    """Change one kernel's recipe."""
    kernels = {**RECIPES.kernels, name: replace(RECIPES.kernels[name], **changes)}
    return replace(RECIPES, kernels=kernels)


def refusal(made: Image, recipes: Recipes = RECIPES) -> AttnimgError:
    with pytest.raises(AttnimgError) as caught:
        solve(made, recipes)
    return caught.value


TORCH_2_13 = {"torch": "2.13.0"}
FRONTIER = {"torch": "2.15.0"}


@pytest.mark.parametrize(
    ("made", "says", "nearest"),
    [
        # users.md A1: flash-attn 2 against a torch that it was not made for.
        pytest.param(
            image("ampere", torch="2.9.1"),
            "xformers 0.0.35 needs torch >=2.10; found 2.9.1",
            "torch 2.10.0 with CUDA 12.8",
            id="xformers is refused below torch 2.10",
        ),
        pytest.param(
            image("ampere", torch="2.5.1"),
            "flash-attn 2.8.3.post2 needs torch >=2.6; found 2.5.1",
            "torch 2.10.0",
            id="flash-attn is refused on a torch older than its headers",
        ),
        pytest.param(
            image("turing", kernels="xformers flash-attn"),
            "backend flash_attention_2 needs sm_80 or newer (Ampere)",
            "without flash-attn",
            id="Turing has no flash-attn",
        ),
        pytest.param(
            image("turing", archs=("sm_70", "sm_75")),
            "sm_103 sm_110 sm_120 sm_121; found sm_70",
            "without sm_70",
            id="CUDA 13 has dropped Volta",
        ),
        pytest.param(
            image("turing", archs=("sm_70", "sm_75")),
            "torch 2.14.1 has machine code for sm_75 sm_80 sm_86 sm_90 sm_100 sm_120; found sm_70",
            "without sm_70",
            id="torch 2.14 has dropped Volta",
        ),
        pytest.param(
            image("hopper", archs=("sm_87",), kernels="flash-attn"),
            "flash-attn 2.8.3.post2 supports sm_80 sm_86",
            "nearest: none",
            id="an architecture that no build token covers is refused",
        ),
        pytest.param(
            image("ampere", python="3.8"),
            "xformers 0.0.35 needs Python >=3.9; found 3.8",
            "nearest: none",
            id="an old Python is refused",
        ),
        pytest.param(
            image("turing", python="3.10", **FRONTIER),
            "torch 2.15.0 needs Python >=3.11; found 3.10",
            "nearest: none",
            id="torch 2.15 has no wheel for Python 3.10",
        ),
        # users.md A2: FlashAttention-3.
        pytest.param(
            image("hopper", **FRONTIER),
            "flash-attn-3 3.0.0 needs nvcc >=12.8,!=12.9.*,<13.1; found 13.2.86 of CUDA 13.2",
            "torch 2.14.1 with CUDA 13.0",
            id="FlashAttention-3 is not compiled by CUDA 13.2",
        ),
        pytest.param(
            image("ampere", kernels="flash-attn flash-attn-3"),
            "backend flash_attention_3 needs sm_90 (Hopper); found sm_80",
            "without flash-attn-3",
            id="FlashAttention-3 is Hopper's",
        ),
        pytest.param(
            image("blackwell", kernels="flash-attn flash-attn-3"),
            "backend flash_attention_3 needs sm_90 (Hopper); found sm_120",
            "without flash-attn-3",
            id="FlashAttention-3 is not Blackwell's",
        ),
        # users.md A3: FlashAttention-4.
        pytest.param(
            image("hopper", kernels="flash-attn-4 xformers"),
            "flash-attn-4 4.0.0b36 needs flash-attn beside xformers; found none",
            "with flash-attn",
            id="FlashAttention-4 without flash-attn kills xformers",
        ),
        pytest.param(
            image("hopper", kernels="flash-attn flash-attn-4", **TORCH_2_13),
            "flash-attn-4 4.0.0b36 needs torch >=2.14; found 2.13.0",
            "torch 2.14.1 with CUDA 13.0",
            id="torch 2.13 can't unpack what FlashAttention-4 returns",
        ),
        pytest.param(
            image("ampere", kernels="flash-attn flash-attn-4"),
            "backend flash_attention_4 needs sm_90 to sm_121 (Hopper, Blackwell); found sm_86",
            "without flash-attn-4",
            id="FlashAttention-4 has no backward pass below Hopper",
        ),
        # users.md A4: Sage, xformers, torchao.
        pytest.param(
            image("blackwell", kernels="flash-attn sageattention"),
            "sageattention 2.2.0 supports sm_80 sm_86 sm_89 sm_90a sm_120 sm_121; found sm_100",
            "sageattention for sm_120 sm_121 only",
            id="SageAttention has no kernel for sm_100",
        ),
        pytest.param(
            image("turing", kernels="xformers sageattention"),
            "backend sage needs sm_80, sm_86, sm_89, sm_90, sm_120 or sm_121; found sm_75",
            "without sageattention",
            id="SageAttention has no kernel for Turing",
        ),
        pytest.param(
            image("hopper", kernels="flash-attn torchao", platforms=("linux/amd64",)),
            "torchao 0.18.0 needs flash-attn-3; found none",
            "with flash-attn-3",
            id="torchao's fp8 attention stands on FlashAttention-3",
        ),
        pytest.param(
            image("blackwell", kernels="flash-attn torchao"),
            "backend fp8 needs sm_90 (Hopper)",
            "without torchao",
            id="torchao's fp8 attention is Hopper's",
        ),
        pytest.param(
            image("rocm", kernels="flash-attn xformers"),
            "xformers is built on cuda; found rocm",
            "without xformers",
            id="xformers has no recipe for ROCm",
        ),
        pytest.param(
            image("rocm", archs=("gfx942", "gfx1103")),
            "found gfx1103",
            "without gfx1103",
            id="flash-attn has nothing for RDNA's integrated GPUs",
        ),
        # What a recipe's author gets wrong.
        pytest.param(
            image("hopper", kernels="flash-atn"),
            "found kernel 'flash-atn'; known: flash-attn",
            "nearest: none",
            id="an unknown kernel is named with those that are known",
        ),
        pytest.param(
            image(
                "blackwell",
                kernels=(ImageKernel(name="sageattention", archs=("sm_120", "sm_121")),),
            ),
            "blackwell has sm_100; none of its kernels supports it",
            "without sm_100, without sm_103",
            id="an architecture that no kernel serves is not promised",
        ),
        pytest.param(
            image("cpu", base="debian:bookworm-slim"),
            "base debian:bookworm-slim is not in recipes/bases.toml; known: bookworm, trixie",
            "nearest: none",
            id="a base whose libraries nobody wrote down is refused",
        ),
        pytest.param(
            image("cpu", torch="2.14.1"),
            "torch 2.14.1 has no CPU build for cp311 in recipes/torch.toml",
            "torch 2.13.0",
            id="a CPU image without a CPU build of its torch",
        ),
        pytest.param(
            image("cpu", archs=("cpu", "sm_90a")),
            "found sm_90a in an image for cpu",
            "without sm_90a",
            id="a GPU's architecture is not put into the cpu image",
        ),
    ],
)
def test_refuses(made: Image, says: str, nearest: str) -> None:
    error = refusal(made)
    assert says in error.why
    assert nearest in error.do
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("recipes", "made", "says"),
    [
        pytest.param(
            with_kernel("flash-attn", cxx_standard=17),
            image("ampere"),
            "torch 2.14.1's headers need C++20; flash-attn 2.8.3.post2 is compiled as C++17",
            id="flash-attn without its C++20 patch does not compile against torch 2.14",
        ),
        pytest.param(
            with_kernel("sageattention", cxx_standard=17),
            image("ampere"),
            "sageattention 2.2.0 is compiled as C++17",
            id="SageAttention without its C++20 patch does not compile against torch 2.14",
        ),
        pytest.param(
            with_kernel("flash-attn", remove=()),
            image("hopper"),
            "flash-attn 2.8.3.post2 installs flash_attn/cute, which flash-attn-4 owns",
            id="flash-attn with its cute stub is not put beside FlashAttention-4",
        ),
        pytest.param(
            with_kernel("flash-attn", version="2.9.0"),
            image("ampere"),
            "xformers 0.0.35 needs flash-attn >=2.7.1,<=2.8.4 beside it; found 2.9.0",
            id="xformers is not put beside a flash-attn that it refuses",
        ),
        pytest.param(
            replace(
                RECIPES,
                torch={
                    **RECIPES.torch,
                    "2.14.1": replace(RECIPES.torch["2.14.1"], toolkit="13.1"),
                },
            ),
            image("ampere"),
            "CUDA 13.1 of torch 2.14.1 is not in recipes/cuda.toml; known: 12.8, 13.0, 13.2",
            id="torch of a CUDA release whose driver nobody wrote down is refused",
        ),
        pytest.param(
            replace(RECIPES, stack={**RECIPES.stack, "transformers": "5.23.0"}),
            image("cpu"),
            "kernels 0.17.2 works with transformers >=5.20,<5.23; found 5.23.0",
            id="kernels 0.17.2 is not put beside transformers 5.23",
        ),
        pytest.param(
            with_kernel("flash-attn-4", requires=("nvidia-cutlass-dsl[cu13]==4.6.1", "einops")),
            image("hopper"),
            "flash-attn-4 4.0.0b36 works with nvidia-cutlass-dsl >=4.6.2; found 4.6.1",
            id="FlashAttention-4 is not put beside an older CuTe DSL",
        ),
        pytest.param(
            with_kernel(
                "flash-attn-4", requires=("nvidia-cutlass-dsl==4.6.2", "quack-kernels[cu13]==0.6.5")
            ),
            image("blackwell"),
            "quack-kernels 0.6.5 works with nvidia-cutlass-dsl >=4.7; found 4.6.2",
            id="nor is what it requires put beside one another in other versions",
        ),
        pytest.param(
            with_kernel("flash-attn-4", requires=("apache-tvm-ffi==0.2.0",)),
            image("hopper"),
            "flash-attn-4 4.0.0b36 works with apache-tvm-ffi >=0.1.11,<0.2; found 0.2.0",
            id="a newer TVM FFI is refused",
        ),
        pytest.param(
            replace(
                RECIPES,
                torch={**RECIPES.torch, "2.14.1": replace(RECIPES.torch["2.14.1"], triton="2.3.1")},
            ),
            image("ampere"),
            "sageattention 2.2.0 works with triton >=3.0.0; found 2.3.1",
            id="SageAttention is not put beside an older Triton of torch",
        ),
    ],
)
def test_refuses_what_recipes_must_not_become(recipes: Recipes, made: Image, says: str) -> None:
    assert says in refusal(made, recipes).why


def test_all_reasons_are_reported_together() -> None:
    error = refusal(image("turing", kernels="xformers flash-attn", torch="2.9.1"))
    for text in ("flash_attention_2", "torch >=2.10", "torch 2.9.1 is not in"):
        assert text in error.why


# facts/kernels.md, section 4: rows are kernels, columns architectures.
MATRIX = {
    "flash-attn": "sm_80 sm_86 sm_89 sm_90a sm_100 sm_103 sm_120 sm_121",
    "flash-attn-3": "sm_90a",
    "flash-attn-4": "sm_90a sm_100 sm_103 sm_120 sm_121",
    "sageattention": "sm_80 sm_86 sm_89 sm_90a sm_120 sm_121",
    "xformers": "sm_75 sm_80 sm_86 sm_89 sm_90a sm_100 sm_103 sm_120 sm_121",
    "torchao": "sm_90a",
}
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_103", "sm_120", "sm_121")


@pytest.mark.parametrize(
    ("kernel", "arch", "runs"),
    [
        pytest.param(
            kernel,
            arch,
            arch in runs,
            id=f"{kernel} {'serves' if arch in runs else 'lacks'} {arch}",
        )
        for kernel, runs in ((name, text.split()) for name, text in MATRIX.items())
        for arch in ARCHS
    ],
)
def test_matrix(kernel: str, arch: str, *, runs: bool) -> None:
    needed = {need.kernel for need in RECIPES.kernels[kernel].needs if not need.beside}
    names = " ".join([kernel, *sorted(needed)])
    made = image("hopper", kernels=names, archs=(arch,), platforms=("linux/amd64",))
    assert (reasons_against(made, RECIPES) == ()) is runs


@pytest.mark.parametrize(
    ("made", "toolkit", "driver", "abi"),
    [
        pytest.param(
            image("hopper"), "13.0", "580.65.06", "cp311-torch2.14-cu130", id="torch 2.14: CUDA 13"
        ),
        pytest.param(
            image("hopper", kernels="xformers", torch="2.10.0", platforms=("linux/amd64",)),
            "12.8", "570.26", "cp311-torch2.10-cu128", id="torch 2.10: CUDA 12.8, its older driver",
        ),
        pytest.param(image("cpu"), None, None, "cp311-torch2.13-cpu", id="none on a CPU"),
    ],
)  # fmt: skip
def test_cuda_and_the_driver_follow_from_torch(
    made: Image, toolkit: str | None, driver: str | None, abi: str
) -> None:
    plan = solve(made, RECIPES)
    assert (plan.toolkit, plan.driver_min, plan.abi) == (toolkit, driver, abi)


def test_every_image_is_planned_whole() -> None:
    names = {plan.image.name for plan in solve_all(RECIPES)}
    assert names >= {"cpu", "turing", "ampere", "hopper", "blackwell", "rocm"}


@pytest.mark.parametrize(
    ("name", "kernel", "tokens", "codes"),
    [
        pytest.param("ampere", "flash-attn", "80", "sm_80", id="one token serves Ampere and Ada"),
        pytest.param("hopper", "flash-attn", "90", "sm_90", id="Hopper's token is 90"),
        pytest.param(
            "blackwell", "flash-attn", "100 120", "sm_100 sm_120", id="two tokens serve Blackwell"
        ),
        pytest.param(
            "blackwell", "sageattention", "12.0 12.1", "sm_120a sm_121a", id="Sage for RTX alone"
        ),
        pytest.param("hopper", "flash-attn-3", "", "sm_90a", id="FlashAttention-3 takes no token"),
        pytest.param(
            "hopper", "flash-attn-4", "", "", id="FlashAttention-4 compiles where it runs"
        ),
    ],
)
def test_a_kernel_is_built_for_its_architectures(
    name: str, kernel: str, tokens: str, codes: str
) -> None:
    steps = {step.kernel.name: step for step in solve(RECIPES.images[name], RECIPES).steps}
    assert (" ".join(steps[kernel].tokens), " ".join(steps[kernel].codes)) == (tokens, codes)


def test_flash_attn_4_is_installed_after_flash_attn() -> None:
    order = [step.kernel.name for step in solve(RECIPES.images["hopper"], RECIPES).steps]
    assert order.index("flash-attn") < order.index("flash-attn-4")
    assert order.index("flash-attn-3") < order.index("torchao")


def test_who_owns_a_path_is_installed_after_all_whose_source_has_it() -> None:
    removes = Removal(reason="a test", path="flash_attn/cute")
    recipes = with_kernel("xformers", ships=("xformers", "flash_attn/cute"), remove=(removes,))
    alone = replace(RECIPES.kernels["flash-attn-4"], needs=())
    recipes = replace(recipes, kernels={**recipes.kernels, "flash-attn-4": alone})
    made = image("hopper", kernels="flash-attn-4 xformers")
    order = [step.kernel.name for step in solve(made, recipes).steps]
    assert order == ["xformers", "flash-attn-4"]


def test_changing_only_the_arch_list_changes_the_cache_key() -> None:
    kernel, abi = RECIPES.kernels["flash-attn"], "cp311-torch2.14-cu130"
    key = cache_key(kernel, ("sm_80",), abi=abi)
    assert key != cache_key(kernel, ("sm_80", "sm_90a"), abi=abi)
    assert key == cache_key(replace(kernel), ("sm_80",), abi=abi)
    assert key != cache_key(kernel, ("sm_80",), abi="cp311-torch2.15-cu132")
    assert cache_key(kernel, ("sm_80", "sm_86"), abi=abi) == cache_key(
        kernel, ("sm_86", "sm_80"), abi=abi
    )


FLASH = RECIPES.kernels["flash-attn"]
PATCH, TRIM = FLASH.patches


@pytest.mark.parametrize(
    ("other", "same"),
    [
        pytest.param(
            replace(FLASH, patches=(replace(PATCH, diff=PATCH.diff + " "), TRIM)),
            False,
            id="a changed patch changes the key",
        ),
        pytest.param(replace(FLASH, remove=()), False, id="so does a removal"),
        pytest.param(replace(FLASH, sha256="0" * 64), False, id="so does another archive"),
        pytest.param(
            replace(FLASH, patches=(replace(PATCH, reason="better words"), TRIM)),
            True,
            id="a reason in other words does not",
        ),
        pytest.param(replace(FLASH, patches=(PATCH,)), True, id="nor does the small build"),
        pytest.param(
            replace(FLASH, archs={**FLASH.archs, "sm_130": FLASH.archs["sm_120"]}),
            True,
            id="nor an architecture that another image adds",
        ),
    ],
)
def test_what_goes_into_a_build_names_its_wheel(other: Kernel, same: bool) -> None:
    found = [cache_key(kernel, ("sm_80",), abi="x") for kernel in (FLASH, other)]
    assert (found[0] == found[1]) == same


def test_another_environment_changes_the_cache_key() -> None:
    keys = [cache_key(FLASH, ("sm_80",), abi="x", env={"A": text}) for text in "12"]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        pytest.param({}, True, id="a public wheel that fits exactly is taken"),
        pytest.param({"abi": "cp312-torch2.14-cu130"}, False, id="not one for another Python"),
        pytest.param({"abi": "cp311-torch2.13-cu130"}, False, id="not one for another torch"),
        pytest.param({"codes": ("sm_80",)}, False, id="not one without this machine code"),
        pytest.param({"codes": ("sm_80", "sm_90")}, False, id="not one with more of it"),
    ],
)
def test_prebuilt(changes: dict[str, Any], taken: bool) -> None:
    wheel = Prebuilt(
        source="https://example.org/flash_attn-2.8.3.post2-cp311-cp311-linux_x86_64.whl",
        sha256="0" * 64,
        abi="cp311-torch2.14-cu130",
        codes=("sm_90",),
        reason="a test",
    )
    recipes = with_kernel("flash-attn", prebuilt=(replace(wheel, **changes),))
    plan = solve(RECIPES.images["hopper"], recipes)
    step = next(step for step in plan.steps if step.kernel.name == "flash-attn")
    assert (step.prebuilt is not None) == taken


def test_another_kernels_pin_leaves_the_cache_key_alone() -> None:
    before = solve(RECIPES.images["hopper"], RECIPES)
    bumped = with_kernel("flash-attn-4", version="4.0.0b37", source="flash-attn-4==4.0.0b37")
    after = solve(RECIPES.images["hopper"], bumped)
    changed = [
        old.kernel.name
        for old, new in zip(before.steps, after.steps, strict=True)
        if old.key != new.key
    ]
    assert changed == ["flash-attn-4"]


def test_one_rocm_wheel_serves_rdna_without_machine_code_for_it() -> None:
    (step,) = solve(RECIPES.images["rocm"], RECIPES).steps
    assert {"gfx942", "gfx1100", "gfx1201"} <= set(step.archs)
    assert step.codes == step.tokens == ("gfx90a", "gfx942", "gfx950")
    assert step.build.arch_variable == "GPU_ARCHS"


def test_an_unresolved_value_is_planned_but_not_published() -> None:
    plan = solve(RECIPES.images["rocm"], RECIPES)
    with pytest.raises(AttnimgError, match="can't be published") as caught:
        refuse_unresolved(plan)
    assert "images/rocm: size_max_mb is unresolved: never built" in caught.value.why


def with_digest(recipes: Recipes = RECIPES) -> Recipes:
    """Pin the base."""
    name = recipes.images["cpu"].base
    return with_base(recipes, name, digest="sha256:" + "0" * 64)


def with_base(recipes: Recipes, name: str, **changes: Any) -> Recipes:
    """Change one base."""
    bases = {**recipes.bases, name: replace(recipes.bases[name], **changes)}
    return replace(recipes, bases=bases)


@pytest.mark.parametrize(
    ("changes", "python", "says"),
    [
        pytest.param(
            {"python": "3.12"}, "3.12", "base bookworm: python 3.12 is not served, only 3.11",
            id="Python 3.12, for which nothing is locked",
        ),
        pytest.param(
            {"debian": "trixie"}, "3.11", "base bookworm: debian trixie is not served",
            id="Debian trixie",
        ),
        pytest.param(
            {"open": ("wheels for it",)}, "3.11",
            "base bookworm is not served yet; missing: wheels for it",
            id="a base with an open list",
        ),
    ],
)  # fmt: skip
def test_a_base_that_the_build_does_not_serve_is_refused(
    changes: dict[str, Any], python: str, says: str
) -> None:
    recipes = with_base(RECIPES, "bookworm", **changes)
    assert says in refusal(image("cpu", python=python), recipes).why


def test_the_next_base_is_refused_with_all_that_moving_there_takes() -> None:
    why = refusal(image("cpu", base="trixie", python="3.13")).why
    assert "python 3.13 is not served, only 3.11: docker/install/prune.py" in why
    assert all(text in why for text in RECIPES.bases["trixie"].open)


def test_the_python_and_debian_that_are_served_are_those_in_the_files() -> None:
    for name in ("install/prune.py", "install/copy_headers.py", "Dockerfile"):
        text = (ROOT / "docker" / name).read_text(encoding="utf-8")
        assert set(re.findall(r"python(3[.]\d+)", text)) == {SERVED["python"][0]}, name
    stand_in = (ROOT / "docker/base.sh").read_text(encoding="utf-8")
    assert set(re.findall(r"bookworm|trixie", stand_in)) == {SERVED["debian"][0]}


def test_a_resolved_image_may_be_published() -> None:
    refuse_unresolved(solve(image("hopper"), with_digest()))


def test_an_unresolved_hash_of_a_kernel_is_not_published() -> None:
    recipes = with_kernel("xformers", sha256=Unresolved("never downloaded"))
    plan = solve(image("turing"), with_digest(recipes))
    assert plan.unresolved == {"kernels/xformers: sha256": "never downloaded"}


def test_images_share_one_base() -> None:
    images = {**RECIPES.images, "cpu": image("cpu", base="debian:bookworm-slim")}
    with pytest.raises(AttnimgError, match="images have different bases") as caught:
        solve_all(replace(RECIPES, images=images))
    assert "found debian:bookworm-slim" in caught.value.why


def test_a_kernel_that_nobody_has_can_be_needed_without_a_crash() -> None:
    recipes = with_kernel("xformers", needs=(Need(reason="a test", kernel="mslk"),))
    assert "needs mslk" in refusal(image("turing"), recipes).why


BOTH = ("linux/amd64", "linux/arm64")


@pytest.mark.parametrize(
    ("made", "says", "nearest"),
    [
        pytest.param(
            image("turing", platforms=BOTH),
            "torch 2.14.1 has machine code for sm_80 sm_90 sm_100 sm_110 sm_120 on linux/arm64; "
            "found sm_75",
            "nearest: ",
            id="torch for arm64 has no code for Turing",
        ),
        pytest.param(
            image("hopper", kernels="flash-attn-3 torchao"),
            "torchao 0.18.0 is for linux/amd64; found linux/arm64",
            "torchao for linux/amd64 only",
            id="a kernel without a wheel for arm64",
        ),
        pytest.param(
            image("hopper", kernels="xformers", torch="2.10.0"),
            "torch 2.10.0 has a CUDA build for linux/amd64; found linux/arm64",
            "torch 2.11.0",
            id="a torch without CUDA for arm64",
        ),
        pytest.param(
            image("cpu", torch="2.14.1"),
            "torch 2.14.1 has no CPU build for cp311 on linux/arm64 in recipes/torch.toml",
            "torch 2.13.0",
            id="a torch without a CPU build for arm64",
        ),
        pytest.param(
            image(
                "hopper",
                kernels=(
                    ImageKernel(name="flash-attn-3", platforms=("linux/amd64",)),
                    ImageKernel(name="xformers"),
                ),
            ),
            "flash-attn-3 is compiled, and limited to linux/amd64",
            "flash-attn-3 for linux/amd64 linux/arm64 only",
            id="a compiled kernel on one platform",
        ),
        pytest.param(
            image("ampere", kernels=(ImageKernel(name="xformers", platforms=("linux/arm64",)),)),
            "xformers has linux/arm64, which ampere is not built for",
            "",
            id="a kernel on a platform that the image lacks",
        ),
    ],
)
def test_a_platform_is_refused_with_its_reason(made: Image, says: str, nearest: str) -> None:
    error = refusal(made)
    assert says in error.why
    assert nearest in error.do


@pytest.mark.parametrize("name", ["cpu", "hopper", "blackwell", "blackwell-frontier"])
def test_a_platform_has_the_kernels_and_the_machine_code_of_the_first(name: str) -> None:
    plan = solve(RECIPES.images[name], RECIPES)
    (arm64,) = plan.others
    assert (plan.platform, arm64.platform) == BOTH
    assert (arm64.name, arm64.lock) == (f"{plan.name}-arm64", f"{plan.lock}-arm64")
    assert arm64.abi == f"{plan.abi}-arm64"
    assert not arm64.others
    first = {step.kernel.name: step for step in plan.steps}
    assert first.keys() - {step.kernel.name for step in arm64.steps} <= {"torchao"}
    for step in arm64.steps:
        other = first[step.kernel.name]
        assert (step.codes, step.tokens) == (other.codes, other.tokens)
        # Host code is another's; a wheel of Python alone is the same file.
        assert (step.key == other.key) == (step.kernel.abi == "python")


def test_a_reason_that_holds_on_all_platforms_is_named_once() -> None:
    why = refusal(image("blackwell", kernels="flash-attn-3")).why
    assert why.count("flash-attn-3 3.0.0 supports sm_90a; found sm_100") == 1


def test_an_unresolved_wheel_of_torch_blocks_its_own_platform_alone() -> None:
    recipes = with_digest()
    plan = solve(recipes.images["cpu"], recipes)
    refuse_unresolved(plan)
    with pytest.raises(AttnimgError, match="cpu can't be published") as caught:
        refuse_unresolved(plan.others[0])
    assert "aarch64.whl is unresolved: PyTorch's index" in caught.value.why
