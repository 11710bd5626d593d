"""Record the finished steps of a release in build/release/NAME.json, from which it continues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from recipes.files import read_if_exists, write_all
from recipes.release.place import Place, parse_place

FOLDER = "build/release"
# The order of a release's steps.
STEPS = ("build", "gate", "push", "test", "attest", "verify", "promote")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One release of one image to one registry.

    Attributes:
        image: its name.
        registry: host[:port]/namespace.
        image_id: digest of its configuration: the ID of the image that was built and judged.
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
        tags: tag -> digest, those that were set.
        steps: step -> when it was done and the seconds it took.
    """

    image: str
    registry: str
    image_id: str
    digest: str
    reference: str
    bytes: int
    layers: tuple[Mapping[str, Any], ...]
    labels: Mapping[str, str]
    version: str
    revision: str
    started: str
    rehearsal: tuple[str, ...] = ()
    signer: str = ""
    tests: str = ""
    checked_in: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def done(self, step: str, *, seconds: float, **found: Any) -> Record:
        """Return the record after a step, with what it found."""
        steps = {**self.steps, step: {"done": now(), "seconds": round(seconds, 1)}}
        return replace(self, steps=steps, **found)


def now() -> str:
    """Return the time as RFC 3339, in whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def record_path(name: str, place: Place) -> str:
    """Return the file of an image's release, under the checkout; that of a rehearsal is its own."""
    return f"{FOLDER}/{name}{'-rehearsal' if place.loopback else ''}.json"


def read_record(name: str, place: Place, root: Path) -> Record | None:
    """Return the record of an image's release; None if there is none.

    Raises:
        AttnimgError: the file is not a record (code "bad-record").
    """
    path = root / record_path(name, place)
    if (text := read_if_exists(path)) is None:
        return None
    try:
        values = json.loads(text)
        lists = {key: tuple(values[key]) for key in ("layers", "rehearsal")}
        return Record(**{**values, **lists})
    except (ValueError, TypeError, KeyError) as error:
        raise AttnimgError(
            f"{path} is not a record of a release",
            why=f"{type(error).__name__}: {error}",
            do=f"remove it, then make release/{name}",
            code="bad-record",
        ) from error


def needed_record(name: str, place: Place, root: Path, *, after: str) -> Record:
    """Return the record of a release to this registry in which the step `after` is done.

    Raises:
        AttnimgError: it is not, or the release went to another registry (code "no-step").
    """
    record = read_record(name, place, root)
    if record is not None and record.registry != place.registry:
        raise AttnimgError(
            f"the release of {name} went to another registry",
            why=f"found {record.registry} in {record_path(name, place)}, needed {place.registry}",
            do=f"make push/{name}, or set REGISTRY={record.registry}",
            code="no-step",
        )
    if record is None or after not in record.steps:
        done = ", ".join(record.steps) if record else "no step"
        raise AttnimgError(
            f"the release of {name} has not reached this step",
            why=f"found {done or 'no step'} in {record_path(name, place)}, needed {after}",
            do=f"make {after}/{name}",
            code="no-step",
        )
    return record


def write_record(record: Record, root: Path) -> Record:
    """Write a record, whole or not at all; return it."""
    text = json.dumps(asdict(record), indent=1) + "\n"
    write_all(root, {record_path(record.image, parse_place(record.registry)): text})
    return record
