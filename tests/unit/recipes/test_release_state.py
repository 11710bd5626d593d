"""What a release believes of the files of its earlier steps: its record, and the gates' result."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from test_release import DIGEST, FINDING, LABELS, LOCAL, PASSED, PLAN, RECIPES, RECORD, REMOTE

from attnimg.errors import AttnimgError
from recipes.files import write_all
from recipes.release import command, steps
from recipes.release.gates_result import gates_result_path, read_gates_result
from recipes.release.publishable import refuse_fewer_tests
from recipes.release.record import (
    RECORDED,
    STEPS,
    Record,
    needed_record,
    read_record,
    record_path,
    write_record,
)
from recipes.release.repository import Repository, parse_repository, read_registry
from recipes.release.steps import Release
from recipes.run_gates import GateResult, checked_by, evidence, sha256_of

ROOT = Path(__file__).parents[3]
OTHER = f"sha256:{'b' * 64}"


def done(record: Record, *names: str) -> Record:
    for name in names:
        record = record.done(name, seconds=1.25)  # type: ignore[arg-type]
    return record


# ---- the record ---------------------------------------------------------------------------------


def test_a_whole_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    whole = done(
        replace(RECORD, tests="tests/image", tags={"cpu": DIGEST}, labels={**LABELS, "é": "ü"}),
        *RECORDED,
    )
    assert read_record("cpu", LOCAL, tmp_path) is None
    write_record(whole, tmp_path)
    assert read_record("cpu", LOCAL, tmp_path) == whole


WRONG_RECORDS: dict[str, dict[str, Any]] = {
    "steps is a text": {"steps": "push"},
    "steps is null": {"steps": None},
    "a step that is none": {"steps": {"publish": {"done": "2026-11-27T00:00:00Z", "seconds": 1}}},
    "a step without a time": {"steps": {"push": {}}},
    "bytes is a text": {"bytes": "abc"},
    "bytes as a text": {"bytes": "1"},
    "bytes below zero": {"bytes": -1},
    "tags is null": {"tags": None},
    "a tag without a digest": {"tags": {"cpu": "x"}},
    "the image is a path": {"image": "../../../x"},
    "another image": {"image": "hopper"},
    "the registry is null": {"registry": None},
    "no registry": {"registry": "https://x"},
    "a registry elsewhere": {"registry": REMOTE.registry},
    "layers is a number": {"layers": 1},
    "a layer is a text": {"layers": ["x"]},
    "no digest": {"digest": "latest"},
    "another reference": {"reference": LOCAL.at(OTHER)},
    "no time": {"started": "yesterday"},
    "an unknown key": {"sings": 1},
}


@pytest.mark.parametrize("wrong", WRONG_RECORDS.values(), ids=WRONG_RECORDS)
def test_a_record_with_a_wrong_value_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    text = json.dumps({**asdict(RECORD), **wrong})
    refused(tmp_path, lambda path: path.write_text(text))


@pytest.mark.parametrize(
    "content",
    [b"", b" \n", b"{", b"[]", b"null", b"1", b'{"image": "cpu"}', b"\xff\xfe\x00", b"[" * 100_000],
    ids=["empty", "blank", "cut", "list", "null", "number", "keys", "binary", "deep"],
)
def test_a_damaged_record_is_refused(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path, lambda path: path.write_bytes(content))


def test_a_folder_or_a_loop_in_the_place_of_a_record_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "folder", lambda path: path.mkdir())
    refused(tmp_path / "loop", lambda path: path.symlink_to(path))


def refused(root: Path, write: Callable[[Path], object]) -> None:
    path = root / record_path("cpu", LOCAL)
    path.parent.mkdir(parents=True)
    write(path)
    with pytest.raises(AttnimgError, match="is not a record of a release") as caught:
        read_record("cpu", LOCAL, root)
    assert caught.value.code == "bad-record"
    assert caught.value.why
    assert caught.value.do == f"remove it (rm -r {path}), then make release/cpu"


# ---- the order of the steps ---------------------------------------------------------------------


@pytest.mark.parametrize("left_out", list(RECORDED)[:-1])
def test_a_step_needs_all_earlier_ones_and_names_the_first_that_is_missing(
    tmp_path: Path, left_out: str
) -> None:
    earlier = [step for step in RECORDED if step != "promote"]
    whole = done(RECORD, *earlier)
    write_record(whole, tmp_path)
    assert needed_record("cpu", LOCAL, tmp_path, after="verify") == whole
    kept = {step: value for step, value in whole.steps.items() if step != left_out}
    write_record(replace(whole, steps=kept), tmp_path)
    with pytest.raises(AttnimgError, match="has not reached this step") as caught:
        needed_record("cpu", LOCAL, tmp_path, after="verify")
    assert caught.value.do == f"make {RECORDED[left_out]}/cpu"


def test_every_step_of_the_record_has_a_target_that_records_it() -> None:
    assert tuple(RECORDED) == STEPS[2:]
    makefile = (ROOT / "Makefile").read_text()
    for step, target in RECORDED.items():
        recipe = makefile.partition(f"\n{target}/%:")[2].partition("\n\n")[0]
        assert f"release $* --step {step}" in recipe


@pytest.mark.parametrize("again", list(RECORDED))
def test_a_step_that_is_done_again_undoes_the_later_ones(again: str) -> None:
    record = done(done(RECORD, *RECORDED), again)
    assert list(record.steps) == list(RECORDED)[: list(RECORDED).index(again) + 1]


def make_job(root: Path, repository: Repository = REMOTE, *, rehearsal: bool = False) -> Release:
    return Release(
        plan=PLAN, recipes=RECIPES, registry=read_registry(ROOT), repository=repository, root=root,
        rehearsal=rehearsal,
    )  # fmt: skip


def test_an_image_that_not_all_tests_passed_is_not_promoted(tmp_path: Path) -> None:
    at_remote = replace(RECORD, registry=REMOTE.registry, reference=REMOTE.at(DIGEST))
    untested = replace(done(at_remote, "push", "attest", "verify"), rehearsal=())
    write_record(untested, tmp_path)
    with pytest.raises(AttnimgError, match="has not reached this step") as caught:
        steps.promote(make_job(tmp_path))
    assert caught.value.do == "make tested/cpu"
    for tests in ("", "tests/image/test_running.py -k doctor"):
        record = replace(done(at_remote, *list(RECORDED)[:-1]), tests=tests)
        write_record(record, tmp_path)
        with pytest.raises(AttnimgError, match="runs all tests of the image") as caught:
            steps.promote(make_job(tmp_path))
        assert caught.value.code == "fewer-tests"
    refuse_fewer_tests("tests/image", name="cpu", rehearsal=False)
    refuse_fewer_tests("tests/image/test_running.py", name="cpu", rehearsal=True)


# ---- the gates' result --------------------------------------------------------------------------


def write_gates_result(root: Path, **values: Any) -> None:
    for kind, path in evidence("cpu").items():
        write_all(root, {path: f"{kind}\n"})
    files = {kind: sha256_of(root / path) for kind, path in evidence("cpu").items()}
    gates_result = replace(PASSED, checked_by=checked_by(root), evidence=files)
    write_all(root, {gates_result_path("cpu"): json.dumps({**asdict(gates_result), **values})})


def test_the_result_of_the_gates_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_gates_result("cpu", tmp_path) is None
    found = GateResult(
        gate="pins", findings=(FINDING,), allowed=((FINDING, "a reason"),), own=(FINDING,)
    )
    write_gates_result(tmp_path, evidence={}, checked_by="x", gates=[asdict(found)])
    assert read_gates_result("cpu", tmp_path) == replace(PASSED, checked_by="x", gates=(found,))


@pytest.mark.parametrize(
    "content",
    [b"", b" ", b"{", b"[]", b"null", b'{"gates": []}', b"\xff\xfe"],
    ids=["empty", "blank", "cut", "list", "null", "keys", "binary"],
)
def test_a_damaged_result_of_the_gates_is_reported_and_written_again(
    tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / gates_result_path("cpu")
    path.parent.mkdir()
    path.write_bytes(content)
    assert read_gates_result("cpu", tmp_path) is None
    assert f"{path} is not a result of the gates: " in capfd.readouterr().err
    write_gates_result(tmp_path)
    assert read_gates_result("cpu", tmp_path) is not None


@pytest.mark.parametrize(
    "wrong",
    [{"passed": "yes"}, {"gates": None}, {"gates": [{}]}, {"digest": "x"}, {"kind": "wheels"}],
    ids=str,
)
def test_a_result_of_the_gates_with_a_wrong_value_is_none(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    write_gates_result(tmp_path, **wrong)
    assert read_gates_result("cpu", tmp_path) is None


def test_only_statements_about_the_pushed_image_are_signed(tmp_path: Path) -> None:
    job = make_job(tmp_path, LOCAL, rehearsal=True)
    tested = done(RECORD, "push", "test")
    write_record(tested, tmp_path)

    def fault() -> str:
        with pytest.raises(AttnimgError, match="are not about the image") as caught:
            steps.attest(job)
        assert caught.value.code == "not-checked"
        assert "make gate/cpu" in caught.value.do
        return caught.value.why

    assert "found no result of the gates" in fault()
    write_gates_result(tmp_path, digest=OTHER)
    assert f"found the result of {OTHER}" in fault()
    write_gates_result(tmp_path, image_id=OTHER)
    assert "found the result of" in fault()
    write_gates_result(tmp_path)
    (tmp_path / evidence("cpu")["cyclonedx"]).write_text("the SBOM of another image")
    assert "changed after the gates wrote them" in fault()
    write_gates_result(tmp_path, checked_by="other gates")
    assert "changed after the gates wrote them" in fault()
    write_gates_result(tmp_path)
    steps.refuse_other_evidence(job, tested)


EXPIRED = replace(
    RECIPES, cves=tuple(replace(cve, expires=date(2020, 1, 1)) for cve in RECIPES.cves)
)


def test_an_answer_that_has_expired_when_it_is_signed_is_refused(tmp_path: Path) -> None:
    write_record(done(RECORD, "push", "test"), tmp_path)
    write_gates_result(tmp_path)
    job = replace(make_job(tmp_path, LOCAL, rehearsal=True), recipes=EXPIRED)
    with pytest.raises(AttnimgError, match="is not in force") as caught:
        steps.attest(job)
    assert caught.value.code == "expired-cve"


def test_an_answer_that_expires_before_the_tags_are_set_is_refused(tmp_path: Path) -> None:
    write_record(replace(done(RECORD, "push", "test", "attest", "verify"), tests="x"), tmp_path)
    job = replace(make_job(tmp_path, repository=LOCAL), recipes=EXPIRED)
    with pytest.raises(AttnimgError, match="is not in force") as caught:
        steps.promote(job)
    assert caught.value.code == "expired-cve"
    assert "expired on 2020-01-01" in caught.value.why


def test_the_commit_is_that_of_the_checkout_and_not_of_a_repository_around_it(
    tmp_path: Path,
) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        command = ["git", *who, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    inside = tmp_path / "unpacked"
    inside.mkdir()
    (inside / "file").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert steps.head_commit(tmp_path) == commit
    assert steps.head_commit(inside) == "0" * 40
    (inside / "file").write_text("2")
    assert steps.head_commit(tmp_path) == f"{commit}-dirty"


# ---- the digest and the tag that a person writes ------------------------------------------------


@pytest.mark.parametrize("digest", ["", "abc", "cpu", "sha256:abc", f"sha256:{'A' * 64}"])
def test_a_wrong_digest_is_never_taken_for_a_tag(tmp_path: Path, digest: str) -> None:
    with pytest.raises(AttnimgError, match="the digest can't be read") as caught:
        command.verify("hopper", digest, root=tmp_path, env={})
    assert caught.value.code == "bad-reference"
    assert "build/release/hopper.json has it" in caught.value.do
    (page,) = re.findall(r"docs/\S+[.]md", caught.value.do)
    assert "<!-- published:" in (ROOT / page).read_text()
    command.refuse_no_digest(DIGEST, name="cpu")


@pytest.mark.parametrize("tag", ["", "-x", "a b", "a" * 129, DIGEST])
def test_what_can_t_be_a_tag_is_refused(tag: str) -> None:
    with pytest.raises(AttnimgError, match="the tag can't be read") as caught:
        command.verify("cpu", None, tag=tag, root=ROOT, env={"REGISTRY": LOCAL.registry})
    assert caught.value.code == "bad-reference"


@pytest.mark.parametrize("which", [{"digest": DIGEST}, {"digest": None, "tag": "cpu"}], ids=str)
def test_the_key_is_checked_before_a_registry_is_asked(
    which: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "skopeo").write_text("#!/bin/sh\ntouch $0.ran; echo no such host >&2; exit 1\n")
    (tmp_path / "skopeo").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    key = tmp_path / "cosign.pub"
    env = {"REGISTRY": REMOTE.registry, "COSIGN_PUBLIC_KEY": str(key)}
    with pytest.raises(AttnimgError) as caught:
        command.verify("cpu", **which, root=ROOT, env=env)
    assert caught.value.code == "no-key"
    key.write_text("-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\n")
    with pytest.raises(AttnimgError) as caught:
        command.verify("cpu", **which, root=ROOT, env=env)
    assert caught.value.code == "bad-key"
    assert not (tmp_path / "skopeo.ran").exists()
    key.write_text("-----BEGIN PUBLIC KEY-----\n")
    with pytest.raises(AttnimgError, match="can't be reached") as caught:
        command.verify("cpu", **which, root=ROOT, env=env)
    assert (tmp_path / "skopeo.ran").exists()
    # Nobody releases anything here, and nothing continues.
    assert "continues" not in caught.value.do
    assert "push" not in caught.value.do


def test_a_verification_without_a_name_tells_both_ways_to_name_an_image(tmp_path: Path) -> None:
    at_remote = replace(RECORD, registry=REMOTE.registry, reference=REMOTE.at(DIGEST))
    elsewhere = replace(make_job(tmp_path, REMOTE), repository=parse_repository("example.com/x"))
    for record, job, own in (
        (None, make_job(tmp_path), "make push/cpu"),
        (done(at_remote, "push"), make_job(tmp_path), "make tested/cpu"),
        (done(at_remote, *RECORDED), elsewhere, f"set REGISTRY={REMOTE.registry}"),
    ):
        if record:
            write_record(record, tmp_path)
        with pytest.raises(AttnimgError, match="no image to verify is named") as caught:
            steps.verify(job)
        assert "make verify/cpu TAG=cpu, or DIGEST=sha256:..." in caught.value.do
        assert own in caught.value.do


def test_a_whole_release_checks_its_key_before_it_builds(tmp_path: Path) -> None:
    env = {"REGISTRY": LOCAL.registry, "REHEARSAL": "1", "COSIGN_KEY": str(tmp_path / "gone.key")}
    with pytest.raises(AttnimgError, match="does not name a key") as caught:
        command.release(PLAN, RECIPES, step=None, root=ROOT, env=env)
    assert caught.value.code == "no-key"
