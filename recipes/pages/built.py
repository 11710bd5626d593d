"""Write the records of the wheelhouses that were built, and the README's table of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from recipes.artifact.facts import Artifact
from recipes.facts import ImagePlan, Kernel, Step
from recipes.pages import markdown_table

FOLDER = "docs/built"
# The state of an image without kernels of its own: .ci/run builds it.
BUILT_IN_CI = "built and tested on every change"


def build_record(
    manifest: Mapping[str, Any],
    codes: Mapping[str, Mapping[str, list[str]]],
    *,
    day: str,
    machine: str,
    earlier: Mapping[str, Any],
) -> str:
    """Write the record of a wheelhouse.

    If a build took its objects from the cache, its times have no meaning: the times of the earlier
    record, whose build compiled them, are kept.

    Args:
        manifest: its manifest.json: each kernel with its time, jobs and bytes.
        codes: wheel -> library -> the machine code found in it.
        day: when it was built, YYYY-MM-DD.
        machine: what it was built on, in general words.
        earlier: the record that this one replaces; empty for none.
    """
    before = {kernel["name"]: kernel for kernel in earlier.get("kernels", ())}
    kernels = [
        {
            **kernel,
            **_earlier_times(kernel, before.get(kernel["name"])),
            "code": codes.get(kernel["wheel"], {}),
        }
        for kernel in manifest["kernels"]
    ]
    head = {"image": manifest["image"], "abi": manifest["abi"], "day": day, "machine": machine}
    return json.dumps({**head, "kernels": kernels}, indent=1) + "\n"


def read_manifest(wheelhouse: Artifact, *, image: str) -> Mapping[str, Any]:
    """Return the manifest of a wheelhouse; check that it is complete and belongs to an image.

    Raises:
        AttnimgError: a wheel has another hash, or the manifest is invalid or another image's
            (code "bad-wheelhouse").
    """
    manifest = wheelhouse.manifest or {}
    kernels = manifest.get("kernels")
    needed = {"name", "version", "key", "trimmed", "wheel"}
    faults = [
        f"the hash of {name} is not in SHA256SUMS"
        for name, equal in wheelhouse.sums.items()
        if not equal
    ]
    if manifest.get("image") != image:
        faults.append(f"found the image {manifest.get('image')!r}, needed {image!r}")
    if not isinstance(manifest.get("abi"), str):
        faults.append(f"found the abi {manifest.get('abi')!r}, needed a text")
    if not isinstance(kernels, list) or not all(
        isinstance(kernel, dict) and kernel.keys() >= needed for kernel in kernels
    ):
        faults.append(f"manifest.json lists no kernels, each with {', '.join(sorted(needed))}")
    if faults:
        raise AttnimgError(
            f"{wheelhouse.source} is not a wheelhouse of {image}",
            why="\n".join(faults),
            do=f"make wheels/{image}",
            code="bad-wheelhouse",
        )
    return manifest


def _earlier_times(kernel: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the figures of the earlier build, if this one reused most objects of a kernel."""
    reused = kernel.get("objects_reused", 0) > kernel.get("objects_compiled", 0)
    if before is None or not reused:
        return {}
    if any(before[key] != kernel[key] for key in ("version", "trimmed")):
        return {}
    figures = ("seconds", "cpu_seconds", "jobs", "attempts", "objects_compiled", "objects_reused")
    return {key: before[key] for key in figures if key in before}


def list_codes(wheelhouse: Artifact) -> dict[str, dict[str, list[str]]]:
    """List the machine code of each library in each wheel: wheel -> library -> codes."""
    found: dict[str, dict[str, list[str]]] = {}
    for file in wheelhouse.files:
        if file.elf and file.elf.codes:
            libraries = found.setdefault(wheelhouse.layers[file.layer].name, {})
            libraries[file.path] = sorted(file.elf.codes)
    return found


def read_records(root: Path) -> dict[str, dict[str, Any]]:
    """Read the records of a checkout: image -> its record."""
    paths = sorted((root / FOLDER).glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def built_table(plans: Iterable[ImagePlan], records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of images and kernels: whether each was built, and how much of it."""
    stable = [plan for plan in plans if plan.image.channel == "stable" and plan.steps]
    kernels: dict[str, Kernel] = {}
    for step in (step for plan in stable for step in plan.steps):
        kernels.setdefault(step.kernel.name, step.kernel)
    rows = []
    for plan in stable:
        steps = {step.kernel.name: step for step in plan.steps}
        record = records.get(plan.image.name, {})
        rows.append((f"`{plan.image.name}`", *(_cell(steps.get(name), record) for name in kernels)))
    return markdown_table(("image", *(kernel.summary for kernel in kernels.values())), rows)


def images_table(plans: Iterable[ImagePlan], records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the README's table: each stable image, its GPUs, its kernels, and its state."""
    rows = []
    for plan in (plan for plan in plans if plan.image.channel == "stable"):
        record = records.get(plan.image.name, {})
        cells = [_cell(step, record) for step in plan.steps if step.kernel.form != "wheel"]
        whole = all(cell.startswith("built") for cell in cells)
        names = ", ".join(f"`{name}`" for name in (plan.image.name, *plan.image.aliases))
        kernels = ", ".join(step.kernel.summary for step in plan.steps) or "PyTorch's own"
        state = f"kernels built {record.get('day', '')}" if whole else "not yet built"
        rows.append((names, plan.image.summary, kernels, state if cells else BUILT_IN_CI))
    return markdown_table(("image", "GPUs", "kernels", "state"), rows)


def _cell(step: Step | None, record: Mapping[str, Any]) -> str:
    """Return whether a kernel was built, by the record of its image."""
    if step is None:
        return "-"
    if step.kernel.form == "wheel":
        return "public wheel"
    names = {kernel["name"]: kernel for kernel in record.get("kernels", ())}
    made, day = names.get(step.kernel.name), record.get("day", "")
    if made is None:
        return "not yet built"
    if made["key"] != step.key:
        return f"{day}, from an earlier recipe"
    return f"small build, {day}" if made["trimmed"] else f"built, {day}"


def replace_table(page: str, name: str, text: str) -> str:
    """Return a page with another text between the two marker lines of a table.

    Args:
        page: the whole file.
        name: the table's name in the markers.
        text: the new text between the markers.

    Raises:
        AttnimgError: it has no such markers (code "no-marks").
    """
    begin, end = f"<!-- {name}: `make render` writes what follows -->\n", f"<!-- {name}: end -->"
    head, found_begin, rest = page.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        raise AttnimgError(
            "a page has no place for a generated table",
            why=f"found no line {begin.strip()!r} followed by {end!r}",
            do="put both lines back",
            code="no-marks",
        )
    return f"{head}{begin}\n{text}\n{end}{tail}"
