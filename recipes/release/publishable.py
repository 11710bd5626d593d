"""Refuse to publish an image with unresolved values, changes, missing labels or gate findings.

In a rehearsal, which goes to a registry of this machine only, unresolved values, changes and labels
are warnings. Findings of the gates are refused there too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from attnimg.errors import AttnimgError, counted
from recipes.facts import ImagePlan
from recipes.gates import gate_names
from recipes.release.gates_result import GatesResult
from recipes.release.repository import Repository

OCI = "org.opencontainers.image"
# What `make test/NAME` runs.
ALL_TESTS = "tests/image"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BUILD = "commit everything, then make build"


def check_publishable(
    plan: ImagePlan,
    *,
    labels: Mapping[str, str],
    gates_result: GatesResult,
    version: str,
    head: str,
    repository: Repository,
    rehearsal: bool,
) -> tuple[str, ...]:
    """Check an image before anything is pushed; return the warnings of a rehearsal.

    Args:
        plan: of the image.
        labels: of the image.
        gates_result: the result of `make gate/NAME`.
        version: of pyproject.toml.
        head: the commit of the checkout, with "-dirty" if it was changed.
        repository: where it would go.
        rehearsal: whether REHEARSAL is set.

    Raises:
        AttnimgError: it may not be pushed; `why` has every reason (code "not-publishable").
    """
    refuse_other_rehearsal(repository, rehearsal=rehearsal)
    found = tuple(unknown(plan, labels=labels, version=version, head=head))
    never = [*_gate_faults(gates_result, plan.name)]
    if foreign := labels.get(f"{OCI}.title") != f"attnimg:{plan.image.name}":
        title = labels.get(f"{OCI}.title") or "none"
        never.append(f"label title: found {title}, needed attnimg:{plan.image.name}")
    if never or (found and not rehearsal):
        name = plan.image.name
        raise AttnimgError(
            f"the image {name} can't be published",
            why="\n".join([*never, *found]),
            do="build it with docker/build.py"
            if foreign
            else f"make gate/{name} and fix what it finds"
            if never
            else f"resolve these values (make lock), {_BUILD}/{name}; to try the pipeline, "
            "set REHEARSAL=1 and a registry of this machine",
            code="not-publishable",
            exit_code=1,
        )
    return found


def refuse_other_rehearsal(repository: Repository, *, rehearsal: bool) -> None:
    """Check that a rehearsal goes to a registry of this machine.

    Raises:
        AttnimgError: it does not (code "not-a-rehearsal").
    """
    if rehearsal and not repository.loopback:
        raise AttnimgError(
            "a rehearsal goes to a registry of this machine only",
            why=f"found REHEARSAL and the registry {repository.registry}, needed one on 127.0.0.1",
            do="unset REHEARSAL to publish, or set REGISTRY=127.0.0.1:PORT/rehearsal",
            code="not-a-rehearsal",
        )


def refuse_fewer_tests(tests: str, *, name: str, rehearsal: bool) -> None:
    """Check that a release, unlike a rehearsal, is tested by all tests of images.

    Raises:
        AttnimgError: it is not (code "fewer-tests").
    """
    if not rehearsal and tests != ALL_TESTS:
        raise AttnimgError(
            "a release runs all tests of the image",
            why=f"found TESTS={tests or '(none)'}, needed {ALL_TESTS}",
            do=f"unset TESTS and make tested/{name}, or set REHEARSAL=1 with a registry of this "
            "machine",
            code="fewer-tests",
        )


def unknown(
    plan: ImagePlan, *, labels: Mapping[str, str], version: str, head: str
) -> Iterator[str]:
    """Yield each value that a published image must have and this one lacks."""
    for key, reason in plan.unresolved.items():
        yield f"{key} is unresolved: {reason}"

    def label(name: str) -> str:
        return labels.get(f"{OCI}.{name}", "")

    for name in ("version", "revision", "created", "base.name", "base.digest"):
        if not label(name):
            yield f"label {name}: found none"
    if label("version") == "dev":
        yield "label version: found dev, which is a build of a changed checkout"
    elif label("version") not in ("", version):
        yield f"label version: found {label('version')}, needed {version}, pyproject.toml's"
    if (revision := label("revision")) and not _COMMIT.fullmatch(revision):
        yield f"label revision: found {revision}, needed a commit of 40 digits"
    elif revision and revision != head:
        yield f"label revision: found {revision}, needed {head}, this checkout's"
    digest, name = plan.base.digest, plan.base.reference
    if isinstance(digest, str) and label("base.digest") not in ("", digest):
        yield f"label base.digest: found {label('base.digest')}, needed {digest}, the recipe's"
    if label("base.name") not in ("", name):
        yield f"label base.name: found {label('base.name')}, needed {name}, the recipe's"


def _gate_faults(gates_result: GatesResult, name: str) -> Iterator[str]:
    """Yield why the result is not that of every gate about this image, without a finding."""
    if gates_result.image != name:
        yield f"gates: found the result of {gates_result.image}, needed {name}"
    found = [result.gate for result in gates_result.gates]
    if missing := sorted(gate_names() - set(found)):
        yield f"gates: found no result of {', '.join(missing)}"
    if unknown_gates := sorted(set(found) - gate_names()):
        yield f"gates: found {', '.join(unknown_gates)}, which this checkout does not have"
    if twice := sorted({gate for gate in found if found.count(gate) > 1}):
        yield f"gates: found two results of {', '.join(twice)}"
    for result in gates_result.gates:
        if result.findings:
            files = ", ".join(finding.file for finding in result.findings[:3])
            yield f"gate {result.gate}: {counted(len(result.findings), 'finding')} ({files})"
        elif result.skip_reason:
            yield f"gate {result.gate} was skipped: {result.skip_reason}"
    if not gates_result.passed and not any(result.findings for result in gates_result.gates):
        yield "gates: found passed false without a finding"
