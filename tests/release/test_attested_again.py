"""What is attested again is verified again, and what is the same is not signed twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import MOMENT, PLAN, RECIPES, REVISION, ROOT, LocalRegistry, MakeSmall

from recipes.files import write_all
from recipes.gates import gate_names
from recipes.release import steps, transfer
from recipes.release.gates_result import GatesResult, gates_result_path
from recipes.release.record import Record, read_record, write_record
from recipes.release.repository import read_registry
from recipes.run_gates import GateResult, checked_by, evidence, sha256_of


def write_gates_result(root: Path, *, digest: str, image_id: str) -> None:
    """Write the result of gates that passed the files which are in dist/."""
    files = {kind: sha256_of(root / path) for kind, path in evidence("cpu").items()}
    gates_result = GatesResult(
        image="cpu", source="build/cpu.tar", kind="image", layers=(), passed=True,
        gates=tuple(GateResult(gate=gate) for gate in sorted(gate_names())), image_id=image_id,
        digest=digest, checked_by=checked_by(root), evidence=files,
    )  # fmt: skip
    write_all(root, {gates_result_path("cpu"): json.dumps(asdict(gates_result))})


def test_a_later_attest_that_changes_a_statement_undoes_the_verification(
    registry: LocalRegistry,
    make_small: MakeSmall,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("COSIGN_KEY", "COSIGN_PUBLIC_KEY"):
        monkeypatch.delenv(name, raising=False)
    repository, small = registry.repository, make_small("attested again")
    transfer.push(small.layout, small.digest, repository)
    _, manifest, config = transfer.layout_manifest(small.layout)
    image_id = manifest["config"]["digest"]
    (tmp_path / "docker").mkdir()
    (tmp_path / "dist").mkdir()
    shutil.copy(ROOT / "docker/docker-bake.json", tmp_path / "docker")
    for kind, path in evidence("cpu").items():
        shutil.copy(small.predicates[kind], tmp_path / path)
    write_gates_result(tmp_path, digest=small.digest, image_id=image_id)
    record = Record(
        image="cpu", registry=repository.registry, image_id=image_id, digest=small.digest,
        reference=repository.at(small.digest), bytes=1, layers=(), version="0.2.0",
        revision=REVISION, labels=config["config"]["Labels"], started=MOMENT, rehearsal=("a test",),
    )  # fmt: skip
    write_record(record.done("push", seconds=1).done("test", seconds=1), tmp_path)
    job = steps.Release(
        plan=PLAN, recipes=RECIPES, registry=read_registry(ROOT), repository=repository,
        root=tmp_path, rehearsal=True,
    )  # fmt: skip

    attested = steps.attest(job)
    assert list(attested.steps) == ["push", "test", "attest"]
    verified = write_record(attested.done("verify", seconds=1), tmp_path)
    capfd.readouterr()
    assert steps.attest(job) == verified
    assert "attested before" in capfd.readouterr().err

    sbom = tmp_path / evidence("cpu")["cyclonedx"]
    content = json.loads(sbom.read_text())
    content["components"].append({"name": "two", "purl": "pkg:pypi/two@2.0"})
    sbom.write_text(json.dumps(content))
    write_gates_result(tmp_path, digest=small.digest, image_id=image_id)
    assert list(steps.attest(job).steps) == ["push", "test", "attest"]
    found = read_record("cpu", repository, tmp_path)
    assert found is not None
    assert "verify" not in found.steps
