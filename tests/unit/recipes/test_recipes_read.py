"""Reading recipes: what is not known is refused, all of it at once, and says what to do."""

from __future__ import annotations

import re
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from attnimg.errors import AttnimgError
from recipes.facts import Base, CpuBuild, Torch, Unresolved
from recipes.read import (
    base_faults,
    read_image,
    read_kernel,
    read_patches,
    read_recipes,
    torch_faults,
)

ROOT = Path(__file__).resolve().parents[3]
KERNEL = (ROOT / "recipes/kernels/flash-attn.toml").read_text(encoding="utf-8")
GIT_KERNEL = (ROOT / "recipes/kernels/sageattention.toml").read_text(encoding="utf-8")
FA4 = (ROOT / "recipes/kernels/flash-attn-4.toml").read_text(encoding="utf-8")
IMAGE = (ROOT / "recipes/images/hopper.toml").read_text(encoding="utf-8")


def put(text: str, key: str, value: str | None) -> str:
    """Set a TOML key to another value; None removes its line."""
    line = rf"(?m)^{key} = .*\n"
    assert re.search(line, text), key
    return re.sub(line, "" if value is None else f"{key} = {value}\n", text, count=1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param(
            'versoin = "1"\n' + KERNEL, "versoin: unknown key; did you mean version?", id="a typo"
        ),
        pytest.param(put(KERNEL, "version", None), "version: missing", id="a missing key"),
        *(
            pytest.param(f"{key} = []\n" + KERNEL, f"{key}: unknown key", id=f"{key} in its file")
            for key in ("patch", "patches", "name")
        ),
        pytest.param(
            put(KERNEL, "sha256", None),
            "sha256: missing; flash-attn==2.8.3.post2 needs its archive's",
            id="a release without its hash",
        ),
        pytest.param(
            put(KERNEL, "sha256", '"d0f9"'),
            "sha256: found 'd0f9', needed 64 hexadecimal digits",
            id="half a hash",
        ),
        pytest.param(
            put(KERNEL, "source", '"flash-attn==2.8.3"'),
            "source: found 'flash-attn==2.8.3', but version is '2.8.3.post2'",
            id="a source of another version",
        ),
        pytest.param(
            put(GIT_KERNEL, "source", '"thu-ml/SageAttention@main"'),
            "needed name==version or owner/name@40-digit commit",
            id="a branch where a commit belongs",
        ),
        pytest.param(put(KERNEL, "form", '"egg"'), "form: found 'egg'", id="an unknown form"),
        pytest.param(
            put(KERNEL, "form", '"git"'),
            "form: found 'git' for 'flash-attn==2.8.3.post2'",
            id="a release that says it is git",
        ),
        pytest.param(
            put(KERNEL, "torch", '"2.6+"'),
            "torch: found '2.6+', needed a version bound such as >=2.10",
            id="a bound that is none",
        ),
        pytest.param(
            put(KERNEL, "sm_86", '{ token = "80", codes = "sm_80" }'),
            "archs.sm_86.codes: unknown key",
            id="a typo in a nested table",
        ),
        pytest.param(
            put(KERNEL, "sm_86", "{}").replace("sm_86 = ", "ampere = "),
            "archs: found 'ampere', needed cpu, sm_NN[a], sm_NNN[a] or gfxNNN",
            id="an architecture that is none",
        ),
        pytest.param(
            put(KERNEL, "requires", '["einops=1"]'),
            "requires: found 'einops=1', needed a pip requirement",
            id="a requirement that is none",
        ),
        pytest.param(
            put(FA4, "dtypes", '["float32"]'),
            "ahead_of_time.dtypes.0: found 'float32'",
            id="kernels of a dtype that there is none of",
        ),
        pytest.param(
            put(FA4, "varlen", None), "ahead_of_time.varlen: missing", id="a set without an axis"
        ),
        pytest.param(
            FA4.replace("sm_103 = {}", ""),
            "ahead_of_time.targets.sm_103: needed for each of archs, and for no other",
            id="kernels for an architecture that is not served",
        ),
        pytest.param(
            FA4.replace("sm_103 = { code", "sm_110 = { code"),
            "ahead_of_time.targets.sm_103: needed for each of archs",
            id="an architecture without its kernels",
        ),
        pytest.param(
            FA4.replace('head_dim = 96, source = "litgpt"', 'head_dim = 96, source = "hearsay"'),
            "microsoft/Phi-3.5-mini-instruct: found source 'hearsay'",
            id="a model whose shape has no source",
        ),
        pytest.param(
            FA4.replace("heads = 40, kv_heads = 10", "heads = 40, kv_heads = 9"),
            "microsoft/phi-4: found 40 heads for 9 kv_heads",
            id="heads that no group of them shares",
        ),
        pytest.param(
            FA4.replace("Qwen/Qwen3-8B", "Qwen/Qwen3-14B"),
            "Qwen/Qwen3-14B is listed more than once",
            id="a model listed twice",
        ),
        pytest.param(
            "version = ", "Invalid value (at end of document)", id="a file that is no TOML"
        ),
    ],
)
def test_refuses_a_kernel_with(text: str, says: str) -> None:
    with pytest.raises(AttnimgError, match=r"recipes/kernels/some\.toml") as caught:
        read_kernel("some", text)
    assert says in caught.value.why
    assert caught.value.do
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param(
            "capabilities = []\n" + IMAGE, "capabilities: unknown key", id="an unknown key"
        ),
        pytest.param(
            put(IMAGE, "accelerator", '"tpu"'), "accelerator: found 'tpu'", id="no such accelerator"
        ),
        pytest.param(put(IMAGE, "archs", "[]"), "archs: found none", id="no architecture"),
        pytest.param(put(IMAGE, "archs", '["hopper"]'), "found 'hopper'", id="a name for an arch"),
        pytest.param(
            put(IMAGE, "size_max_mb", "{ unresolved = 3 }"),
            "size_max_mb.",
            id="an unresolved value without a reason",
        ),
        pytest.param(
            put(IMAGE, "size_max_mb", '"3 GB"'), "size_max_mb", id="a size that is no number"
        ),
        pytest.param(
            IMAGE + 'frontier = { torch = "2.15.0" }\n',
            "frontier: found {'torch': '2.15.0'}, needed a release of torch",
            id="a frontier that is no release",
        ),
        *(
            pytest.param(f"{key} = {value}\n" + IMAGE, f"{key}: unknown key", id=f"{key}: {why}")
            for key, value, why in (
                ("toolkit", '"12.8"', "kernels of one CUDA major beside torch of another"),
                ("driver_min", '"570.26"', "a driver floor below the toolkit's"),
                ("gates", '["size"]', "every gate judges every image"),
                ("name", '"other"', "a name is its file's"),
                ("channel", '"frontier"', "a variant is made of the key frontier"),
            )
        ),
    ],
)
def test_refuses_an_image_with(text: str, says: str) -> None:
    with pytest.raises(AttnimgError, match=r"recipes/images/some\.toml") as caught:
        read_image("some", text)
    assert says in caught.value.why


