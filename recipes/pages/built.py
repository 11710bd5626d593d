"""Write and read the records of what was built (docs/built), and the README's table of images."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from recipes.artifact.facts import Artifact
from recipes.facts import ImagePlan, Step
from recipes.pages import markdown_table

FOLDER = "docs/built"
# The last line of pytest, where no test failed.
_PASSED = re.compile(r"\d+ passed(, \d+ (skipped|deselected|xfailed|warnings?))* in [\d.]+s.*")
# The end of a wheel's name -> what it is for.
_PLATFORMS = {"_x86_64": "linux/amd64", "_aarch64": "linux/arm64"}
# The state of an image without kernels of its own: .ci/run builds it.
BUILT_IN_CI = "built and tested on every change"
NOT_BUILT, _BUILT = "not yet built", "built, "


def build_record(
    manifest: Mapping[str, Any],
    codes: Mapping[str, Mapping[str, list[str]]],
    *,
    platform: str,
    day: str,
    machine: str,
    earlier: Mapping[str, Any],
) -> str:
    """Return the record of a wheelhouse, which may have only some of its image's kernels.

    A wheel that the earlier record has keeps its day and machine. If a build took its objects from
    the cache, its times have no meaning: those of the earlier record, whose build compiled them,
    are kept.

    Args:
        manifest: its manifest.json: each kernel with its time, jobs and bytes.
        codes: wheel -> library -> the machine code found in it.
        platform: what the wheels are for.
        day: when the new wheels were built, YYYY-MM-DD.
        machine: what they were built on, in general words.
        earlier: the record that this one replaces; empty for none.

    Raises:
        AttnimgError: a wheel is for another platform (code "bad-wheelhouse").
    """
    _refuse_other_platform(manifest, platform)
    before = {kernel["name"]: kernel for kernel in earlier.get("kernels", ())}
    kernels = [
        {
            **kernel,
            **_earlier_times(kernel, before.get(kernel["name"])),
            **_built_when(kernel, before.get(kernel["name"]), {"day": day, "machine": machine}),
            "code": codes.get(kernel["wheel"], {}),
        }
        for kernel in manifest["kernels"]
    ]
    head = {"image": manifest["image"], "platform": platform, "abi": manifest["abi"]}
    return json.dumps({**head, "kernels": kernels}, indent=1) + "\n"


def _built_when(
    kernel: Mapping[str, Any], before: Mapping[str, Any] | None, now: Mapping[str, str]
) -> dict[str, str]:
    """Return when and on what a wheel was built: as recorded earlier, if it is the same file."""
    found = before if before and before.get("sha256") == kernel.get("sha256", "") else now
    return {key: found[key] for key in ("day", "machine")}


def _refuse_other_platform(manifest: Mapping[str, Any], platform: str) -> None:
    """Raise if a wheel is for another platform, by its name."""
    wheels = [str(kernel["wheel"]) for kernel in manifest["kernels"]]
    for end, found in _PLATFORMS.items():
        wrong = [wheel for wheel in wheels if wheel.endswith(f"{end}.whl")]
        if found != platform and wrong:
            raise AttnimgError(
                f"the wheels are not for {platform}",
                why=f"found {', '.join(wrong)}, for {found}",
                do=f"make built/{manifest['image']} PLATFORM={found}, or make wheels/"
                f"{manifest['image']} PLATFORM={platform}",
                code="bad-wheelhouse",
            )


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
    """Read the records of a checkout: name of the file -> record.

    These are IMAGE and IMAGE-arm64 for wheels, fa4-cache-IMAGE and triton-cache-IMAGE for kernels
    that were compiled ahead of time, image-IMAGE for the finished image.
    """
    paths = sorted((root / FOLDER).glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def images_table(plans: Iterable[ImagePlan], records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the README's table: each stable image, its GPUs, its kernels, and its state."""
    rows = []
    for plan in (plan for plan in plans if plan.image.channel == "stable"):
        record = records.get(plan.image.name, {})
        states = [kernel_state(step, record) for step in plan.steps if step.kernel.form != "wheel"]
        names = ", ".join(f"`{name}`" for name in (plan.image.name, *plan.image.aliases))
        kernels = ", ".join(step.kernel.summary for step in plan.steps) or "PyTorch's own"
        rows.append((names, plan.image.summary, kernels, _image_state(states)))
    return markdown_table(("image", "GPUs", "kernels", "state"), rows)


def _image_state(states: Iterable[str]) -> str:
    """Return the state of an image, by those of its kernels."""
    found = list(states)
    days = sorted(text.removeprefix(_BUILT) for text in found if text.startswith(_BUILT))
    if not found:
        return BUILT_IN_CI
    if len(days) == len(found):
        return f"kernels built {days[-1]}"
    return f"{len(days)} of {len(found)} kernels built" if days else NOT_BUILT


def image_record(
    name: str, sizes: Iterable[Mapping[str, Any]], config: bytes, *, day: str, selftest: str
) -> tuple[str, str]:
    """Return the path and the text of the record of a finished image.

    Args:
        name: of the image.
        sizes: of its layers.
        config: its configuration, as it is stored; it has the platform and the labels.
        day: when its size was measured, YYYY-MM-DD.
        selftest: what `attnimg selftest` printed in it; its last line is recorded.

    Raises:
        AttnimgError: it is another image, or its selftest did not end with a result (code
            "bad-image").
    """
    found = json.loads(config)
    labels = (found.get("config") or {}).get("Labels") or {}
    title, lines = labels.get("org.opencontainers.image.title"), selftest.strip().splitlines()
    faults = []
    if title != f"attnimg:{name}":
        faults.append(f"found the title {title!r}, needed 'attnimg:{name}'")
    if not lines or not _PASSED.fullmatch(lines[-1]):
        faults.append(f"the selftest ended with {lines[-1:]}, needed tests that passed")
    if faults:
        raise AttnimgError(
            f"the image {name} is not recorded",
            why="\n".join(faults),
            do=f"make build/{name}, fix what make test/{name} finds, and record it again",
            code="bad-image",
            exit_code=1,
        )
    platform = f"{found['os']}/{found['architecture']}"
    record = {
        "image": name,
        "platform": platform,
        "day": day,
        "version": labels.get("org.opencontainers.image.version", ""),
        "revision": labels.get("org.opencontainers.image.revision", ""),
        "selftest": lines[-1].partition(" in ")[0],
        "layers": list(sizes),
    }
    end = "" if platform == "linux/amd64" else f"-{found['architecture']}"
    return f"{FOLDER}/image-{name}{end}.json", json.dumps(record, indent=1) + "\n"


def find_kernel(step: Step, record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the entry of a kernel in the record of an image; None if it was not built."""
    return next((one for one in record.get("kernels", ()) if one["name"] == step.kernel.name), None)


def kernel_state(step: Step, record: Mapping[str, Any]) -> str:
    """Return whether a kernel was built, by the record of its image."""
    made = find_kernel(step, record)
    if made is None:
        return NOT_BUILT
    if made["key"] != step.key:
        return f"{made['day']}, from an earlier recipe"
    return f"small build, {made['day']}" if made["trimmed"] else f"{_BUILT}{made['day']}"


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
