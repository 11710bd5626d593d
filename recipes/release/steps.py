"""Run the steps of a release, each of which is skipped if the record says that it is done."""

from __future__ import annotations

import json
import os
import subprocess
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from attnimg.selection.gpus_and_images import cpu_name
from recipes.cves import refuse_expired
from recipes.facts import ImagePlan, Recipes, on_all_platforms
from recipes.release import publishable, signing, tags, transfer
from recipes.release.attesting import write_predicates
from recipes.release.checking import check_released
from recipes.release.gates_result import GatesResult, gates_result_path, read_gates_result
from recipes.release.programs import report, run
from recipes.release.record import (
    FOLDER,
    STEPS,
    Layer,
    Record,
    make_target,
    needed_record,
    now,
    read_record,
    record_to_verify,
    write_record,
)
from recipes.release.repository import Registry, Repository
from recipes.run_gates import checked_by, evidence, sha256_of
from recipes.solve.plan import solve


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """What every step needs.

    Attributes:
        plan: of the image.
        recipes: of the plan.
        registry: the content of registry.toml.
        repository: where the image goes.
        root: the checkout.
        rehearsal: whether values that are not known are warnings.
        tests: what `make test/NAME` runs on the pulled image.
    """

    plan: ImagePlan
    recipes: Recipes
    registry: Registry
    repository: Repository
    root: Path
    rehearsal: bool
    tests: str = publishable.ALL_TESTS

    @property
    def name(self) -> str:
        """The name of the image's files for the platform of the plan: "cpu", "cpu-arm64"."""
        return self.plan.name

    @property
    def layout(self) -> Path:
        """The folder of the image as it is pushed."""
        return self.root / FOLDER / f"{self.name}.oci"


def release(job: Release) -> Record:
    """Run every step; return the record of the whole release.

    Raises:
        AttnimgError: a step failed. The next call continues with it.
    """
    steps: dict[str, Callable[[Release], Record | None]] = {
        "build": build,
        "gate": gate,
        "push": push,
        "test": test,
        "attest": attest,
        "verify": _verify_once,
        "promote": promote,
    }
    record = None
    for repository, step in enumerate(STEPS, 1):
        report(f"release: {repository} of {len(STEPS)}: {step}")
        record = steps[step](job)
    assert record is not None
    return record


def build(job: Release) -> None:
    """Build the image; Docker repeats only what has changed."""
    _make("build", job)


def gate(job: Release) -> None:
    """Run the gates on the image of this engine, unless these recipes and gates already did."""
    if _gates_result(job, image_id=_engine_image(job)) is None:
        _make("gate", job)
    else:
        report("  the gates have checked this image; its result is in dist/")


def push(job: Release) -> Record:
    """Check that the image may be published, and push it by its digest.

    Raises:
        AttnimgError: it may not be published, or the registry refuses it.
    """
    gates_result = _gates_result(job, image_id="")
    if gates_result is None:
        gate(job)
        gates_result = _gates_result(job, image_id="")
    if gates_result is None:
        raise _not_checked(
            job, f"found no whole result of the gates in {gates_result_path(job.name)}"
        )
    digest, manifest, config = transfer.layout_manifest(job.layout)
    image_id = manifest["config"]["digest"]
    if (digest, image_id) != (gates_result.digest, gates_result.image_id):
        raise _not_checked(
            job,
            f"found {digest}, ID {image_id}, in {job.layout}; "
            f"the gates checked {gates_result.digest}, ID {gates_result.image_id}",
        )
    labels = config.get("config", {}).get("Labels") or {}
    warnings = publishable.check_publishable(
        job.plan,
        labels=labels,
        gates_result=gates_result,
        version=_version(job.root),
        head=head_commit(job.root),
        repository=job.repository,
        rehearsal=job.rehearsal,
    )
    for warning in warnings:
        report(f"  warning: {warning}")
    record = read_record(job.name, job.repository, job.root)
    pushed = record is not None and "push" in record.steps
    same = record and (record.digest, record.registry) == (digest, job.repository.registry)
    if record and pushed and same and transfer.has(digest, job.repository):
        report(f"  pushed before, {record.steps['push'].done}: {record.reference}")
        return record
    layers = tuple(
        Layer(digest=layer["digest"], bytes=layer["size"]) for layer in manifest["layers"]
    )
    size = sum(layer["size"] for layer in manifest["layers"])
    report(f"  {size / 1e6:.1f} MB in {len(layers)} layers to {job.repository.name}")
    start = time.monotonic()
    transfer.push(job.layout, digest, job.repository)
    record = Record(
        image=job.name,
        registry=job.repository.registry,
        image_id=image_id,
        digest=digest,
        reference=job.repository.at(digest),
        bytes=size,
        layers=layers,
        labels=labels,
        version=labels.get(f"{publishable.OCI}.version") or "dev",
        revision=labels.get(f"{publishable.OCI}.revision") or head_commit(job.root),
        started=now(),
        rehearsal=warnings,
    )
    report(f"  pushed {record.reference}")
    return write_record(record.done("push", seconds=time.monotonic() - start), job.root)