def test_all_errors_of_a_file_are_reported_together() -> None:
    text = put(put(KERNEL, "sha256", None), "torch", '"new"')
    with pytest.raises(AttnimgError) as caught:
        read_kernel("some", text)
    assert "sha256: missing" in caught.value.why
    assert "torch: found 'new'" in caught.value.why


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n", id="without a reason"),
        pytest.param("It is needed.\n", id="without a diff"),
    ],
)
def test_refuses_a_patch(tmp_path: Path, text: str) -> None:
    (tmp_path / "some.patch").write_text(text, encoding="utf-8")
    with pytest.raises(AttnimgError, match=r"some\.patch is not a valid recipe"):
        read_patches(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=f"{path.parent.name}/{path.name} says when its reason was read")
        for path in sorted((ROOT / "recipes/patches").rglob("*.patch"))
    ],
)
def test_a_patch_has_a_dated_reason(path: Path) -> None:
    reason, _, _ = path.read_text(encoding="utf-8").partition("--- a/")
    assert re.search(r"\b2026-\d\d-\d\d\b", reason)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        pytest.param(
            "allowed", "[[alowed]]\n", "alowed: unknown key; needed [[allowed]]", id="typo"
        ),
        pytest.param("cves", "[cve]\n", "cve: found a table, needed [[cve]]", id="one table"),
        pytest.param("pairs", "", "", id="no entry"),
    ],
)
def test_a_list_of_entries_has_no_other_key(
    tmp_path: Path, file: str, text: str, says: str
) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / f"recipes/{file}.toml").write_text(text)
    if not says:
        assert read_recipes(tmp_path).pairs == ()
        return
    with pytest.raises(AttnimgError, match=rf"recipes/{file}\.toml") as caught:
        read_recipes(tmp_path)
    assert says in caught.value.why


@pytest.mark.parametrize("file", ["cuda.toml", "images/cpu.toml", "patches/flash-attn/cxx20.patch"])
def test_a_file_that_can_not_be_read_is_named(tmp_path: Path, file: str) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "recipes" / file).write_bytes(b"# caf\xe9\n")
    with pytest.raises(AttnimgError, match=f"recipes/{file} is not a valid recipe") as caught:
        read_recipes(tmp_path)
    assert "it is not UTF-8" in caught.value.why


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    with pytest.raises(AttnimgError, match=r"recipes/bases\.toml is not a valid recipe") as caught:
        read_recipes(tmp_path)
    assert caught.value.why == "No such file or directory"


def test_an_unresolved_value_keeps_its_reason() -> None:
    (image,) = read_image("rocm", (ROOT / "recipes/images/rocm.toml").read_text(encoding="utf-8"))
    assert image.size_max_mb == Unresolved("never built")


