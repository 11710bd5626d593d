"""Record the finished steps of a release in build/release/NAME.json, from which it continues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from attnimg.errors import AttnimgError
from recipes.facts import PLATFORMS, Digest, Platform, Strict, platform_suffix
from recipes.files import write_all
from recipes.release.repository import Repository, parse_repository

FOLDER = "build/release"
# The order of a release's steps.
STEPS = ("build", "gate", "push", "test", "attest", "verify", "promote")
# Those that a record has, each after all before it -> the target that does and records it.
RECORDED = {step: "tested" if step == "test" else step for step in STEPS[2:]}

Moment = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
Bytes = Annotated[int, Field(ge=0)]
Step = Literal["push", "test", "attest", "verify", "promote"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer(Strict):
    """A layer as it was pushed."""

    digest: Digest
    bytes: Bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Done(Strict):
    """When a step was done, and the seconds it took."""

    done: Moment
    seconds: Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record(Strict):
    """One release of one image to one registry.

    Attributes:
        image: its name, with the platform at its end if that is not the first: "cpu-arm64".
        registry: host[:port]/namespace.
        image_id: digest of its configuration: the ID of the image that was built and checked.
        digest: of its manifest.
        reference: REPOSITORY@DIGEST, by which it is pulled.
        bytes: the sum of its layers as they were pushed.
        layers: digest and size of each.
        labels: of the image.
        version, revision: of the release.
        started: when it was first pushed, as RFC 3339.
        rehearsal: why it is no release; empty for one.
        signer: how it was signed.
        tests: which tests ran on the pulled image.
        checked_in: where it was pulled to and run: a clean engine, or a clean folder.
        tags: tag -> digest of the manifest list, those that were set.
        listed: platform -> digest of its image, those in that list.
        left_out: platform of the recipe -> why it is not in that list.
        steps: step -> when it was done and the seconds it took.
    """

    image: str
    registry: str
    image_id: Digest
    digest: Digest
    reference: str
    bytes: Bytes
    layers: tuple[Layer, ...]
    labels: Mapping[str, str]
    version: str
    revision: str
    started: Moment
    rehearsal: tuple[str, ...] = ()
    signer: str = ""
    tests: str = ""
    checked_in: str = ""
    tags: Mapping[str, Digest] = field(default_factory=dict)
    listed: Mapping[str, Digest] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[Step, Done] = field(default_factory=dict)

    def before(self, step: str) -> Record:
        """Return the record without a step and all later ones, which looked at another state."""
        kept = {one: done for one, done in self.steps.items() if _order(one) < _order(step)}
        return replace(self, steps=kept)

    def done(self, step: Step, *, seconds: float, **found: Any) -> Record:
        """Return the record after a step, with what it found, and without later steps."""
        steps = dict(self.before(step).steps)
        steps[step] = Done(done=now(), seconds=round(seconds, 1))
        return replace(self, steps=steps, **found)


_RECORD = TypeAdapter(Record)


def _order(step: str) -> int:
    return STEPS.index(step)


def make_target(step: str, name: str) -> str:
    """Return the command for a step of a release: "make push/cpu PLATFORM=linux/arm64".

    Args:
        step: the target of the Makefile.
        name: of a record, with the platform at its end: "cpu-arm64".
    """
    image, platform = image_and_platform(name)
    return f"make {step}/{image}" + (f" PLATFORM={platform}" if image != name else "")


def image_and_platform(name: str) -> tuple[str, Platform]:
    """Return the image and the platform of a record's name: "cpu-arm64"."""
    for platform in PLATFORMS[1:]:
        if name.endswith(platform_suffix(platform)):
            return name.removesuffix(platform_suffix(platform)), platform
    return name, PLATFORMS[0]


def now() -> str:
    """Return the time as RFC 3339, in whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def record_path(name: str, repository: Repository) -> str:
    """Return the file of an image's release, under the checkout; that of a rehearsal is its own."""
    return f"{FOLDER}/{name}{'-rehearsal' if repository.loopback else ''}.json"


def read_record(name: str, repository: Repository, root: Path) -> Record | None:
    """Return the record of an image's release; None if there is none.

    Raises:
        AttnimgError: the file is not a record (code "bad-record").
    """
    path = root / record_path(name, repository)
    try:
        record = _RECORD.validate_json(path.read_bytes(), strict=True)
        own = parse_repository(record.registry)
        faults = _faults(record, own, path=record_path(name, repository))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors()]
    except OSError as error:
        faults = [str(error.strerror)]
    except AttnimgError as error:
        faults = [f"registry: {error.why}"]
    if faults:
        raise AttnimgError(
            f"{path} is not a record of a release",
            why="\n".join(faults[:5]),
            do=f"remove it (rm -r {path}), then {make_target('release', name)}",
            code="bad-record",
        )
    return record


def _faults(record: Record, repository: Repository, *, path: str) -> list[str]:
    """Return what in a record does not agree with the rest of it, or with its file's name."""
    faults = []
    if record_path(record.image, repository) != path:
        faults.append(f"found image {record.image} and registry {record.registry}, in {path}")
    if record.reference != repository.at(record.digest):
        faults.append(f"reference: found {record.reference}, needed {repository.at(record.digest)}")
    return faults


def needed_record(name: str, repository: Repository, root: Path, *, after: str) -> Record:
    """Return the record of a release to this registry in which `after` and all before it are done.

    Raises:
        AttnimgError: it is not, or the release went to another registry (code "no-step").
    """
    record = read_record(name, repository, root)
    if record is not None and record.registry != repository.registry:
        raise AttnimgError(
            f"the release of {name} went to another registry",
            why=f"found {record.registry} in {record_path(name, repository)}, "
            f"needed {repository.registry}",
            do=f"{make_target('push', name)}, or set REGISTRY={record.registry}",
            code="no-step",
        )
    needed = list(RECORDED)[: list(RECORDED).index(after) + 1]
    missing = [step for step in needed if record is None or step not in record.steps]
    if record is None or missing:
        done = ", ".join(record.steps) if record else "no step"
        raise AttnimgError(
            f"the release of {name} has not reached this step",
            why=f"found {done or 'no step'} in {record_path(name, repository)}, needed {after}",
            do=make_target(RECORDED[missing[0]], name),
            code="no-step",
        )
    return record


def record_to_verify(name: str, repository: Repository, root: Path) -> Record:
    """Return the record of a release to this registry that is signed and attested.

    Raises:
        AttnimgError: there is none (code "no-step"): then somebody may want to verify another image
            of the registry, for which DIGEST or TAG is missing.
    """
    try:
        return needed_record(name, repository, root, after="attest")
    except AttnimgError as error:
        if error.code != "no-step":
            raise
        image, _ = image_and_platform(name)
        raise AttnimgError(
            "no image to verify is named",
            why=f"found neither TAG nor DIGEST; {error.what}: {error.why}",
            do=f"make verify/{image} TAG={image}, or DIGEST=sha256:..., for an image of the "
            f"registry {repository.registry}; to continue a release of your own: {error.do}",
            code="no-step",
        ) from error


def write_record(record: Record, root: Path) -> Record:
    """Write a record, whole or not at all; return it."""
    text = json.dumps(asdict(record), indent=1) + "\n"
    write_all(root, {record_path(record.image, parse_repository(record.registry)): text})
    return record