def test(job: Release) -> Record:
    """Test the image that is pulled from the registry by its digest."""
    record = needed_record(job.name, job.repository, job.root, after="push")
    if "test" in record.steps and record.tests == job.tests:
        report(f"  tested before: {record.tests}")
        return record
    start = time.monotonic()
    _make("test", job, f"DIGEST={record.digest}", f"TESTS={job.tests}")
    found = record.done("test", seconds=time.monotonic() - start, tests=job.tests)
    return write_record(found, job.root)


def attest(job: Release) -> Record:
    """Sign the image, and attach signed statements on its content and its origin.

    Raises:
        AttnimgError: the statements in dist/ are about another image (code "not-checked"), or an
            answer to a vulnerability has expired (code "expired-cve").
    """
    record = needed_record(job.name, job.repository, job.root, after="test")
    refuse_other_evidence(job, record)
    refuse_expired(job.recipes.cves, today=datetime.now(UTC).date())
    signer = _signing(job, sign=True)
    start = time.monotonic()
    notes = {"rehearsal": "true"} if record.rehearsal else {}
    predicates = write_predicates(
        record, job.plan, job.recipes, registry=job.registry, root=job.root, env=os.environ
    )
    unsigned = _fails(lambda: signing.verify_signature(record.digest, job.repository, signer))
    missing = {
        kind
        for kind, path in predicates.items()
        if _attested(kind, record, job.repository, signer)
        != json.loads(path.read_text(encoding="utf-8"))
    }
    if not unsigned and not missing and "attest" in record.steps and record.signer == signer.text:
        report(f"  attested before, {record.steps['attest'].done} ({signer.text})")
        return record
    # What was verified is not what will be there, also if this is killed before its end.
    record = write_record(record.before("attest"), job.root)
    if unsigned:
        signing.sign(record.digest, job.repository, signer, notes=notes)
    report(f"  signed ({signer.text})")
    for kind, path in predicates.items():
        if kind in missing:
            signing.attest(kind, path, record.digest, job.repository, signer)
        report(f"  attested: {kind}, {path.stat().st_size / 1e3:.0f} kB")
    found = record.done("attest", seconds=time.monotonic() - start, signer=signer.text)
    return write_record(found, job.root)


def verify(job: Release) -> Record:
    """Verify the image and its statements from the registry, in a second, empty engine."""
    record = record_to_verify(job.name, job.repository, job.root)
    start = time.monotonic()
    checked_in = check_released(
        record.digest,
        job.repository,
        _signing(job, sign=False),
        name=job.plan.image.name,
        expected={kind: job.root / path for kind, path in evidence(job.name).items()},
        folder=job.root / FOLDER,
    )
    found = record.done("verify", seconds=time.monotonic() - start, checked_in=checked_in)
    return write_record(found, job.root)


