"""Kernels that came with the image: copied where FlashAttention-4 may write, or not used."""

from __future__ import annotations

import json
import math
import os
import platform
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnimg.errors import AttnimgError
from attnimg.facts import Arch, Machine
from attnimg.machine import fingerprint as probed
from attnimg.machine import kernel_cache
from attnimg.machine.fingerprint import RELEASE, cache_key, fingerprint
from attnimg.machine.kernel_cache import fa4_settings, variant_settings

ROOT = Path(__file__).parents[3]
ENTRY = Path("0123abcd") / "fwd" / "4567.o"
SM_90 = Arch(name="sm_90", vendor="nvidia", capability=(9, 0))
SM_100 = Arch(name="sm_100", vendor="nvidia", capability=(10, 0))
H100 = Machine(arch=SM_90, gpu="NVIDIA H100", driver="590.10")
RX7900 = Machine(arch=Arch(name="gfx1100", vendor="amd"), gpu="AMD Radeon RX 7900 XTX")
MI300X = Machine(arch=Arch(name="gfx942", vendor="amd"), gpu="AMD Instinct MI300X")
TRITON_ON = "FLASH_ATTENTION_TRITON_AMD_ENABLE"
NO_GPU = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="cpu")
BUILT = fingerprint()


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """The kernels of an image, of which nobody may change anything."""
    folder = tmp_path / "opt" / "fa4"
    entry = folder / "sm_90" / ENTRY
    entry.parent.mkdir(parents=True)
    entry.write_bytes(b"kernel")
    write_manifest(folder, BUILT)
    entry.chmod(0o444)
    for path in (entry.parent, entry.parents[1], entry.parents[2]):
        path.chmod(0o555)
    return folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernels go when the cache is no place for them."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def write_manifest(folder: Path, built: dict[str, str]) -> None:
    targets = {"sm_90": {"kernels": 1}}
    manifest = {"key": cache_key(built), "fingerprint": built, "targets": targets}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_they_are_copied_once_to_where_this_user_may_write(tmp_path: Path, shipped: Path) -> None:
    cache = {"ATTNIMG_CACHE": str(tmp_path / "cache")}
    settings = fa4_settings(H100, cache, shipped=shipped)
    assert settings["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    copy = Path(settings["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"])
    assert copy.is_relative_to(tmp_path / "cache")
    assert (copy / ENTRY).read_bytes() == b"kernel"
    for path in (copy, *copy.rglob("*")):
        assert path.stat().st_mode & stat.S_IWUSR, path
    added = copy / ENTRY.parent / "compiled-here.o"
    added.write_bytes(b"")
    assert fa4_settings(H100, cache, shipped=shipped) == settings
    assert added.exists(), "the second start left it as it was"


@pytest.mark.parametrize(
    ("machine", "environment", "built"),
    [
        pytest.param(NO_GPU, {}, BUILT, id="no GPU"),
        pytest.param(replace(H100, arch=SM_100), {}, BUILT, id="another GPU"),
        pytest.param(replace(H100, other_archs=("sm_80",)), {}, BUILT, id="GPUs that differ"),
        pytest.param(replace(H100, driver="575.51"), {}, BUILT, id="a driver of CUDA 12"),
        pytest.param(H100, {}, {**BUILT, "quack-kernels": "0.6.4"}, id="another quack"),
        pytest.param(H100, {}, {**BUILT, "python": "3.10"}, id="another Python"),
        pytest.param(H100, {}, {**BUILT, RELEASE: "3.11.999"}, id="another patch release"),
        pytest.param(
            H100, {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0"}, BUILT, id="a person's own choice"
        ),
        pytest.param(
            H100, {"FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "/x"}, BUILT, id="a person's own folder"
        ),
    ],
)  # fmt: skip
def test_nothing_is_set_or_said_or_written(
    tmp_path: Path,
    shipped: Path,
    capsys: pytest.CaptureFixture[str],
    machine: Machine,
    environment: dict[str, str],
    built: dict[str, str],
) -> None:
    write_manifest(shipped, built)
    environment = {**environment, "ATTNIMG_CACHE": str(tmp_path / "cache")}
    assert fa4_settings(machine, environment, shipped=shipped) == {}
    assert not (tmp_path / "cache").exists()
    assert capsys.readouterr() == ("", "")


def test_a_manifest_without_python_s_release_is_read(tmp_path: Path, shipped: Path) -> None:
    write_manifest(shipped, {name: BUILT[name] for name in BUILT if name != RELEASE})
    cache = {"ATTNIMG_CACHE": str(tmp_path / "cache")}
    assert "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR" in fa4_settings(H100, cache, shipped=shipped)


def test_a_fingerprint_has_python_s_release_in_full() -> None:
    assert platform.python_version().startswith(fingerprint()[RELEASE])
    assert fingerprint()[RELEASE].count(".") == 2


def test_an_image_without_such_kernels_changes_nothing(tmp_path: Path) -> None:
    assert fa4_settings(H100, {}, shipped=tmp_path / "nothing") == {}


def test_all_ranks_of_a_node_may_start_at_once(tmp_path: Path, shipped: Path) -> None:
    cache = {"ATTNIMG_CACHE": str(tmp_path / "cache")}
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(fa4_settings, H100, cache, shipped=shipped) for _ in range(64)]
        (settings,) = {tuple(one.result().items()) for one in asked}
    copy = Path(dict(settings)["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"])
    assert (copy / ENTRY).read_bytes() == b"kernel"
    assert list(copy.parent.iterdir()) == [copy], "nothing half made is left"


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("level", [0, 1, 2])
def test_another_user_s_folder_is_not_trusted(
    tmp_path: Path, shipped: Path, temporary: Path, level: int
) -> None:
    cache = {"ATTNIMG_CACHE": str(tmp_path / "cache")}
    first = fa4_settings(H100, cache, shipped=shipped)
    copy = Path(first["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"])
    os.chown((copy, *copy.parents)[level], 4321, 4321)
    second = fa4_settings(H100, cache, shipped=shipped)
    assert Path(second["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"]).is_relative_to(temporary)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_may_write_to_is_not_trusted(
    tmp_path: Path, shipped: Path, temporary: Path, level: int, mode: int
) -> None:
    cache = {"ATTNIMG_CACHE": str(tmp_path / "cache")}
    first = fa4_settings(H100, cache, shipped=shipped)
    copy = Path(first["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"])
    (copy, *copy.parents)[level].chmod(mode)
    second = fa4_settings(H100, cache, shipped=shipped)
    assert Path(second["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"]).is_relative_to(temporary)


def test_a_group_that_may_write_what_this_user_creates_changes_nothing(
    tmp_path: Path, shipped: Path
) -> None:
    before = os.umask(0o002)
    try:
        cache = {"ATTNIMG_CACHE": str(tmp_path / "cache")}
        first = fa4_settings(H100, cache, shipped=shipped)
        assert fa4_settings(H100, cache, shipped=shipped) == first
    finally:
        os.umask(before)
    copy = Path(first["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"])
    assert copy.is_relative_to(tmp_path / "cache")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (copy, *copy.parents[:2])} == {0o700}


def test_without_a_place_for_them_it_says_so(
    tmp_path: Path, shipped: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where a folder would be")
    temporary.rmdir()
    temporary.write_text("another")
    cache = {"ATTNIMG_CACHE": str(tmp_path / "cache")}
    assert fa4_settings(H100, cache, shipped=shipped) == {}
    assert "compiles its kernels again" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "a"}'])
def test_a_manifest_that_can_not_be_read_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(AttnimgError, match="manifest"):
        fa4_settings(H100, {}, shipped=tmp_path)


def test_kinds_of_cpu_have_a_folder_each(tmp_path: Path) -> None:
    names = set()
    for flags in ("flags : sse2 avx", "flags : sse2 avx avx512f", "flags : avx sse2"):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
        names.add(kernel_cache._hash_cpu_features(tmp_path / "cpuinfo"))
    names.add(kernel_cache._hash_cpu_features(tmp_path / "nothing"))
    assert len(names) == 3


def test_a_fingerprint_tells_every_change_of_flashattention_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cute = tmp_path / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    changes: list[Any] = [
        lambda: (cute / "__init__.py").write_text(""),
        lambda: (cute / "__init__.py").write_text("x = 1"),
        lambda: (cute / "more.py").write_text(""),
        lambda: (cute / "more.py").rename(cute / "less.py"),
    ]
    keys = {cache_key(fingerprint())}
    for change in changes:
        change()
        keys.add(cache_key(fingerprint()))
    assert len(keys) == len(changes) + 1
    monkeypatch.setattr(probed, "PACKAGES", ("pytest",))
    assert fingerprint()["pytest"] == pytest.__version__


@pytest.mark.parametrize(
    ("machine", "environment", "settings", "said"),
    [
        pytest.param(RX7900, {}, {TRITON_ON: "TRUE"}, "", id="RDNA runs Triton"),
        pytest.param(MI300X, {}, {TRITON_ON: "FALSE"}, "", id="CDNA runs CK"),
        pytest.param(RX7900, {TRITON_ON: "TRUE"}, {}, "", id="who says the same is left alone"),
        pytest.param(RX7900, {TRITON_ON: "FALSE"}, {}, "Triton kernels: unset", id="off on RDNA"),
        pytest.param(MI300X, {TRITON_ON: "TRUE"}, {}, "its CK kernels: unset", id="TRUE on CDNA"),
        pytest.param(MI300X, {TRITON_ON: "0"}, {}, "", id="whatever else is off"),
        pytest.param(replace(RX7900, arch=Arch(name="gfx906", vendor="amd")), {}, {}, "",
                     id="flash-attn has none for it"),
    ],
)  # fmt: skip
def test_an_amd_gpu_gets_the_variable_that_chooses_its_kernels(
    machine: Machine,
    environment: dict[str, str],
    settings: dict[str, str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert variant_settings(machine, environment) == settings
    found = capsys.readouterr().err
    assert said in found if said else not found


def records_of_builds() -> list[tuple[str, str, dict[str, Any]]]:
    """List what docs/built says of each image and target: how many kernels, bytes and seconds."""
    return [
        (path.stem.removeprefix("fa4-cache-"), device, target)
        for path in sorted((ROOT / "docs/built").glob("fa4-cache-*.json"))
        for device, target in json.loads(path.read_text())["targets"].items()
    ]


def test_a_record_is_of_the_set_that_the_recipe_asks_for_today() -> None:
    records = records_of_builds()
    assert records, "no set was ever built"
    for image, device, target in records:
        asked = json.loads((ROOT / f"docker/images/{image}/fa4_kernels.json").read_text())
        per_shape = math.prod(len(asked[axis]) for axis in ("dtypes", "varlen", "gradient"))
        shapes = asked["targets"][device]["shapes"]
        assert target["calls"] == per_shape * len(shapes), device
        assert target["left_out"] == asked["targets"][device]["left_out"], device


def test_a_set_stays_within_its_limits() -> None:
    for _, device, target in records_of_builds():
        assert target["bytes"] <= 60e6, device
        assert target["cpu_s"] <= 30 * 60, device


def test_people_read_the_figures_of_the_records() -> None:
    page = (ROOT / "docs/precompiled-kernels.md").read_text()
    figures = (ROOT / "docs/figures.md").read_text()
    for _, device, target in records_of_builds():
        size, seconds = f"{target['bytes'] / 1e6:.1f}", target["cpu_s"]
        assert f"| {device} | {target['kernels']} | {size} | {seconds} |" in page
        if device == "sm_90":
            assert f"FlashAttention-4: {target['kernels']} kernels for sm_90" in figures
            assert f"| {seconds} s of CPU, {target['bytes'] / 1e6:.0f} MB" in figures
