"""Proofs are kept on the disk, for as long as nothing that they depend on changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from run_facts import a_geometry

from attnimg.facts import Arch, Figure, LocalKernel, Machine, Proof, Reason
from attnimg.prove import cache
from attnimg.prove.runner import Candidate

CPU = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="cpu", driver="1")
GEOMETRY = a_geometry(heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16)
CANDIDATE = Candidate(backend="sdpa", geometries=(GEOMETRY,))
FIGURE = Figure(quantity="dq", error=1e-7, allowed=1e-6, case="17 tokens")
PROOF = Proof(backend="sdpa", reasons=(), figures=(FIGURE,), cases=3, longest=64, seconds=0.5)


def key(candidate: Candidate = CANDIDATE, **changes: object) -> str:
    values = {"machine": CPU, "versions": {"torch": "2.13.0"}, "local": None, "variables": {}}
    values |= changes
    return cache.key_of(candidate, **values)  # type: ignore[arg-type]


def silent(text: str) -> None:
    pytest.fail(f"said {text}")


def test_a_proof_comes_back_as_it_was(tmp_path: Path) -> None:
    cache.write(tmp_path / "new", "k", PROOF, say=silent)
    assert cache.read(tmp_path / "new", "k", say=silent) == replace(PROOF, cached=True)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["k.json"]


def test_a_failed_proof_is_kept_too(tmp_path: Path) -> None:
    failed = replace(PROOF, reasons=(Reason(code="zeros", text="all of it"),))
    cache.write(tmp_path, "k", failed, say=silent)
    assert cache.read(tmp_path, "k", say=silent) == replace(failed, cached=True)


@pytest.mark.parametrize("code", ["timeout", "crash", "oom", "import-error"])
def test_what_may_pass_by_itself_is_not_kept(tmp_path: Path, code: str) -> None:
    cache.write(tmp_path, "k", replace(PROOF, reasons=(Reason(code=code, text="."),)), say=silent)
    assert cache.read(tmp_path, "k", say=silent) is None


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b"\xff\xfe", id="not text"),
        pytest.param(b"[1]", id="another kind of JSON"),
        pytest.param(b'{"backend": "sdpa"}', id="fields missing"),
        pytest.param(b'{"reasons": [], "figures": [], "x": 1}', id="fields unknown"),
    ],
)
def test_a_damaged_file_is_ignored_with_a_note(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "k.json").write_bytes(damage)
    said: list[str] = []
    assert cache.read(tmp_path, "k", say=said.append) is None
    assert len(said) == 1
    assert "proving again" in said[0]


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    cache.write(tmp_path / "file" / "folder", "k", PROOF, say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"machine": replace(CPU, driver="2")}, id="driver"),
        pytest.param({"machine": replace(CPU, gpu="NVIDIA L4")}, id="GPU"),
        pytest.param({"versions": {"torch": "2.14.0"}}, id="a library's version"),
        pytest.param({"candidate": replace(CANDIDATE, backend="eager")}, id="backend"),
        pytest.param(
            {"candidate": replace(CANDIDATE, geometries=(replace(GEOMETRY, heads=8),))},
            id="geometry",
        ),
        pytest.param({"variables": {"FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE"}}, id="variable"),
    ],
)
def test_a_change_asks_for_a_new_proof(changes: dict[str, object]) -> None:
    assert key(**changes) != key()
    assert key() == key()


def test_a_changed_file_of_a_local_kernel_asks_for_a_new_proof(tmp_path: Path) -> None:
    file = tmp_path / "__init__.py"
    file.write_text("right")
    local = LocalKernel(
        repo="a/b", path=str(tmp_path), vendor="cpu", version="1", exports=frozenset()
    )
    before = key(local=local)
    file.write_text("wrong")
    assert key(local=local) != before


@pytest.mark.parametrize("named", [True, False], ids=["ATTNIMG_CACHE", "the user's folder"])
def test_the_folder(tmp_path: Path, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    environment = {"ATTNIMG_CACHE": str(tmp_path / "named")} if named else {}
    wanted = tmp_path / "named/proofs" if named else tmp_path / "home/attnimg/proofs"
    assert cache.cache_folder(environment) == wanted