def _verify_once(job: Release) -> Record:
    record = needed_record(job.name, job.repository, job.root, after="attest")
    if "verify" in record.steps:
        report(f"  verified before, in {record.checked_in}")
        return record
    return verify(job)


def promote(job: Release) -> Record:
    """Tag the list of all verified platforms: the immutable tag first, then those that move.

    A platform of the recipe that was not verified, or is of another commit, is left out, with the
    reason in the output and in the record.

    Raises:
        AttnimgError: the immutable tag names another list (code "tag-taken"), not all tests ran
            (code "fewer-tests"), or an answer to a vulnerability has expired (code "expired-cve").
    """
    record = needed_record(job.name, job.repository, job.root, after="verify")
    refuse_expired(job.recipes.cves, today=datetime.now(UTC).date())
    publishable.refuse_fewer_tests(record.tests, name=job.plan.image.name, rehearsal=job.rehearsal)
    start = time.monotonic()
    records, left_out = verified_platforms(job, record)
    images = [
        transfer.listed(one.digest, platform, job.repository) for platform, one in records.items()
    ]
    for platform, why in left_out.items():
        have = " and ".join(records)
        report(f"  warning: the tags have {have} only, without {platform}: {why}")
    first = solve(job.plan.image, job.recipes)
    fixed = tags.immutable_tag(first, version=record.version, revision=record.revision)
    digest = transfer.push_list(images, job.repository)
    tags.refuse_changed(fixed, found=transfer.find_tag(fixed, job.repository), digest=digest)
    listed = {image.platform: image.digest for image in images}
    for name in (fixed, *tags.moving_tags(job.plan)):
        if transfer.find_tag(name, job.repository) != digest:
            transfer.tag(digest, name, job.repository)
        found = transfer.find_tag(name, job.repository)
        if found != digest:
            raise AttnimgError(
                f"the tag {name} was not set",
                why=f"found {found} under it, needed {digest}",
                do=f"{make_target('promote', job.name)} again, when no other release is running",
                code="tag-taken",
                exit_code=1,
            )
        report(f"  {job.repository.name}:{name}")
        for platform, one in records.items():
            records[platform] = write_record(
                one.done(
                    "promote",
                    seconds=time.monotonic() - start,
                    tags={**one.tags, name: found},
                    listed=listed,
                    left_out=left_out,
                ),
                job.root,
            )
    return records[job.plan.platform]


def verified_platforms(job: Release, record: Record) -> tuple[dict[str, Record], dict[str, str]]:
    """Return the records of the platforms to list, and why others of the recipe are left out.

    Args:
        job: the release of one platform.
        record: of that platform, which is verified.
    """
    records: dict[str, Record] = {}
    left_out: dict[str, str] = {}
    for plan in on_all_platforms([solve(job.plan.image, job.recipes)]):
        if plan.platform == job.plan.platform:
            records[plan.platform] = record
            continue
        try:
            other = needed_record(plan.name, job.repository, job.root, after="verify")
            publishable.refuse_fewer_tests(
                other.tests, name=plan.image.name, rehearsal=job.rehearsal
            )
        except AttnimgError as error:
            if error.code not in ("no-step", "fewer-tests"):
                raise
            left_out[plan.platform] = f"{error.why}; {error.do}"
            continue
        found, needed = (f"{one.version}, commit {one.revision}" for one in (other, record))
        if found != needed:
            why = f"found {found} in its record, needed {needed}"
            left_out[plan.platform] = f"{why}; {make_target('release', plan.name)}"
            continue
        records[plan.platform] = other
    return records, left_out