def test_a_frontier_line_makes_a_second_image() -> None:
    stable, frontier = read_image("x", IMAGE + 'frontier = "2.15.0"\n')
    assert (stable.name, frontier.name) == ("x", "x-frontier")
    assert (frontier.torch, frontier.archs) == ("2.15.0", stable.archs)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=f"{path.stem} is dated")
        for path in [
            *sorted((ROOT / "recipes/kernels").glob("*.toml")),
            *(ROOT / f"recipes/{name}.toml" for name in ("torch", "cuda", "pairs")),
        ]
    ],
)
def test_values_from_outside_have_a_source_and_its_date(path: Path) -> None:
    assert re.search(r"#.*\b2026-\d\d-\d\d\b", path.read_text(encoding="utf-8"))


def test_the_package_indexes_that_recipes_name_are_data() -> None:
    found = [
        (path.name, line.partition(" = ")[0])
        for path in sorted((ROOT / "recipes").rglob("*.*"))
        if path.suffix in {".toml", ".py"}
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"pypi\.org|download\.pytorch", line)
    ]
    # Of the CPU and of the ROCm build.
    assert found == [("torch.toml", "index")] * 2


BASE = {
    "name": "bookworm",
    "reference": "docker.io/library/python:3.11-slim-bookworm",
    "digest": "sha256:" + "0" * 64,
    "platforms": {"linux/amd64": "sha256:" + "1" * 64},
    "python": "3.11",
    "debian": "bookworm",
    "glibc": "2.36",
    "glibcxx": "3.4.30",
    "python_fixes_until": date(2027, 10, 31),
    "debian_fixes_until": date(2028, 6, 30),
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({}, [], id="a whole base"),
        pytest.param({"reference": "127.0.0.1:5000/python:3.11"}, [], id="a registry with a port"),
        pytest.param({"reference": "localhost:5000/a/b:1"}, [], id="this machine's registry"),
        pytest.param(
            {"reference": "python:3.11"}, ["reference: found 'python:3.11'"], id="no registry"
        ),
        pytest.param(
            {"reference": "docker.io/library/python"},
            ["reference: found 'docker.io/library/python', needed registry/name:tag"],
            id="no tag",
        ),
        pytest.param(
            {"reference": "docker.io/python:3.11@sha256:" + "0" * 64}, ["without a digest"],
            id="a digest in the reference",
        ),
        pytest.param({"digest": "latest"}, ["digest: found 'latest'"], id="a tag for a digest"),
        pytest.param({"digest": "0" * 64}, ["needed sha256: and 64"], id="no algorithm"),
        pytest.param(
            {"platforms": {"linux/arm64": "sha256:1"}}, ["platforms.linux/arm64: found 'sha256:1'"],
            id="half a digest of a platform",
        ),
    ],
)  # fmt: skip
def test_a_base_has_a_whole_reference_and_whole_digests(
    changes: dict[str, Any], says: list[str]
) -> None:
    faults = list(base_faults(Base(**{**BASE, **changes})))
    assert len(faults) == len(says)
    assert all(text in fault for text, fault in zip(says, faults, strict=True))


@pytest.mark.parametrize(
    ("name", "hashes", "says"),
    [
        pytest.param("torch-2.13.0+cpu-cp311-cp311-x.whl", ("0" * 64,), "", id="a CPU wheel"),
        pytest.param(
            "torch-2.13.0-cp311-cp311-x.whl", ("0" * 64,), "needed torch-2.13.0+cpu-...whl",
            id="the CUDA build",
        ),
        pytest.param("torch-2.13.0+cpu-cp311-x.whl", (), "found no hash", id="no hash"),
        pytest.param("torch-2.13.0+cpu-cp311-x.whl", ("12",), "64 hexadecimal", id="half a hash"),
    ],
)  # fmt: skip
def test_a_cpu_build_of_torch_has_hashes(name: str, hashes: tuple[str, ...], says: str) -> None:
    cpu = CpuBuild(index="https://example.com", wheels={name: hashes})
    torch = Torch(toolkit="13.0", cxx_standard=17, triton="3.7", python=">=3.10", cpu=cpu)
    faults = list(torch_faults("2.13.0", torch))
    assert bool(faults) is bool(says)
    assert all(says in fault for fault in faults)


def test_a_recipe_of_an_image_does_not_set_its_python() -> None:
    with pytest.raises(AttnimgError) as caught:
        read_image("x", 'python = "3.12"\n' + IMAGE)
    assert "python: it is that of the base, in recipes/bases.toml" in caught.value.why


def test_an_image_has_the_first_base_and_its_python() -> None:
    recipes = read_recipes(ROOT)
    first = next(iter(recipes.bases.values()))
    assert {image.base for image in recipes.images.values()} == {first.name}
    assert {image.python for image in recipes.images.values()} == {first.python}
