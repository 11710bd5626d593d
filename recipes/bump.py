"""Find newer releases of the pins, and make one commit of each (`make bump`).

A pin is a kernel's archive in recipes/kernels, or a package that pyproject.toml pins with ==; by
name also any package of requirements/lock.txt. What locks the packages again is handed in: it also
resolves the base image's digest, which gets a commit of its own before the others.

Not found here: torch, whose facts (recipes/torch.toml) a person reads from the wheel, and kernels
that are pinned by commit.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from packaging.version import Version

from attnimg.errors import AttnimgError
from recipes.facts import Recipes
from recipes.package_index import PackageIndex
from recipes.solve.lock import split_lock

# Locks again in a checkout: the packages, the bases, and all that is rendered. With the name of a
# package it takes the newest version of that one.
Relock = Callable[[Path, str], None]


@dataclass(frozen=True, slots=True)
class Bump:
    """A pin, and the newer release of it.

    Attributes:
        file: where the pin stands, in the checkout.
        sha256: of the pinned archive; empty where a lock file has the hashes.
    """

    package: str
    version: str
    newer: str
    file: str
    sha256: str = ""

    def __str__(self) -> str:
        """Return it as the subject of its commit."""
        return f"Bump {self.package} from {self.version} to {self.newer}"


def find_bumps(recipes: Recipes, index: PackageIndex, *, lock: str, pin: str = "") -> list[Bump]:
    """Return every pin that has a newer release on the index.

    Args:
        recipes: of the checkout.
        index: where releases are looked up.
        lock: text of requirements/lock.txt.
        pin: look up this package only; it may also be one of the lock file.

    Raises:
        AttnimgError: there is no such pin, or the index does not answer.
    """
    pins = list(_pins(recipes))
    names = [bump.package for bump in pins]
    if pin and pin not in names:
        text = split_lock(lock).get(pin)
        if text is None:
            raise AttnimgError(
                f"there is no pin {pin!r}",
                why=f"found it neither in requirements/lock.txt nor among: {', '.join(names)}",
                do="name one of these, or omit PIN",
                code="unknown-pin",
            )
        version = text.split()[0].partition("==")[2]
        pins = [Bump(pin, version, version, "requirements/lock.txt")]
    found = []
    for bump in pins:
        if pin in ("", bump.package):
            form = recipes.kernels[bump.package].form if bump.package in recipes.kernels else ""
            pre = Version(bump.version).is_prerelease
            release = index.newest(bump.package, form=form or "wheel", prereleases=pre)
            if Version(release.version) > Version(bump.version):
                sha256 = release.sha256 if form else ""
                found.append(replace(bump, newer=release.version, sha256=sha256))
    return found


def _pins(recipes: Recipes) -> Iterator[Bump]:
    for name, kernel in recipes.kernels.items():
        if kernel.form != "git":
            yield Bump(name, kernel.version, kernel.version, f"recipes/kernels/{name}.toml")
    for name, version in recipes.stack.items():
        yield Bump(name, version, version, "pyproject.toml")


def apply_bump(bump: Bump, root: Path, *, today: date) -> None:
    """Write the newer version, and a kernel's new hash, into the file of a pin."""
    path = root / bump.file
    if bump.file == "requirements/lock.txt":
        return  # locking again writes it
    text = path.read_text(encoding="utf-8")
    # Not a part of another name or version: my-foo==1.2, foo==1.2.1, foo==1.2+cu130.
    pin = rf"(?<![\w.-]){re.escape(f'{bump.package}=={bump.version}')}(?![\w+!*-]|\.[\w*])"
    new = re.sub(pin, f"{bump.package}=={bump.newer}", text)
    if bump.sha256:
        if not re.fullmatch(r"[0-9a-f]{64}", bump.sha256):
            raise AttnimgError(
                f"{bump.package} can't be bumped",
                why=f"the index has sha256 {bump.sha256!r}, needed 64 hexadecimal digits",
                do="make bump with another index (PIP_INDEX_URL)",
                code="bad-hash",
                exit_code=1,
            )
        new = new.replace(f'version = "{bump.version}"', f'version = "{bump.newer}"', 1)
        hashed = f'sha256 = "{bump.sha256}"  # as the index has it, {today}'
        new = re.sub(r"^sha256 = .*$", hashed, new, count=1, flags=re.MULTILINE)
    if new == text:
        raise AttnimgError(
            f"{bump.package} can't be bumped",
            why=f"found no {bump.package}=={bump.version} in {bump.file}",
            do="bump it by hand",
            code="no-pin",
            exit_code=1,
        )
    path.write_text(new, encoding="utf-8")


def commit_bumps(
    bumps: list[Bump], root: Path, *, relock: Relock, today: date
) -> Iterator[tuple[str, str]]:
    """Make a commit of each pin, after one of whatever locking again changes without any.

    A pin for which locking fails is left out, and the checkout is as before it.

    Yields:
        (subject of the commit, error): the error is empty where the commit was made.

    Raises:
        AttnimgError: the checkout has changes (code "dirty"), or locking it as it is fails.
    """
    if changed := _git(root, "status", "--porcelain"):
        raise AttnimgError(
            "the checkout has uncommitted changes",
            why=f"git status: {'; '.join(changed.splitlines()[:5])}",
            do="commit them, or git stash -u",
            code="dirty",
        )
    relock(root, "")
    if _git(root, "status", "--porcelain"):
        yield _commit(root, "Lock packages and the base image again", "No pin was changed."), ""
    for bump in bumps:
        try:
            apply_bump(bump, root, today=today)
            relock(root, bump.package if bump.file == "requirements/lock.txt" else "")
        except AttnimgError as error:
            _git(root, "reset", "-q", "--hard")
            _git(root, "clean", "-fdq")
            yield str(bump), f"{error.what}: {' '.join(error.why.split())}"
            continue
        if not _git(root, "status", "--porcelain"):
            yield str(bump), "it stays as it is: a bound of another package holds it back"
            continue
        yield _commit(root, str(bump), _body(bump, today)), ""


def _body(bump: Bump, today: date) -> str:
    text = f"The newest release on the package index on {today}.\n"
    if bump.sha256:
        text += (
            f"\nBefore it is merged: {bump.file} and recipes/patches/{bump.package} say what\n"
            f"{bump.version} needs. Read {bump.newer}, and compile it: make wheels/NAME.\n"
        )
    return text


def _commit(root: Path, subject: str, body: str) -> str:
    changed = sorted(line[3:] for line in _git(root, "status", "--porcelain").splitlines())
    files = "".join(f"  {path}\n" for path in changed)
    _git(root, "add", "--all")
    _git(root, "commit", "-q", "-m", subject, "-m", f"{body}\nChanged:\n{files}")
    return subject


def _git(root: Path, *arguments: str) -> str:
    process = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise AttnimgError(
            f"git {arguments[0]} failed",
            why=process.stderr.strip() or process.stdout.strip(),
            do="run it by hand in the checkout, and correct what it reports",
            code="git",
            exit_code=1,
        )
    return process.stdout.rstrip()
