"""Triton's entries that came with the image: copied into its cache, those that are not there."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from attnimg.facts import Arch, Machine
from attnimg.machine.kernel_cache import triton_settings

SM_90 = Arch(name="sm_90", vendor="nvidia", capability=(9, 0))
H100 = Machine(arch=SM_90, gpu="NVIDIA H100", driver="590.10")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image's entries; what has no place goes below tmp/."""
    for device in ("sm_90", "sm_80"):
        entry = tmp_path / "opt" / device / f"KEY{device}"
        entry.mkdir(parents=True)
        (entry / "k.cubin").write_bytes(b"code")
        (entry / "k.json").write_text("{}")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path / "opt"


def test_a_group_names_the_files_where_they_were_copied(tmp_path: Path, shipped: Path) -> None:
    cache = tmp_path / "cache"
    assert triton_settings(H100, {"TRITON_CACHE_DIR": str(cache)}, shipped=shipped) == {}
    named = json.loads((cache / "KEYsm_90" / "__grp__k.json").read_text())["child_paths"]
    assert {name: Path(path).read_bytes() for name, path in named.items()} == {
        "k.cubin": b"code", "k.json": b"{}",
    }  # fmt: skip
    assert not (cache / "KEYsm_80").exists(), "another GPU's"


def test_what_triton_compiled_there_stays(tmp_path: Path, shipped: Path) -> None:
    own = tmp_path / "cache" / "KEYsm_90"
    own.mkdir(parents=True)
    (own / "k.cubin").write_bytes(b"its own")
    (own / "__grp__k.json").write_text(json.dumps({"child_paths": {"k": str(own / "k.cubin")}}))
    triton_settings(H100, {"TRITON_CACHE_DIR": str(tmp_path / "cache")}, shipped=shipped)
    assert (own / "k.cubin").read_bytes() == b"its own"


def test_a_cache_that_was_moved_is_mended(tmp_path: Path, shipped: Path) -> None:
    triton_settings(H100, {"TRITON_CACHE_DIR": str(tmp_path / "old")}, shipped=shipped)
    (tmp_path / "old").rename(tmp_path / "new")
    triton_settings(H100, {"TRITON_CACHE_DIR": str(tmp_path / "new")}, shipped=shipped)
    group = json.loads((tmp_path / "new" / "KEYsm_90" / "__grp__k.json").read_text())
    assert all(Path(path).exists() for path in group["child_paths"].values())


def test_a_relative_cache_is_named_from_the_root(
    tmp_path: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    triton_settings(H100, {"TRITON_CACHE_DIR": "cache"}, shipped=shipped)
    group = json.loads((tmp_path / "cache" / "KEYsm_90" / "__grp__k.json").read_text())
    assert all(Path(path).is_absolute() for path in group["child_paths"].values())


def test_no_temporary_folder_is_needed(
    tmp_path: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError("no usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    cache = tmp_path / "cache"
    assert triton_settings(H100, {"TRITON_CACHE_DIR": str(cache)}, shipped=shipped) == {}
    assert (cache / "KEYsm_90").exists()
    cache = tmp_path / "file"
    cache.write_text("a file where a folder would be")
    assert triton_settings(H100, {"TRITON_CACHE_DIR": str(cache)}, shipped=shipped) == {}


def test_a_temporary_folder_that_others_may_write_is_not_used(
    tmp_path: Path, shipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("a file where a folder would be")
    own = tmp_path / "tmp" / f"attnimg-triton-{os.getuid()}"
    own.mkdir()
    own.chmod(0o777)
    assert (
        triton_settings(H100, {"TRITON_CACHE_DIR": str(tmp_path / "file")}, shipped=shipped) == {}
    )
    assert not any(own.iterdir())
    assert "compiles its kernels again" in capsys.readouterr().err


def test_all_ranks_of_a_node_may_start_at_once(tmp_path: Path, shipped: Path) -> None:
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(triton_settings, H100, cache, shipped=shipped) for _ in range(64)]
        assert all(one.result() == {} for one in asked)
    left = sorted(path.name for path in (tmp_path / "cache" / "KEYsm_90").iterdir())
    assert left == ["__grp__k.json", "k.cubin", "k.json"], "nothing half made is left"


def test_a_cache_that_can_not_be_written_is_another_with_one_note(
    tmp_path: Path, shipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where a folder would be")
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    settings = triton_settings(H100, cache, shipped=shipped)
    own = tmp_path / "tmp" / f"attnimg-triton-{os.getuid()}"
    assert settings == {"TRITON_CACHE_DIR": str(own)}
    assert (own / "KEYsm_90" / "k.cubin").exists()
    assert capsys.readouterr().err.count("attnimg: ") == 1
