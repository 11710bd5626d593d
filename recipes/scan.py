"""Scan the Python packages of an image for known vulnerabilities, with pip-audit.

The image's lock file, torch and its kernels are scanned, so that no image has to be built. A scan
that could not be made is an error of its own (exit code 3), never "no vulnerabilities": the first
request asks for a package that every database must report, and every pin must get an answer.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from pydantic import TypeAdapter

from attnimg.errors import AttnimgError
from recipes.cves import answer_to, refuse_expired
from recipes.facts import Cve, ImagePlan
from recipes.solve.lock import pinned_versions

NOT_SCANNED = 3
# Every database of Python packages has had it since 2018. Source: GHSA-x84v-xcm2-53pg (2026-11-27).
_CONTROL = ("requests", "2.19.0", "CVE-2018-18074")


@dataclass(frozen=True, slots=True)
class Finding:
    """A known vulnerability of an installed package.

    Attributes:
        ids: its names: PYSEC-..., GHSA-..., CVE-...
        fixed: the versions without it.
        answer: the entry of cves.toml; None if there is none.
    """

    package: str
    version: str
    ids: tuple[str, ...]
    fixed: tuple[str, ...]
    answer: Cve | None

    def __str__(self) -> str:
        """Return it as one line."""
        name, *others = sorted(self.ids, key=lambda text: not text.startswith("CVE-"))
        same = f" ({', '.join(others)})" if others else ""
        fixed = f"fixed in {', '.join(self.fixed)}" if self.fixed else "no fixed version"
        return f"{self.package} {self.version}: {name}{same}, {fixed}"


@dataclass(frozen=True, slots=True)
class _Vulnerability:
    """As pip-audit prints it; other keys are ignored."""

    id: str
    fix_versions: tuple[str, ...]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Package:
    """What pip-audit found for one package; no `vulns` where it was skipped."""

    name: str
    version: str = ""
    vulns: tuple[_Vulnerability, ...] | None = None
    skip_reason: str = ""


@dataclass(frozen=True, slots=True)
class _Answers:
    dependencies: tuple[_Package, ...]


def scan(
    plan: ImagePlan, cves: Iterable[Cve], *, lock: str, pip_audit: Path, today: date
) -> list[Finding]:
    """Return all known vulnerabilities of an image's Python packages, also those with an answer.

    PIP_AUDIT_VULNERABILITY_SERVICE (osv, or pypi) and PIP_AUDIT_OSV_URL name another service.

    Args:
        plan: of the image.
        cves: the entries of cves.toml.
        lock: the text of the image's lock file.
        pip_audit: the program.
        today: for the expiry of answers.

    Raises:
        AttnimgError: an answer has expired; or the service did not answer for every package
            (code "not-scanned", exit code 3).
    """
    pins = pinned_versions(plan, lock=lock)
    own = [cve for cve in cves if canonicalize_name(cve.package) in pins]
    refuse_expired(own, today=today)
    package, version, control = _CONTROL
    if not any(control in ids for _, _, ids, _ in _audit({package: version}, pip_audit)):
        raise _not_scanned(
            f"it reports no {control} for {package} {version}, which every database has",
            "set PIP_AUDIT_OSV_URL to a complete database",
        )
    return [
        Finding(
            name, found, ids, fixed, answer_to(own, package=name, version=found, ids=frozenset(ids))
        )
        for name, found, ids, fixed in _audit(pins, pip_audit)
    ]


def refuse_findings(name: str, findings: Iterable[Finding]) -> None:
    """Check that every vulnerability has an answer.

    Raises:
        AttnimgError: one has none (code "vulnerable", exit code 1).
    """
    if rest := [str(finding) for finding in findings if finding.answer is None]:
        raise AttnimgError(
            f"the image {name} has known vulnerabilities",
            why="\n".join(rest),
            do="make bump PIN=PACKAGE, or write into recipes/cves.toml why it is not affected",
            code="vulnerable",
            exit_code=1,
        )


def _audit(
    pins: Mapping[str, str], pip_audit: Path
) -> Iterator[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    """Yield (package, version, ids, fixed versions) of each known vulnerability."""
    service = os.environ.get("PIP_AUDIT_VULNERABILITY_SERVICE", "osv")
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "pins.txt"
        requirements.write_text("".join(f"{name}=={pins[name]}\n" for name in pins), "utf-8")
        command = [str(pip_audit), "--requirement", str(requirements), "--no-deps", "--disable-pip"]
        command += ["--vulnerability-service", service, "--format", "json"]
        command += ["--progress-spinner", "off", "--cache-dir", folder]
        try:
            process = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False
            )
        except OSError as error:
            raise _not_scanned(f"{pip_audit}: {error.strerror}", "make scan/NAME") from error
    try:
        if process.returncode not in (0, 1):  # 1: it found vulnerabilities
            raise ValueError(f"pip-audit failed with exit code {process.returncode}")
        answers = TypeAdapter(_Answers).validate_json(process.stdout).dependencies
    except ValueError as error:
        wrong = str(error) if process.stdout.strip() else "pip-audit printed nothing"
        last = (process.stderr.strip() or " ".join(wrong.split())).splitlines()[-1]
        raise _not_scanned(
            last, "check the network; PIP_AUDIT_OSV_URL names a mirror of the service"
        ) from None
    if lost := list(_lost(pins, answers, warnings=process.stderr)):
        raise _not_scanned("\n".join(lost), "set PIP_AUDIT_VULNERABILITY_SERVICE=osv")
    for answer in answers:
        for found in answer.vulns or ():
            yield answer.name, answer.version, (found.id, *found.aliases), found.fix_versions


def _lost(pins: Mapping[str, str], answers: Iterable[_Package], *, warnings: str) -> Iterator[str]:
    """Yield what says that a pin was not scanned, or another version of it."""
    wanted = {canonicalize_name(name): version for name, version in pins.items()}
    scanned = set()
    for answer in answers:
        name = canonicalize_name(answer.name)
        if answer.vulns is None:
            yield f"{answer.name}: {answer.skip_reason or 'skipped without a reason'}"
        elif name not in wanted or not _same_version(answer.version, wanted[name]):
            yield f"{answer.name}: the answer is for {answer.version}, needed {wanted.get(name)}"
        scanned.add(name)
    yield from (f"{name}: no answer" for name in wanted if name not in scanned)
    # pip-audit leaves out an entry that it can't read, with a warning.
    yield from (line for line in warnings.splitlines() if "OSV" in line and "WARNING" in line)


def _same_version(one: str, other: str) -> bool:
    try:
        return Version(one) == Version(other)
    except InvalidVersion:
        return False


def _not_scanned(why: str, do: str) -> AttnimgError:
    return AttnimgError(
        "the packages were not scanned",
        why=f"{why}\nneeded an answer of the service of known vulnerabilities for each package",
        do=do,
        code="not-scanned",
        exit_code=NOT_SCANNED,
    )