def head_commit(root: Path) -> str:
    """Return the commit of the checkout, with "-dirty" if a tracked file was changed.

    It is 40 zeros if the folder is not the top of a repository; that of a repository around it is
    about other files.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    top = git("rev-parse", "--show-toplevel")
    if not top or not Path(top).samefile(root):
        return "0" * 40
    commit = git("rev-parse", "HEAD") or "0" * 40
    return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit


def _gates_result(job: Release, *, image_id: str) -> GatesResult | None:
    """Return the gates' result if it is of this checkout and whole; None otherwise."""
    gates_result = read_gates_result(job.name, job.root)
    if gates_result is None or not _holds(gates_result, job):
        return None
    if image_id and gates_result.image_id != image_id:
        return None
    return gates_result if (job.layout / "index.json").exists() else None


def _holds(gates_result: GatesResult, job: Release) -> bool:
    """Return whether these recipes and gates made a result, and its files are as it wrote them."""
    files = evidence(job.name)
    now_there = {kind: sha256_of(job.root / path) for kind, path in files.items()}
    return gates_result.checked_by == checked_by(job.root) and gates_result.evidence == now_there


def refuse_other_evidence(job: Release, record: Record) -> None:
    """Check that the files of dist/ which are signed are about the image that was pushed."""
    gates_result = read_gates_result(job.name, job.root)
    found = (gates_result.digest, gates_result.image_id) if gates_result else ()
    if gates_result is None:
        why = f"found no result of the gates in {gates_result_path(job.name)}"
    elif found != (record.digest, record.image_id):
        why = f"found the result of {gates_result.digest} in dist/, needed that of {record.digest}"
    elif not _holds(gates_result, job):
        why = "the recipes, the gates or the files in dist/ changed after the gates wrote them"
    else:
        return
    raise AttnimgError(
        f"the statements about {job.name} are not about the image that was pushed",
        why=why,
        do=f"{make_target('gate', job.name)}, then {make_target('release', job.name)}, which "
        "pushes what was checked",
        code="not-checked",
        exit_code=1,
    )


def _not_checked(job: Release, why: str) -> AttnimgError:
    return AttnimgError(
        f"the image {job.name} is not the one that the gates checked",
        why=why,
        do=make_target("gate", job.name),
        code="not-checked",
        exit_code=1,
    )


def _engine_image(job: Release) -> str:
    """Return the ID of the image in this engine; "none" if it is not there."""
    platform = job.plan.platform
    here = platform == f"linux/{cpu_name(os.uname().machine)}"
    tag = job.plan.image.name + ("" if here else f"-{platform.partition('/')[2]}")
    command = ["docker", "image", "inspect", "--format", "{{.Id}}", f"attnimg:{tag}"]
    try:
        return run(command, host="").strip()
    except AttnimgError as error:
        if error.code != "program":
            raise
        return "none"  # make gate/NAME says what to do


def _signing(job: Release, *, sign: bool) -> signing.Signing:
    return signing.choose_signing(
        job.registry, job.repository, env=os.environ, folder=job.root / FOLDER, sign=sign
    )


def _attested(
    kind: str, record: Record, repository: Repository, signer: signing.Signing
) -> dict[str, Any] | None:
    """Return what was attested before; None if it was not."""
    try:
        return signing.verify_statement(kind, record.digest, repository, signer)
    except AttnimgError as error:
        if error.code != "not-verified":
            raise
        return None


def _fails(check: Callable[[], None]) -> bool:
    try:
        check()
    except AttnimgError as error:
        if error.code != "not-verified":
            raise
        return True
    return False


def _version(root: Path) -> str:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def _make(step: str, job: Release, *variables: str) -> None:
    """Run a make target of the checkout for the image, which prints its own errors."""
    target = f"{step}/{job.plan.image.name}"
    command = [
        "make",
        target,
        f"PLATFORM={job.plan.platform}",
        f"REGISTRY={job.repository.registry}",
        *variables,
    ]
    if subprocess.run(command, cwd=job.root, check=False).returncode:
        raise AttnimgError(
            f"make {target} failed",
            why="its output is above",
            do=f"fix it, then {make_target('release', job.name)}: it continues with this step",
            code="step-failed",
            exit_code=1,
        )
