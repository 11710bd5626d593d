"""Proofs are kept on the disk, for as long as nothing that they depend on changes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from run_facts import a_geometry

from attnimg.facts import Arch, Machine
from attnimg.files import write_private
from attnimg.run_facts import Figure, Proof, Reason
from attnimg.verification import proofs as cache
from attnimg.verification.runner import Candidate

CPU = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="cpu", driver="1")
GEOMETRY = a_geometry(heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16)
CANDIDATE = Candidate(backend="sdpa", geometries=(GEOMETRY,))
FIGURE = Figure(quantity="dq", error=1e-7, allowed=1e-6, case="17 tokens")
PROOF = Proof(backend="sdpa", reasons=(), figures=(FIGURE,), cases=3, longest=64, seconds=0.5)


def key(candidate: Candidate = CANDIDATE, **changes: object) -> str:
    values = {"machine": CPU, "versions": {"torch": "2.13.0"}, "content": {}, "variables": {}}
    values |= changes
    return cache.proof_key(candidate, **values)  # type: ignore[arg-type]


def silent(text: str) -> None:
    pytest.fail(f"said {text}")


def test_a_proof_comes_back_as_it_was(tmp_path: Path) -> None:
    cache.write(tmp_path / "new", "k", PROOF, log=silent)
    assert cache.read(tmp_path / "new", "k", name="sdpa", has_bounds=True, log=silent) == replace(
        PROOF, cached=True
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["k.json"]


def test_a_failed_proof_is_kept_too(tmp_path: Path) -> None:
    failed = replace(PROOF, reasons=(Reason(code="zeros", text="all of it"),))
    cache.write(tmp_path, "k", failed, log=silent)
    assert cache.read(tmp_path, "k", name="sdpa", has_bounds=True, log=silent) == replace(
        failed, cached=True
    )


@pytest.mark.parametrize("code", ["timeout", "crash", "oom", "import-error"])
def test_what_may_pass_by_itself_is_not_kept(tmp_path: Path, code: str) -> None:
    cache.write(tmp_path, "k", replace(PROOF, reasons=(Reason(code=code, text="."),)), log=silent)
    assert cache.read(tmp_path, "k", name="sdpa", has_bounds=True, log=silent) is None


def checked(content: object) -> bytes:
    """Return JSON with its own hash."""
    text = json.dumps(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"sha256": digest, "content": text}).encode()


def kept(key: str = "k", **changes: object) -> bytes:
    """Return the file of PROOF with other values in it, and the hash of these."""
    return checked({"key": key, "proof": {**asdict(PROOF), **changes}})


def figure(**changes: object) -> list[dict[str, object]]:
    return [{**asdict(FIGURE), **changes}]


def test_the_file_that_the_damages_start_from_is_read(tmp_path: Path) -> None:
    write_private(tmp_path / "own" / "k.json", kept())
    found = cache.read(tmp_path / "own", "k", name="sdpa", has_bounds=True, log=silent)
    assert found == replace(PROOF, cached=True)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b"\xff\xfe", id="not text"),
        pytest.param(b"[1]", id="another kind of JSON"),
        pytest.param(b"[" * 10**5, id="deep"),
        pytest.param(checked({"key": "k", "proof": {"backend": "sdpa"}}), id="fields missing"),
        pytest.param(kept(x=1), id="fields unknown"),
        pytest.param(checked(asdict(PROOF)), id="no key"),
        pytest.param(kept("other"), id="another key"),
        pytest.param(checked([1]), id="a list"),
        pytest.param(json.dumps({"key": "k", "proof": asdict(PROOF)}).encode(), id="no hash"),
        pytest.param(kept().replace(b"1e-07", b"2e-07"), id="an edited error within its bound"),
        pytest.param(kept().replace(b"17 tokens", b"18 tokens"), id="an edited text"),
        pytest.param(kept(backend="eager"), id="another backend"),
        pytest.param(kept(cases="x"), id="cases in words"),
        pytest.param(kept(cases=True), id="cases true"),
        pytest.param(kept(cases=0), id="no cases"),
        pytest.param(kept(figures=[]), id="no figures"),
        pytest.param(kept(figures=figure(error=2e-6)), id="beyond its bound"),
        pytest.param(kept(figures=figure(error=float("nan"))), id="an error that is no number"),
        pytest.param(kept(figures=figure(error="1e-7")), id="an error in words"),
        pytest.param(kept(figures=figure(allowed=float("inf"))), id="without a bound"),
        pytest.param(kept(figures=figure(case=3)), id="a case that is no text"),
        pytest.param(kept(reasons=[{"code": 1, "text": "x"}]), id="a code that is no text"),
        pytest.param(kept(note=["x"]), id="a note that is no text"),
        pytest.param(kept(seconds="x"), id="seconds in words"),
        pytest.param(kept(note="x" * 2**20), id="long"),
    ],
)
def test_a_damaged_file_is_ignored_with_a_note(tmp_path: Path, damage: bytes) -> None:
    folder = tmp_path / "own"
    write_private(folder / "k.json", damage)
    said: list[str] = []
    assert cache.read(folder, "k", name="sdpa", has_bounds=True, log=said.append) is None
    assert len(said) == 1
    assert "proving again" in said[0]
    cache.write(folder, "k", PROOF, log=silent)
    assert cache.read(folder, "k", name="sdpa", has_bounds=True, log=silent) == replace(
        PROOF, cached=True
    )


def test_a_backend_that_quantizes_may_have_figures_without_a_bound(tmp_path: Path) -> None:
    exact = Figure(quantity="dq", error=-math.inf, allowed=math.inf, case="17 tokens")
    proof = replace(PROOF, backend="sage", figures=(FIGURE, exact))
    cache.write(tmp_path / "own", "k", proof, log=silent)
    found = cache.read(tmp_path / "own", "k", name="sage", has_bounds=False, log=silent)
    assert found == replace(proof, cached=True)


def _link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


NOT_OWN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file writable by others": (lambda path: path.chmod(0o666), "other users may write to it"),
    "a file writable by the group": (lambda path: path.chmod(0o620), "other users may write to it"),
    "a folder writable by others": (lambda path: path.parent.chmod(0o777), "other users may write"),
    "a link": (_link, "symbolic link"),
    "a pipe": (_pipe, "not a regular file"),
}
if os.geteuid() == 0:
    NOT_OWN |= {
        "another user's file": (lambda path: os.chown(path, 12345, -1), "belongs to user 12345"),
        "another user's folder": (
            lambda path: os.chown(path.parent, 12345, -1), "belongs to user 12345",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", NOT_OWN)
def test_a_file_that_others_could_have_written_is_ignored_with_a_note(
    tmp_path: Path, kind: str
) -> None:
    change, why = NOT_OWN[kind]
    cache.write(tmp_path / "own", "k", PROOF, log=silent)
    change(tmp_path / "own" / "k.json")
    said: list[str] = []
    assert cache.read(tmp_path / "own", "k", name="sdpa", has_bounds=True, log=said.append) is None
    assert len(said) == 1
    assert why in said[0]


def test_what_is_kept_is_this_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        cache.write(tmp_path / "own", "k", PROOF, log=silent)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "own" / "k.json").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_a_folder_that_another_user_made_beforehand_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    os.chown(tmp_path / "own", 12345, -1)
    said: list[str] = []
    cache.write(tmp_path / "own", "k", PROOF, log=said.append)
    assert list((tmp_path / "own").iterdir()) == []
    assert "belongs to user 12345" in said[0]


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    cache.write(tmp_path / "file" / "folder", "k", PROOF, log=said.append)
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
        pytest.param({"content": {"kernel": "00"}}, id="the content of a kernel"),
        pytest.param({"variables": {"FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE"}}, id="variable"),
    ],
)
def test_a_change_asks_for_a_new_proof(changes: dict[str, object]) -> None:
    assert key(**changes) != key()
    assert key() == key()
