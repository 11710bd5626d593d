"""Write the provenance of an image: SLSA v1, from the recipes, the bake file and the lock files.

Source: https://slsa.dev/spec/v1.0/provenance (2026-11-27). The build type is ours; docs/releases.md
says what its fields mean.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from attnimg.errors import AttnimgError
from recipes.facts import ImagePlan, Step
from recipes.solve.lock import split_lock

BUILD_TYPE = "urn:attnimg:build:v1"
_HASH = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Builder:
    """Who built: the workflow's run, or a person's machine.

    Attributes:
        id: of the workflow, or LAPTOP.
        run: the address of the run; empty on a person's machine.
    """

    id: str
    run: str


# What the builder is named by, with GITHUB_RUN_ID.
_RUN = ("GITHUB_SERVER_URL", "GITHUB_WORKFLOW_REF", "GITHUB_REPOSITORY")
LAPTOP = "urn:attnimg:builder:unattested-machine"


def find_builder(env: Mapping[str, str]) -> Builder:
    """Return the builder, by the variables that GitHub sets in a run of a workflow.

    Raises:
        AttnimgError: only some of them are set (code "no-builder").
    """
    if not env.get("GITHUB_RUN_ID"):
        return Builder(id=LAPTOP, run="")
    if missing := [name for name in _RUN if not env.get(name)]:
        raise AttnimgError(
            "the run of the workflow is not known",
            why=f"found GITHUB_RUN_ID without {', '.join(missing)}, needed all",
            do="run the workflow release.yml; on a machine of your own, unset GITHUB_RUN_ID",
            code="no-builder",
        )
    server = env["GITHUB_SERVER_URL"]
    attempt = f"/attempts/{env['GITHUB_RUN_ATTEMPT']}" if env.get("GITHUB_RUN_ATTEMPT") else ""
    return Builder(
        id=f"{server}/{env['GITHUB_WORKFLOW_REF']}",
        run=f"{server}/{env['GITHUB_REPOSITORY']}/actions/runs/{env['GITHUB_RUN_ID']}{attempt}",
    )


def provenance(
    plan: ImagePlan,
    *,
    targets: Mapping[str, Any],
    locks: Mapping[str, str],
    base: Mapping[str, str],
    image_id: str,
    source: str,
    revision: str,
    created: str,
    builder: Builder,
    warnings: Iterable[str],
) -> dict[str, Any]:
    """Return the predicate.

    Args:
        plan: of the image.
        targets: the targets of the bake file.
        locks: path -> text of each lock file that the build reads.
        base: name and digest of the base image that was used, as the labels have them.
        image_id: of the image, the digest of its configuration.
        source: the address of the repository.
        revision: the commit; "-dirty" at its end if the checkout was changed.
        created: when the image was built, as RFC 3339.
        builder: who built it.
        warnings: why it is a rehearsal; none for a release.
    """
    name = plan.image.name
    internal: dict[str, Any] = {
        "image": image_id,
        "buildArgs": {
            target: content["args"]
            for target, content in targets.items()
            if target.partition("_")[0] == name and "args" in content
        },
        "abi": plan.abi,
        "kernelKeys": {step.kernel.name: step.key for step in plan.steps},
    }
    if rehearsal := list(warnings):
        internal["rehearsal"] = rehearsal
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "image": name,
                "recipe": f"recipes/images/{name.removesuffix('-frontier')}.toml",
                "platform": plan.platform,
                "source": source,
                "revision": revision,
            },
            "internalParameters": internal,
            "resolvedDependencies": [
                _git(source, revision),
                _base(base),
                *_torch(plan, locks),
                *(part for step in plan.steps for part in _kernel(step)),
                *({"name": path, "digest": _sha256(text)} for path, text in locks.items()),
            ],
        },
        "runDetails": {
            "builder": {"id": builder.id},
            "metadata": {
                **({"invocationId": builder.run} if builder.run else {}),
                **({"finishedOn": created} if created else {}),
            },
        },
    }


def _git(source: str, revision: str) -> dict[str, Any]:
    commit, _, state = revision.partition("-")
    found = {"uri": f"git+{source}@{commit}", "digest": {"gitCommit": commit}}
    # The commit does not have what was changed.
    return {**found, "annotations": {"state": state}} if state else found


def _base(base: Mapping[str, str]) -> dict[str, Any]:
    name, digest = base["name"], base["digest"]
    found: dict[str, Any] = {"name": "base", "uri": f"docker:{name}"}
    if digest:
        found["digest"] = {"sha256": digest.removeprefix("sha256:")}
    return found


def _torch(plan: ImagePlan, locks: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield torch and, where its lock file has hashes, one entry for each of its files."""
    uri = f"pkg:pypi/torch@{plan.image.torch}"
    hashes = [
        found
        for text in locks.values()
        for found in _HASH.findall(split_lock(text).get("torch", ""))
    ]
    yield from ({"uri": uri, "digest": {"sha256": one}} for one in dict.fromkeys(hashes))
    if not hashes:
        yield {"name": "torch", "uri": uri}


def _kernel(step: Step) -> Iterator[dict[str, Any]]:
    """Yield a kernel's sources, by commit or sha256, and the patches on them."""
    kernel = step.kernel
    if step.prebuilt:
        yield {"uri": _package(step.prebuilt.source), "digest": {"sha256": step.prebuilt.sha256}}
    elif kernel.form == "git":
        for source in (kernel.source, *kernel.submodules.values()):
            repository, _, commit = source.partition("@")
            yield {
                "uri": f"git+https://github.com/{repository}@{commit}",
                "digest": {"gitCommit": commit},
            }
    else:
        yield {"uri": _package(kernel.source), "digest": {"sha256": str(kernel.sha256)}}
    for patch in kernel.patches:
        if not patch.name.startswith("trim/"):
            path = f"recipes/patches/{kernel.name}/{patch.name}"
            yield {"name": path, "digest": _sha256(patch.diff)}


def _package(source: str) -> str:
    name, separator, version = source.partition("==")
    return f"pkg:pypi/{name}@{version}" if separator else source


def _sha256(text: str) -> dict[str, str]:
    return {"sha256": hashlib.sha256(text.encode()).hexdigest()}
